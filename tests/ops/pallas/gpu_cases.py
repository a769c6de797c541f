"""Calls of the GPU kernels that tests share: to compile, and to interpret."""

import itertools

import jax.numpy as jnp

from longjax.ops.pallas.contract import UNBOUNDED
from longjax.ops.pallas.mosaic_gpu_common import HEAD_SIZES, GpuConfig

BF16, F16 = jnp.bfloat16, jnp.float16

# What a call may have: arguments of `oracle.operands`, and `spec`.
FEATURES = {
  'plain': {},
  'ids': dict(ids=True),
  'dropout': dict(spec=dict(dropout_rate=0.1)),
  'soft cap': dict(spec=dict(soft_cap=30.0)),
  'prefix': dict(prefix=16),
  'prefix of its own queries': dict(prefix=16, prefix_q=True),
  'residues': dict(residues=2),
  'a residue for each head': dict(spec=dict(residues=(0, 1, 0, 1)), residues=2),
  'everything': dict(
    spec=dict(dropout_rate=0.1, soft_cap=30.0),
    ids=True,
    prefix=16,
    prefix_q=True,
  ),
}

# By head size: what is compiled always, and the rest of all combinations.
COMPILED = [
  (size, feature)
  for size, feature in itertools.product(HEAD_SIZES, FEATURES)
  if size == 128 or feature in ('plain', 'everything')
]
ALSO_COMPILED = [
  pair
  for pair in itertools.product(HEAD_SIZES, FEATURES)
  if pair not in COMPILED
]

# --- To interpret ------------------------------------------------------------

FULL = dict(left=UNBOUNDED, right=UNBOUNDED)
# Arguments of `contract.where_rows`, which are traced: what one of them has
# compiled serves the others. There are 100 queries and 130 keys.
WHERE = {
  'itself': dict(left=0),
  'window 1': dict(left=1),
  'window 63': dict(left=63),
  'window 64': dict(left=64),
  'causal': dict(left=UNBOUNDED),
  'two sides': dict(left=20, right=30),
  'all': FULL,
  'right only': dict(left=0, right=UNBOUNDED),
  'not the nearest': dict(left=60, right=-20),
  'only the nearest future': dict(left=-5, right=40),
  'nothing': dict(left=10, right=-20),
  'shift': dict(left=40, shift=50),
  'shift back': dict(left=40, shift=-70),
  'shift past the end': dict(left=10, shift=500),
  'a billion back': dict(FULL, shift=2**30 - 30),
  'a billion ahead': dict(FULL, shift=30 - 2**30),
  'begin': dict(left=80, begin=33),
  'end': dict(left=UNBOUNDED, right=5, end=70),
  'begin and end': dict(FULL, begin=65, end=66),
  'begin after end': dict(FULL, begin=66, end=65),
  'end beyond': dict(FULL, begin=-9, end=900),
}

# Everything else: of a structure, with these intervals.
_STRUCTURES = {
  'ids': dict(ids=True),
  'dropout': dict(spec=dict(dropout_rate=0.3)),
  'soft cap': dict(spec=dict(soft_cap=0.5), dtype=F16),
  'ids, dropout, soft cap': dict(
    spec=dict(soft_cap=2.0, dropout_rate=0.2), ids=True, size=128
  ),
  'groups of heads': dict(heads=4, kv_heads=2, num_queries=70),
  'one key head': dict(heads=3, kv_heads=1, num_queries=70, num_keys=140),
  'residues': dict(residues=3, num_queries=70),
  'residues, ids, dropout': dict(
    spec=dict(dropout_rate=0.2), residues=2, num_queries=70, ids=True
  ),
  'a residue for each head': dict(
    spec=dict(residues=(0, 3, 1, 3)),
    residues=4,
    num_queries=70,
    heads=4,
    kv_heads=2,
  ),
  'a residue for each head, ids, dropout': dict(
    spec=dict(residues=(1, 0), dropout_rate=0.2),
    residues=2,
    num_queries=70,
    heads=2,
    ids=True,
    dtype=F16,
  ),
  'prefix': dict(prefix=5),
  'prefix of more than a tile': dict(prefix=140, num_queries=70),
  'prefix, not causal': dict(spec=dict(prefix_causal=False), prefix=20),
  'prefix of its own queries': dict(prefix=5, prefix_q=True),
  'prefix, ids': dict(prefix=20, ids=True),
  'prefix, groups of heads': dict(
    prefix=70, prefix_q=True, heads=4, kv_heads=1, num_queries=70
  ),
}


def _cases(cases):
  return {
    name: dict(num_queries=100, heads=1) | case for name, case in cases.items()
  }


def _length(n):
  return {f'length {n}': dict(num_queries=n, left=90, right=1)}


def _size(size, dtype):
  name = f'size {size} {jnp.dtype(dtype).name}'
  return {name: dict(size=size, dtype=dtype, left=70)}


def _everything(size):
  case = dict(
    spec=dict(soft_cap=2.0, dropout_rate=0.2),
    prefix=20,
    prefix_q=True,
    ids=True,
    left=30,
    right=5,
    size=size,
  )
  return {f'prefix, everything, size {size}': case}


def _tiles(own, walk, stages, groups, take_turns=False):
  name = f'tiles {own}x{walk}, {stages} stages, {groups} warpgroups'
  config = GpuConfig(own, walk, stages, groups, take_turns=take_turns)
  case = dict(config=config, left=70, right=3, num_queries=200, prefix=3)
  return {name: case}


# By name: as FEATURES; also `config` of all kernels, `prefix_row`. Lengths
# leave the last tiles in part empty, but where a name says so.
CASES = _cases(
  {name: dict(where, num_keys=130) for name, where in WHERE.items()}
  | {
    f'{name}, {interval}': where | case
    for name, case in _STRUCTURES.items()
    for interval, where in (
      ('two sides', WHERE['two sides']),
      ('causal', WHERE['causal']),
      ('not the nearest', WHERE['not the nearest']),
      ('cut', dict(left=70, right=9, shift=20, begin=10, end=80)),
    )
  }
  | {
    'whole tiles, all': dict(FULL, num_queries=256),
    'whole tiles, window 64': dict(left=64, num_queries=256),
    'a where for each sequence': dict(
      sequences=3,
      num_queries=70,
      left=jnp.array([5, 30, UNBOUNDED]),
      right=jnp.array([0, 10, -3]),
      shift=jnp.array([0, 7, 20]),
      begin=jnp.array([0, 11, 0]),
      end=jnp.array([70, 50, 64]),
    ),
    'one query': dict(num_queries=1, num_keys=150, shift=149, left=99),
    'one key': dict(num_queries=150, num_keys=1, left=UNBOUNDED),
    'few keys': dict(FULL, num_keys=13, sequences=2),
    'dropout, located': dict(
      spec=dict(dropout_rate=0.1),
      sequences=2,
      heads=2,
      kv_heads=1,
      num_queries=70,
      left=64,
      q_position=jnp.array([1000, 2**31 - 500]),
      k_position=jnp.array([900, 5]),
      batch_row=jnp.array([3, 4]),
      first_head=12,
    ),
    'prefix only': dict(prefix=5, prefix_q=True, left=10, right=-20),
    'prefix of its own queries, in parts': dict(
      prefix=5, prefix_q=True, left=30, num_queries=300
    ),
    'prefix, of two sequences': dict(
      prefix=20, left=30, right=9, shift=40, begin=10, end=80, sequences=2
    ),
    'prefix, rows that are none of keys': dict(
      spec=dict(prefix_causal=False),
      prefix=5,
      prefix_row=[-3, 5, 69, 70, 200],
      num_queries=70,
      left=30,
      right=20,
      begin=-10,
    ),
    **{
      f'prefix, rows that are none of keys, end {end}': dict(
        prefix=5,
        prefix_row=[-30, -5, 45, 60, 100],
        num_keys=40,
        left=90,
        shift=20,
        begin=-9,
        end=end,
      )
      for end in (50, UNBOUNDED)
    },
  }
  | _length(1)
  | _length(7)
  | _length(64)
  | _length(129)
  | _length(300)
  | _size(32, BF16)
  | _size(64, F16)
  | _size(96, BF16)
  | _size(128, F16)
  | _size(256, BF16)
  | _everything(96)
  | _everything(256)
  | _tiles(64, 64, 1, 1)
  | _tiles(64, 64, 4, 3)
  | _tiles(128, 64, 2, 1)
  | _tiles(64, 32, 3, 2, take_turns=True)
)

# Little of what these compile is shared, and little in them is new.
MORE_CASES = _cases(
  _length(8)
  | _length(65)
  | _length(127)
  | _length(128)
  | _size(32, F16)
  | _size(96, F16)
  | _size(128, BF16)
  | _size(256, F16)
  | _everything(64)
  | _everything(128)
  | _tiles(64, 64, 2, 2)
  | _tiles(64, 128, 1, 2, take_turns=True)
  | _tiles(64, 192, 2, 2, take_turns=True)
)

# The whole grid: structures, each with all intervals of GRID_WHERE.
GRID = list(
  itertools.product(
    (32, 64, 128),
    (BF16, F16),
    (
      {},
      dict(residues=2),
      dict(residues=2, spec=dict(residues=(1, 0))),
      dict(prefix=9),
      dict(prefix=70, prefix_q=True),
    ),
    (
      {},
      dict(ids=True),
      dict(spec=dict(dropout_rate=0.25)),
      dict(spec=dict(soft_cap=1.0), ids=True),
    ),
  )
)
GRID_WHERE = (
  dict(left=3),
  dict(left=100, right=50, shift=13, end=190),
  dict(left=UNBOUNDED),
  dict(left=90, right=-9, shift=20, begin=30),
)


def of_grid(number: int) -> list[dict]:
  """Cases as CASES of one structure of the grid."""
  size, dtype, view, feature = GRID[number]
  spec = view.get('spec', {}) | feature.get('spec', {})
  # Lengths that are no multiples of tiles, others for each structure.
  lengths = 65 + number * 37 % 136, 40 + number * 53 % 200
  return [
    where
    | view
    | feature
    | dict(
      spec=spec,
      size=size,
      dtype=dtype,
      num_queries=lengths[0],
      num_keys=lengths[1],
      heads=2,
      kv_heads=1,
    )
    for where in GRID_WHERE
  ]
