"""The random grid of options, where kernels take part of it."""

import numpy as np

import longjax
from tests.ops import cases
from tests.ops.helpers import qkv


def case(number: int, *, size=None, dtype=None):
  """Case `number`: (inputs, pattern, options), as the kernels want them.

  Args:
    size, dtype: of heads; those that the grid draws if None.
  """
  inputs, pattern, options = cases.draw(number)
  q, k, v = inputs
  v = v if v.shape == k.shape else k[..., ::-1]
  if not isinstance(options['position'], longjax.RoPE | None):
    options['position'] = (None, longjax.RoPE())[number % 2]
  if size is not None:
    q, k, v = qkv(
      number,
      *q.shape[:3],
      k.shape[2],
      size,
      kv_length=k.shape[1],
      dtype=dtype,
    )
  return (q, k, v), pattern, options


def refusal(pattern, options) -> str | None:
  """What of the case no kernel call can express: a part of the reason."""
  ranks = [np.ndim(options[f'{x}_positions']) for x in ('q', 'kv')]
  moved = any(
    not (isinstance(y, int) and y == 0)
    for y in (options['q_positions'], options['kv_positions'])
  )
  dilated = isinstance(pattern, longjax.Dilated)
  if 2 in ranks:
    return 'of every token'
  if 'segment_ids' in options:
    if dilated or isinstance(pattern, longjax.Lambda) and pattern.start:
      return 'segment_ids with'
  if dilated and moved:
    return 'known only for a plain 0'
  dilation = getattr(pattern, 'dilation', 1)
  if 1 in ranks and max(np.atleast_1d(dilation)) > 1:
    return 'positions of each batch row'
  return None
