"""Whether results are right: some heads of a case, recomputed in float32.

The same lines run on JAX and on PyTorch arrays, on the device, a block of
queries at a time, so that they serve 131,072 tokens. No timed code is shared
with them, nor longjax's: the mask is `cases.counts`. Besides, only numpy and
the array library that is passed in.
"""

import dataclasses
import functools
import operator

import numpy as np

from experiments.benchmarks import cases

BLOCK = 1024
# Of the norm of each block of rows; bfloat16 operands give 2e-3 to 6e-3.
TOLERANCE = 1.5e-2
NAMES = ('out', 'dq', 'dk', 'dv')


def _block(xp, case, detached, q, k, v, dout, i, j, head):
  """(out, dq, dk, dv) of queries i [b] and keys j [s]: arrays [b | s, D]."""
  i, j = i[:, None], j[None, :]
  scale = case.size**-0.5
  s = (q @ k.T) * scale
  weight = xp.exp(s - s.max())
  parts = [
    weight
    * cases.counts(dataclasses.replace(case, branches=(branch,)), i, j, head)
    for branch in case.branches
  ]
  w = functools.reduce(operator.add, parts)
  total = w.sum(-1)[:, None]
  total = total + (total == 0)
  p = w / total
  out = p @ v
  dp = dout @ v.T
  if detached:
    # The weights that mix the branches take no part in the gradient.
    ds = 0.0
    for part in parts:
      size = part.sum(-1)[:, None]
      delta = ((part @ v) * dout).sum(-1)[:, None] / (size + (size == 0))
      ds = ds + part / total * (dp - delta)
  else:
    ds = p * (dp - (out * dout).sum(-1)[:, None])
  return out, ds @ k * scale, ds.T @ q * scale, p.T @ dout


def _keys(case, first):
  """The keys that queries first, ..., first + BLOCK - 1 may see: a slice.

  Its length does not depend on `first`, so that one program is compiled.
  """
  if case.start or case.num_globals or any(b.segment for b in case.branches):
    return slice(0, case.length)
  left = max(b.left * b.stride for b in case.branches)
  right = max(b.right * b.stride for b in case.branches)
  size = min(case.length, left + BLOCK + right)
  begin = min(max(first - left, 0), case.length - size)
  return slice(begin, begin + size)


@functools.lru_cache(4)
def _program(xp, case, detached, jit):
  """`_block` of a case, compiled once for all heads."""
  block = functools.partial(_block, xp, case, detached)
  return block if jit is None else jit(block)


def expected(xp, case, q, k, v, dout, head, *, detached=False, jit=None):
  """{'out', 'dq', 'dk', 'dv'} of one head, all [T, D] float32.

  Args:
    xp: jax.numpy or torch; that products are in full float32 is the caller's
      duty.
    q, k, v, dout: of that head, [T, D] float32.
    detached: see `longjax.Dilated.detach_weights`.
    jit: compiles a function of arrays; None for PyTorch.
  """
  block = _program(xp, case, detached, jit)

  def positions(rows):
    return xp.arange(rows.start, rows.stop, device=q.device)

  out, dq = [], []
  dk, dv = (np.zeros((case.length, case.size), np.float32) for _ in range(2))
  whole_dk = whole_dv = 0.0
  for first in range(0, case.length, BLOCK):
    rows = slice(first, min(first + BLOCK, case.length))
    keys = _keys(case, first)
    results = block(
      *(q[rows], k[keys], v[keys], dout[rows]),
      *(positions(rows), positions(keys), head),
    )
    out.append(to_numpy(results[0]))
    dq.append(to_numpy(results[1]))
    if keys == slice(0, case.length):
      # Summed on the device: too much to fetch for each block.
      whole_dk, whole_dv = whole_dk + results[2], whole_dv + results[3]
    else:
      dk[keys] += to_numpy(results[2])
      dv[keys] += to_numpy(results[3])
  return {
    'out': np.concatenate(out),
    'dq': np.concatenate(dq),
    'dk': dk + to_numpy(whole_dk),
    'dv': dv + to_numpy(whole_dv),
  }


def to_numpy(x):
  """A float32 numpy array of a JAX or PyTorch one of any dtype, or a number."""
  if hasattr(x, 'detach'):  # PyTorch has no bfloat16 in numpy
    x = x.detach().float().cpu()
  return np.asarray(x, np.float32)


def error(got, wanted) -> float:
  """The largest ||got - wanted|| / ||wanted|| over blocks of rows.

  Blocks, so that rows which see many keys, whose results are small, count as
  much as the first ones.
  """
  got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
  if got.shape != wanted.shape:
    raise ValueError(f'shape {got.shape} instead of {wanted.shape}')
  blocks = min(64, max(1, len(wanted) // 64))
  ratios = []
  for rows in np.array_split(np.arange(len(wanted)), blocks):
    size = np.linalg.norm(wanted[rows])
    difference = np.linalg.norm(got[rows] - wanted[rows])
    ratios.append(difference / size if size else difference)
  return float(np.max(ratios))  # NaN, if there is one


def judge(errors):
  """Returns `errors`; raises ArithmeticError if one is above the tolerance."""
  wrong = [
    f'{name} {value:.2g}'
    for name, value in errors.items()
    if not value <= TOLERANCE
  ]
  if wrong:
    raise ArithmeticError(
      f'wrong numbers, so not timed: off by {", ".join(wrong)} where '
      f'{TOLERANCE} is allowed'
    )
  return errors


def pieces(case):
  """Yields (batch row, head, rows, case of these rows) to check.

  The first and the last head, which select different rows in LongNet's
  branches; of a long sequence only what no other part of it can influence.
  """
  size = case.length
  segments = [b.segment for b in case.branches]
  if all(segments):
    longest = max(segments)
    nested = not any(longest % segment for segment in segments)
    if nested and size % longest == 0:
      size = longest
  part = dataclasses.replace(case, length=size)
  yield 0, 0, slice(0, size), part
  yield case.batch - 1, case.heads - 1, slice(case.length - size, None), part


def check(xp, case, inputs, results, **options):
  """{name: error} of `results`; raises ArithmeticError.

  Args:
    inputs: (q, k, v, dout), [batch, length, heads, size].
    results: {'out', 'dq', 'dk', 'dv'} of one call, and 'forward', out of the
      other, all of that shape.
    **options: of `expected`.
  """
  errors = {}
  for row, head, rows, part in pieces(case):
    arrays = (_float32(xp, x[row, rows, head]) for x in inputs)
    wanted = expected(xp, part, *arrays, head, **options)
    wanted['forward'] = wanted['out']
    for name, got in results.items():
      ratio = error(to_numpy(got[row, rows, head]), wanted[name])
      errors[name] = float(np.maximum(ratio, errors.get(name, 0.0)))
  return judge(errors)


def _float32(xp, x):
  return x.to(xp.float32) if hasattr(x, 'detach') else x.astype(xp.float32)
