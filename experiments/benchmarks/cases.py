"""What `attention.py` times: cases, in the order of their importance.

A case is plain data that travels to the workers as JSON. Here too is what is
true of a case whoever computes it: how often a query sees a key (`counts`, on
which the check of the numerics rests), how many pairs that makes, and how many
operations and bytes they cost at least. Only the standard library and numpy,
any Python from 3.11.
"""

import dataclasses

import numpy as np

MODES = ('forward', 'forward+backward')
UNBOUNDED = 2**30

# Who computes. The names are those of the record.
MOSAIC, XLA = 'longjax mosaic_gpu', 'longjax xla'
CUDNN, TOKAMAX = 'cuDNN (jax.nn)', 'tokamax'
FLEX, FLASH = 'FlexAttention', 'PyTorch flash'
TORCH_CUDNN, GATHER = 'PyTorch cuDNN', 'gather-flash-scatter'
GATHER_FLEX = 'gather-FlexAttention-scatter'
HF = 'Hugging Face'
# Processes, and who runs in which: a kernel that hangs takes only itself down,
# and what compiles long does so beside the others.
WORKERS = {
  'mosaic': (MOSAIC,),
  'jax': (CUDNN, TOKAMAX, XLA),
  'flex': (FLEX, GATHER_FLEX),
  'torch': (FLASH, TORCH_CUDNN, GATHER, HF),
}


@dataclasses.dataclass(frozen=True)
class Branch:
  """Keys at -right * stride <= query - key <= left * stride in steps of stride.

  With `segment`, instead: both in one segment of that length and on its rows
  congruent to head mod `stride` (LongNet's thinning), key <= query.
  """

  left: int = UNBOUNDED
  right: int = 0
  stride: int = 1
  segment: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem [batch, length, heads, size].

  Attributes:
    family: 'window', 'longformer', 'layer', 'dilation', 'longnet' or 'lambda'.
    start: Λ's start keys: seen by every query at or after them, once.
    num_globals: Longformer: the first tokens see and are seen by all, once.
    dtype: bfloat16 or float16 (Hugging Face's layer).
  """

  name: str
  family: str
  batch: int
  length: int
  heads: int
  size: int
  branches: tuple[Branch, ...]
  start: int = 0
  num_globals: int = 0
  dtype: str = 'bfloat16'

  @property
  def full(self) -> bool:
    return self.family == 'window' and self.branches[0].left == UNBOUNDED

  def rivals(self) -> tuple[str, ...]:
    """Who can compute this case, besides `longjax mosaic_gpu`."""
    if self.family == 'window':
      more = (TORCH_CUDNN,) if self.full else ()
      return CUDNN, FLEX, FLASH, *more, TOKAMAX, XLA
    return {
      'longformer': (FLEX, XLA),
      'layer': (HF, XLA),
      'dilation': (GATHER, GATHER_FLEX, FLEX, XLA),
      # No mask says that a key is seen by several branches.
      'longnet': (GATHER, XLA),
      'lambda': (FLEX, XLA),
    }[self.family]

  def to_json(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values) -> 'Case':
    branches = tuple(Branch(**b) for b in values['branches'])
    return cls(**values | {'branches': branches})


def counts(case, i, j, head):
  """How often query i sees key j: numpy, jax or torch integers -> float32.

  This is the definition which the implementations are checked against; it
  knows nothing of longjax.patterns.
  """
  total = 0.0
  for b in case.branches:
    if b.segment:
      row = head % b.stride
      seen = (i // b.segment == j // b.segment) & (j <= i)
      seen = seen & (i % b.segment % b.stride == row)
      seen = seen & (j % b.segment % b.stride == row)
    else:
      seen = (i - j <= b.left * b.stride) & (j - i <= b.right * b.stride)
      seen = seen & ((i - j) % b.stride == 0)
    if case.start:
      seen = seen | ((j < case.start) & (j <= i))
    if case.num_globals:
      seen = seen | (i < case.num_globals) | (j < case.num_globals)
    total = total + 1.0 * seen
  return total


def pairs(case) -> int:
  """Pairs (query, key) seen, over batch and heads: the useful work."""
  n = case.length
  i = np.arange(n)
  total = 0
  for b in case.branches:
    if b.segment:
      for head in range(case.heads):
        row = head % b.stride
        # Rows of each segment; the last one may be shorter.
        whole, rest = divmod(n, b.segment)
        for size, segments in ((b.segment, whole), (rest, 1)):
          rows = max(0, -(-(size - row) // b.stride))
          total += segments * (rows * (rows + 1) // 2)
      continue
    first = np.maximum(i - min(b.left, n) * b.stride, i % b.stride)
    last = np.minimum(i + min(b.right, n) * b.stride, n - 1)
    seen = (last - first) // b.stride + 1
    # Start or global keys before the band; queries that are global see all.
    g = case.start or case.num_globals
    seen += np.minimum(g, np.maximum(0, first))
    if case.num_globals:
      seen[:g] = n
    total += case.heads * int(seen.sum())
  return case.batch * total


def useful_flops(case, mode) -> float:
  """Of the products only: two forward, five more backward."""
  products = 2 if mode == 'forward' else 7
  return products * 2.0 * case.size * pairs(case)


def fewest_bytes(case, mode) -> float:
  """Each input read and each result written once, by each pass."""
  array = 2.0 * case.batch * case.length * case.heads * case.size
  rows = 4.0 * case.batch * case.length * case.heads
  forward = 4 * array + rows  # q, k, v, out, lse
  if mode == 'forward':
    return forward
  return forward + 8 * array + rows  # all again, dout; dq, dk, dv


def spelled(n: int) -> str:
  if n % 1024:
    return str(n)
  return f'{n >> 20}M' if n % (1 << 20) == 0 else f'{n >> 10}k'


# Enough tokens to fill the chip at any length, so that times compare.
TOKENS = 131_072
LONGNET_TOKENS = 1 << 20
WINDOWS = (2048, 512, 8192, 128, 0)  # 0: full
SCHEDULES = {
  # Table 2 of the paper: as many as fit.
  'table 2': ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
  # Its equation 18 with factor 4.
  'geometric': (
    tuple(2048 * 4**i for i in range(4)),
    tuple(4**i for i in range(4)),
  ),
}


def window(length, width, size, tokens=TOKENS, heads=None):
  """Causal: `width` keys including the query's own; 0: all."""
  return Case(
    f'window {spelled(width) if width else "full"}, {spelled(length)}, D{size}',
    'window',
    max(1, tokens // length),
    length,
    heads or 1024 // size,
    size,
    (Branch(left=width - 1 if width else UNBOUNDED),),
  )


def longformer(length, num_globals, side=256, layer=False, tokens=65_536):
  name = 'Longformer layer' if layer else 'Longformer'
  return Case(
    f'{name} {side}+{side}, {num_globals} globals, {spelled(length)}',
    'layer' if layer else 'longformer',
    max(1, tokens // length),
    length,
    12,
    64,
    (Branch(left=side, right=side),),
    num_globals=num_globals,
    dtype='float16' if layer else 'bfloat16',
  )


def dilation(length, width, stride, size, tokens=TOKENS, heads=None):
  return Case(
    f'dilation {stride}, window {width}, {spelled(length)}, D{size}',
    'dilation',
    max(1, tokens // length),
    length,
    heads or 1024 // size,
    size,
    (Branch(left=width - 1, stride=stride),),
  )


def longnet(length, schedule, tokens=LONGNET_TOKENS, heads=12):
  segments, ratios = SCHEDULES[schedule]
  return Case(
    f'LongNet {schedule}, {spelled(length)}',
    'longnet',
    max(1, tokens // length),
    length,
    heads,
    64,
    tuple(
      Branch(stride=r, segment=w)
      for w, r in zip(segments, ratios, strict=True)
      if w <= length
    ),
  )


def lambda_mask(length, width=4096, start=10, size=128, tokens=TOKENS, heads=8):
  return Case(
    f'Λ {width}+{start}, {spelled(length)}',
    'lambda',
    max(1, tokens // length),
    length,
    heads,
    size,
    (Branch(left=width - 1),),
    start=start,
  )


def all_cases() -> list[Case]:
  """Of issue 3, the most telling first."""
  k = 1024

  def windows(length, size):
    # A window as long as the sequence is full attention.
    return [window(length, w, size) for w in WINDOWS if w < length]

  return [
    *windows(32 * k, 128),
    longformer(16 * k, 64, layer=True),
    longnet(32 * k, 'table 2'),
    dilation(32 * k, 512, 4, 64),
    *windows(32 * k, 64),
    dilation(32 * k, 512, 2, 64),
    longnet(8 * k, 'table 2'),
    longnet(1024 * k, 'table 2'),
    longnet(128 * k, 'table 2'),
    longformer(16 * k, 64),
    lambda_mask(32 * k),
    *windows(128 * k, 128),
    *windows(8 * k, 128),
    dilation(32 * k, 512, 4, 128),
    dilation(32 * k, 512, 2, 128),
    longformer(16 * k, 0),
    longformer(16 * k, 1),
    longformer(16 * k, 0, layer=True),
    longformer(16 * k, 1, layer=True),
    lambda_mask(128 * k),
    *windows(8 * k, 64),
    *windows(128 * k, 64),
    longformer(4 * k, 64),
    longformer(4 * k, 64, layer=True),
    longformer(4 * k, 0),
    longformer(4 * k, 1),
    longformer(4 * k, 0, layer=True),
    longformer(4 * k, 1, layer=True),
    longnet(1024 * k, 'geometric'),
    longnet(8 * k, 'geometric'),
    longnet(128 * k, 'geometric'),
  ]


def rehearsal_cases() -> list[Case]:
  """Every family, small enough for an interpreter on a CPU."""
  segments = Case(
    'LongNet small, 256',
    'longnet',
    1,
    256,
    2,
    64,
    (Branch(segment=64), Branch(stride=2, segment=128)),
  )
  return [
    window(256, 100, 64, tokens=256, heads=1),
    segments,
    dilation(256, 40, 2, 64, tokens=256, heads=1),
    dataclasses.replace(
      longformer(128, 3, side=32, layer=True, tokens=128), heads=2
    ),
    dataclasses.replace(longformer(128, 3, side=32, tokens=128), heads=1),
    lambda_mask(256, 64, 4, size=64, tokens=256, heads=1),
  ]
