"""cuDNN's flash attention, for the one thing it is known to do right here.

That is a causal window of keys to the left. It is always called with
is_causal=True: without, a left window shows the whole future (jax PR 39576).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.pallas import devices
from longjax.patterns import Branch
from longjax.positions import RoPE

_LARGEST_HEAD = 128


def attend(call: Call) -> tuple[Float[Array, 'B T H D'], None]:
  """(out, None) of a checked call: the log-sum-exp is refused.

  Raises:
    NotImplementedError: with the reason, for everything else.
  """
  left = _window(call)
  device = devices.device()
  if device.platform not in ('gpu', 'cuda'):
    _refuse(
      f'it runs on NVIDIA GPUs, and the device is {device.device_kind!r} of '
      f'platform {device.platform!r}'
    )
  q, k = call.q, call.k
  if call.position is not None:
    # Positions are 0, 1, 2, ... for both.
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
    q, k = (call.position.rotate(y, positions) for y in (q, k))
  try:
    out = jax.nn.dot_product_attention(
      q,
      k,
      call.v,
      scale=call.scale,
      is_causal=True,
      local_window_size=None if left >= q.shape[1] - 1 else (left, 0),
      implementation='cudnn',
    )
  except RuntimeError as error:  # that there is no cuDNN
    raise NotImplementedError(str(error)) from error
  return out, None


def _window(call: Call) -> int:
  """How many keys are seen before self."""
  num_heads = call.q.shape[2]
  (branch, *more) = call.pattern.branches(num_heads)
  every = branch.heads is None or len(branch.heads) == num_heads
  plain = Branch(left=branch.left, right=0, heads=branch.heads)
  if more or not every or branch != plain:
    _refuse(f'{call.pattern} is no causal window of neighbouring keys')
  if call.position is not None and not isinstance(call.position, RoPE):
    _refuse(f'position {type(call.position).__name__} is neither RoPE nor None')
  for name, reason in (
    ('global_tokens', call.global_tokens is not None),
    ('segment_ids', call.where.q_doc is not None),
    ('dropout_rate', call.dropout_rate > 0),
    ('logit_soft_cap', call.logit_soft_cap is not None),
    # JAX rounds it to the dtype of q and gives it no gradient.
    ('return_lse', call.return_lse),
  ):
    if reason:
      _refuse(f'{name} is not served')
  where = call.where
  moved = where.q_offset is not None or where.k_offset is not None
  if not call.contiguous or moved:
    _refuse('q_positions and kv_positions must be 0')
  (num_queries, _, size), num_keys = call.q.shape[1:], call.k.shape[1]
  if num_queries != num_keys:
    _refuse(f'{num_queries} queries and {num_keys} keys differ in number')
  if call.q.dtype not in (jnp.bfloat16, jnp.float16):
    _refuse(f'{call.q.dtype} is neither bfloat16 nor float16')
  if size > _LARGEST_HEAD or size % 8 or call.v.shape[3] != size:
    _refuse(
      f'head size {size} and value size {call.v.shape[3]} must be one multiple '
      f'of 8 up to {_LARGEST_HEAD}'
    )
  return int(min(branch.left, num_queries - 1))


def _refuse(reason):
  raise NotImplementedError(reason)
