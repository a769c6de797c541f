"""Who sees whom, in the GPU kernels: tiles to walk, and logits of a tile.

A tile of logits is [own, walk]. `q_axis` says along which of its axes the
queries lie: 0 going forward and for dQ, 1 for dK and dV, which work on the
transposed tile so that its products need no transposed left operand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops import dropout
from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Spec
from longjax.ops.pallas.mosaic_gpu_common import LOG2E, ROW, TILE

# --- Tiles to walk ------------------------------------------------------------


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


# --- Logits of a tile ---------------------------------------------------------


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
