"""What the Mosaic GPU kernels share: tiles, the ring, and who sees whom.

A kernel's programs have `groups` compute warpgroups and one memory warpgroup.
Each compute warpgroup owns `own` rows (queries going forward and for dQ, keys
for dK and dV) and all of them walk the same tiles of `walk` rows, which the
memory warpgroup brings into a ring of `stages` slots.

A tile of logits is [own, walk]. `q_axis` says along which of its axes the
queries lie: 0 going forward and for dQ, 1 for dK and dV, which work on the
transposed tile so that its products need no transposed left operand.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config as jax_config
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops import dropout
from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Operands, Spec

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# A tile in registers, a number for each of its rows, one for each column.
TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
# Finite, so that a tile of which nothing is seen gives exp2(-inf - it) = 0.
LOWEST = -1e30
# What a program may use on Hopper.
SHARED_MEMORY = 232448
HEAD_SIZES = (32, 64, 96, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """Tiles of a kernel.

  Attributes:
    own: rows of a compute warpgroup, a multiple of 64.
    walk: rows of a walked tile, a multiple of 32.
    stages: slots of the ring.
    groups: compute warpgroups.
    p_in_smem: probabilities become operands of a product through shared memory
      and not in registers; always so in the interpreter, which knows no other
      way.
    take_turns: going forward, where there are two compute warpgroups and two
      stages, one uses the tensor cores while the other is at its softmax.
  """

  own: int = 64
  walk: int = 64
  stages: int = 2
  groups: int = 2
  p_in_smem: bool = False
  take_turns: bool = False

  def __post_init__(self):
    for name, multiple in (('own', 64), ('walk', 32), ('stages', 1)):
      value = getattr(self, name)
      if value < multiple or value % multiple:
        raise ValueError(
          f'{name} must be a positive multiple of {multiple}, got {value}'
        )
    if self.groups not in _REGISTERS:
      raise ValueError(
        f'groups must be one of {(*_REGISTERS,)}, got {self.groups}'
      )

  @property
  def rows(self) -> int:
    """Rows of a program."""
    return self.groups * self.own

  @property
  def alternates(self) -> bool:
    # With one slot they would wait for each other for ever: the first for the
    # next tile, the second for its turn to leave this one.
    return self.take_turns and self.groups == 2 and self.stages > 1


def default_config(head_size: int, *, prefix_q: bool = False) -> GpuConfig:
  """Tiles of the forward kernel, for which ptxas needs no spills.

  Args:
    head_size: one of HEAD_SIZES.
    prefix_q: whether there is a prefix with queries of its own, which take as
      much shared memory again as the queries.
  """
  if head_size == 256:
    return GpuConfig(walk=32 if prefix_q else 64, take_turns=True)
  # Three stages of 128 keys of 128 numbers would be 48 bytes too many.
  stages = 2 if head_size == 128 else 3
  return GpuConfig(walk=128, stages=stages, take_turns=True)


def resolve(config: GpuConfig, interpret: Any) -> GpuConfig:
  """The config that the kernel gets, given its `interpret` argument."""
  forced = jax_config.pallas_tpu_interpret_mode_context_manager.value
  if interpret or forced:
    return dataclasses.replace(config, p_in_smem=True)
  return config


def check(spec: Spec, x: Operands) -> None:
  """Refuses what no kernel here computes.

  Raises:
    NotImplementedError: with the reason.
  """
  sequences, _, residues, heads, size = x.q.shape
  del sequences

  def refuse(reason):
    raise NotImplementedError(reason)

  dtypes = {y.dtype for y in (x.q, x.k, x.v)}
  if x.prefix is not None:
    m = x.prefix
    dtypes |= {y.dtype for y in (m.k, m.v, m.q) if y is not None}
  if len(dtypes) > 1:
    refuse(f'q, k and v have different dtypes: {sorted(map(str, dtypes))}')
  if x.q.dtype not in DTYPES:
    refuse(f'the products are of bfloat16 or float16, not {x.q.dtype}')
  if size not in HEAD_SIZES:
    refuse(f'head size {size} is none of {HEAD_SIZES}')
  if x.v.shape[-1] != size:
    refuse(f'value size {x.v.shape[-1]} differs from head size {size}')
  if heads % x.k.shape[3]:
    refuse(f'{heads} heads are no multiple of {x.k.shape[3]} key heads')
  if heads > 65535:
    refuse(f'{heads} heads are more than the 65535 of a grid')
  if not spec.scale > 0:
    refuse(f'the running maximum needs a positive scale, not {spec.scale}')
  if x.prefix is not None and residues > 1:
    refuse(f'a prefix needs one residue, not {residues}')


# --- Shared memory, registers and the ring -----------------------------------


def smem(shape: tuple[int, ...], dtype, *others: int) -> Any:
  """Tiles [..., rows, columns] in shared memory, as TMA and wgmma know them.

  The widest swizzle whose width divides the columns: 64 of them, 32 or 16.

  Args:
    *others: columns of the tiles that these are multiplied with, or their own
      rows if the product sums over them: all have to have the same swizzle.
  """
  columns = math.gcd(shape[-1], *others)
  for swizzle in (128, 64, 32):
    width = swizzle // jnp.dtype(dtype).itemsize
    if columns % width == 0:
      return plgpu.SMEM(
        shape,
        dtype,
        transforms=(
          plgpu.TilingTransform((8, width)),
          plgpu.SwizzleTransform(swizzle),
        ),
      )
  raise ValueError(f'{columns} columns are no multiple of {width}')


def shared_memory(scratch, reductions: bool = True) -> int:
  """Bytes that a program with these scratch types asks for.

  Args:
    reductions: whether it reduces along rows or columns.
  """
  sizes = [
    math.prod(y.shape) * jnp.dtype(y.dtype).itemsize
    for y in scratch
    if not isinstance(y, plgpu.Barrier)
  ]
  # Every buffer starts at a multiple of 1024; reductions need 2048 more.
  return sum(-(-size // 1024) * 1024 for size in sizes) + 2048 * reductions


def left_operand(x, buffer=None):
  """Values as the left operand of wgmma: as they are, or through a buffer."""
  if buffer is None:
    return x
  buffer[...] = x
  # Ordinary writes are visible to wgmma only after a fence.
  plgpu.commit_smem()
  return buffer


# Registers of a thread by number of compute warpgroups: memory, compute. Their
# sum over all warpgroups must not exceed what the launch got (3 * 168 = 504,
# 4 * 128 = 512), else the hardware waits for ever; nothing here checks it.
_REGISTERS = {1: None, 2: (24, 240), 3: (32, 160)}


def take_registers(config: GpuConfig) -> None:
  """Called first by each compute warpgroup."""
  if _REGISTERS[config.groups]:
    _, many = _REGISTERS[config.groups]
    plgpu.set_max_registers(many, action='increase')


def produce(
  config: GpuConfig,
  count,
  load: Callable[[Any, Any, Any], None],
  full,
  empty,
) -> None:
  """The memory warpgroup's part: keeps the ring full.

  Args:
    count: tiles to bring.
    load: given (j, slot, barrier), starts the copies of tile j to the slot.
    full, empty: barriers of the slots.
  """
  if _REGISTERS[config.groups]:
    few, _ = _REGISTERS[config.groups]
    plgpu.set_max_registers(few, action='decrease')

  def step(j, _):
    slot = lax.rem(j, config.stages)

    @pl.when(j >= config.stages)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    load(j, slot, full.at[slot])

  def drain(j, _):
    plgpu.barrier_wait(empty.at[lax.rem(j, config.stages)])

  lax.fori_loop(0, count, step, None)
  # Every phase of a barrier has to be observed.
  lax.fori_loop(jnp.maximum(count - config.stages, 0), count, drain, None)


# --- Intervals ---------------------------------------------------------------


class Interval(NamedTuple):
  """A row of `where` in registers, `begin` and `end` within the keys.

  Query row a sees key row b where -right <= a + shift - b <= left and
  begin <= b < end. `stated` has left, right, begin and end as they stand: the
  rows of prefix keys need not be among the keys.
  """

  left: jax.Array
  right: jax.Array
  shift: jax.Array
  begin: jax.Array
  end: jax.Array
  stated: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def interval(where, sequence, num_keys: int) -> Interval:
  """Reads the interval of a sequence from the reference `where`."""
  left, right, shift, begin, end = (
    where[sequence, column]
    for column in (
      contract.LEFT,
      contract.RIGHT,
      contract.SHIFT,
      contract.BEGIN,
      contract.END,
    )
  )
  stated = left, right, begin, end
  # Bounds beyond all rows and keys say no more, and sums with them overflow.
  far = contract.UNBOUNDED // 2
  left = jnp.clip(left, shift - num_keys, shift + far)
  right = jnp.clip(right, -shift - far, num_keys - shift)
  begin, end = jnp.maximum(begin, 0), jnp.minimum(end, num_keys)
  return Interval(left, right, shift, begin, end, stated)


def key_tiles(at: Interval, first_query, num_queries: int, walk: int):
  """(first tile, number) of the keys that these query rows can see."""
  first = first_query + at.shift - at.left
  last = first_query + num_queries - 1 + at.shift + at.right
  return _tiles(
    jnp.maximum(first, at.begin), jnp.minimum(last + 1, at.end), walk
  )


def query_tiles(
  at: Interval, first_key, num_keys: int, num_queries: int, walk: int
):
  """(first tile, number) of the queries that can see these key rows.

  Args:
    num_keys: of these rows.
    num_queries: of the sequence.
  """
  lo = jnp.maximum(first_key, at.begin)
  hi = jnp.minimum(first_key + num_keys, at.end)
  first = jnp.maximum(lo - at.shift - at.right, 0)
  end = jnp.minimum(hi - at.shift + at.left, num_queries)
  return _tiles(first, jnp.where(lo < hi, end, first), walk)


def _tiles(first, end, walk):
  """Tiles that hold the rows in [first, end), first >= 0."""
  start = lax.div(first, walk)
  count = lax.div(end + (walk - 1), walk) - start
  return start, jnp.where(end > first, count, 0)


# --- Who sees whom in a tile -------------------------------------------------


def wide(y, tile: tuple[int, int], axis: int):
  """A number for each row (axis 0) or column (1), as a tile."""
  return lax.broadcast_in_dim(y, tile, [axis])


def numbers(tile: tuple[int, int], axis: int):
  """The row (axis 0) or column (1) of each entry."""
  return plgpu.broadcasted_iota(jnp.int32, tile, axis, layout=TILE)


def mask_band(s, at: Interval, first_query, first_key, q_axis: int):
  """Logits [own, walk], -inf where the interval hides the key.

  Tiles that lie in it wholly, which are most of a long walk, are left as they
  are. A kernel short of registers compares the tile with `inside_tiles` and
  reads the interval again where it calls `mask_interval`.
  """
  num_queries, num_keys = s.shape if q_axis == 0 else s.shape[::-1]
  nearest = first_query + at.shift - first_key - (num_keys - 1)
  furthest = first_query + at.shift - first_key + (num_queries - 1)
  inside = (
    (nearest >= -at.right)
    & (furthest <= at.left)
    & (first_key >= at.begin)
    & (first_key + num_keys <= at.end)
  )
  return lax.cond(
    inside,
    lambda s: s,
    lambda s: mask_interval(s, at, first_query, first_key, q_axis),
    s,
  )


def inside_tiles(at: Interval, first_query, num_queries: int, walk: int):
  """(first, end) of the tiles of keys that all of these queries see wholly."""
  last_query = first_query + num_queries - 1
  begin = jnp.maximum(last_query + at.shift - at.left, at.begin)
  end = jnp.minimum(first_query + at.shift + at.right + 1, at.end)
  begin, end = jnp.maximum(begin, 0), jnp.maximum(end, 0)
  return lax.div(begin + (walk - 1), walk), lax.div(end, walk)


def mask_interval(s, at: Interval, first_query, first_key, q_axis: int):
  """`mask_band` for a tile that may be seen in part."""
  # What each row sees is an interval of columns: two numbers of a row, found
  # anew for each tile. Distances between rows and columns would be a tile that
  # is the same all along the walk, and would lie in registers all along.
  row = plgpu.broadcasted_iota(jnp.int32, s.shape[:1], 0, layout=ROW)
  if q_axis == 0:
    row = row + (first_query + at.shift - first_key)
    first = jnp.maximum(row - at.left, at.begin - first_key)
    last = jnp.minimum(row + at.right, at.end - first_key - 1)
  else:
    key = row + first_key
    row = key - (first_query + at.shift)
    exists = (key >= at.begin) & (key < at.end)
    first = row - at.right
    last = jnp.where(exists, row + at.left, -1)
  column = numbers(s.shape, 1)
  seen = (column >= wide(first, s.shape, 0)) & (
    column <= wide(last, s.shape, 0)
  )
  return jnp.where(seen, s, -jnp.inf)


def mask_prefix(s, at: Interval, first_query, row, q_axis: int, causal: bool):
  """Logits [own, walk] of prefix keys, -inf where they are not seen.

  Args:
    row: of each prefix key; see `contract.Prefix`.
  """
  row = wide(row, s.shape, 1 - q_axis)
  query = numbers(s.shape, q_axis) + (first_query + at.shift)
  distance = query - row
  left, right, begin, end = at.stated
  in_band = (
    (distance >= -right) & (distance <= left) & (row >= begin) & (row < end)
  )
  hidden = in_band | (row == contract.NOWHERE)
  if causal:
    hidden = hidden | (row > query)
  return jnp.where(hidden, -jnp.inf, s)


def mask_ids(s, q_ids, k_ids, q_axis: int):
  """Logits, -inf where the (encoded) ids of query and key differ."""
  q_ids = wide(q_ids, s.shape, q_axis)
  k_ids = wide(k_ids, s.shape, 1 - q_axis)
  return jnp.where(q_ids == k_ids, s, -jnp.inf)


def drop(p, spec: Spec, q_words, k_words, q_axis: int):
  """Zeros where dropout takes the weight; not scaled by 1 / (1 - rate)."""
  keep = dropout.keep(
    spec.dropout_rate,
    wide(q_words, p.shape, q_axis),
    wide(k_words, p.shape, 1 - q_axis),
  )
  return jnp.where(keep, p, 0.0)


def logits(spec: Spec, s):
  """(logits, factor, slope) of products q . k.

  Logits times the scalar factor are in units of log 2. The slope, d logit / d
  (scale * product), is None without a soft cap.
  """
  if spec.soft_cap is None:
    return s, spec.scale * LOG2E, None
  # tanh(y) = 1 - 2 / (1 + e^2y), to 21 bits: the approximate tanh of the
  # hardware has 11. A reciprocal as a squared rsqrt is one instruction where a
  # division is many.
  t = jnp.exp2(s * (2 * spec.scale * LOG2E / spec.soft_cap))
  root = lax.rsqrt(t + 1.0)
  t = 1.0 - 2.0 * (root * root)
  return t, spec.soft_cap * LOG2E, 1.0 - t * t


# --- What is known of each query and key -------------------------------------


def pad_rows(y, axis: int, multiple: int, value=0):
  """Pads an axis to a multiple."""
  missing = -y.shape[axis] % multiple
  if not missing:
    return y
  widths = [(0, 0)] * y.ndim
  widths[axis] = (0, missing)
  return jnp.pad(y, widths, constant_values=value)


class Notes(NamedTuple):
  """For each row, padded: ids, encoded so that equal ones see each other, and
  dropout's words. None where there is no such feature.

  Of keys [G, R, S]; of prefix keys [G, M]; of queries ids are [G, R, P] and
  words [G, C, H, P].
  """

  ids: jax.Array | None
  words: jax.Array | None


def query_notes(spec: Spec, x: Operands, multiple: int) -> Notes:
  """Notes of the queries, their number padded to a multiple."""
  ids = words = None
  _, num_queries, residues, heads, _ = x.q.shape
  if x.q_ids is not None:
    ids = jnp.where(x.q_ids < 0, -1, x.q_ids).swapaxes(1, 2)
    ids = pad_rows(ids, 2, multiple, -1)
  if spec.dropout_rate:
    if spec.residues is None:
      residue = np.arange(residues)[:, None, None]
    else:
      residue = np.asarray(spec.residues)[:, None]
    row = np.arange(num_queries) * residues + residue
    words = dropout.query_words(
      x.seed,
      _column(x, contract.BATCH_ROW, 4),
      _column(x, contract.FIRST_HEAD, 4) + np.arange(heads)[:, None],
      _column(x, contract.Q_POSITION, 4) + row,
    )
    words = pad_rows(words, 3, multiple)
  return Notes(ids, words)


def key_notes(spec: Spec, x: Operands, multiple: int) -> Notes:
  """Notes of the keys, their number padded to a multiple."""
  ids = words = None
  _, num_keys, residues, _, _ = x.k.shape
  if x.k_ids is not None:
    ids = jnp.where(x.k_ids < 0, -2, x.k_ids).swapaxes(1, 2)
    ids = pad_rows(ids, 2, multiple, -2)
  if spec.dropout_rate:
    row = np.arange(num_keys) * residues + np.arange(residues)[:, None]
    position = _column(x, contract.K_POSITION, 3) + row
    words = pad_rows(dropout.key_words(x.seed, position), 2, multiple)
  return Notes(ids, words)


def prefix_notes(spec: Spec, x: Operands, multiple: int):
  """(rows [G, M], notes) of the prefix keys, padded to a multiple."""
  m = x.prefix
  ids = words = None
  if m.ids is not None:
    ids = pad_rows(jnp.where(m.ids < 0, -2, m.ids), 1, multiple, -2)
  if spec.dropout_rate:
    position = _column(x, contract.K_POSITION, 2) + m.row
    words = pad_rows(dropout.key_words(x.seed, position), 1, multiple)
  return pad_rows(m.row, 1, multiple, contract.NOWHERE), Notes(ids, words)


def _column(x, number, rank):
  return x.where[:, number].reshape(-1, *[1] * (rank - 1))
