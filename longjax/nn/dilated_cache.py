"""The key-value cache of LongNet: of each segment, only the rows heads keep.

In one pattern (w, r) of `Dilated` a head keeps every r-th row of a segment of
w positions, as queries and as keys, and no query sees another segment. So a
`DilatedCache` holds, for each pattern, the keys and values of the segment that
is being written, thinned for each head: ceil(w / r) rows. Row m of a head with
offset s is position (start of the segment) + m r + s; rows not written yet, or
left over from the segment before, would be ahead of every query.

A single query takes part only in the heads whose offset is its own residue, so
a step costs (w / r) keys for each of about H / r heads, wherever it is: LongNet
(arXiv 2307.02486) says nothing of decoding; this follows from its equations 3-5
and 13-15.

Within a head distances are whole multiples of r. Attention is told the position
of a row without the head's offset, m r, which is the same for all heads and
leaves the distances as they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longjax.ops.attention import attention
from longjax.ops.merge import merge
from longjax.patterns import Dilated


@dataclasses.dataclass(frozen=True)
class Thinning:
  """Which rows one (w, r) of a pattern keeps, of which heads.

  A stream is what is kept once for all query heads that share it: the rows of
  one kv head at one offset.

  Attributes:
    segment, ratio: w and r.
    offsets: of every query head.
    kv_heads: how many there are; they divide the query heads.
    slots: rows held of each stream.
  """

  segment: int
  ratio: int
  offsets: tuple[int, ...]
  kv_heads: int
  slots: int

  @property
  def num_heads(self) -> int:
    return len(self.offsets)

  @property
  def per_segment(self) -> int:
    return -(-self.segment // self.ratio)

  @functools.cached_property
  def _pairs(self):
    """(kv head and offset of each stream [streams, 2], stream of each head)."""
    group = self.num_heads // self.kv_heads
    pairs = [(j // group, s) for j, s in enumerate(self.offsets)]
    streams, of_head = np.unique(pairs, axis=0, return_inverse=True)
    return streams, of_head.reshape(-1)

  @property
  def stream_kv_heads(self) -> np.ndarray:
    return self._pairs[0][:, 0]

  @property
  def stream_offsets(self) -> np.ndarray:
    return self._pairs[0][:, 1]

  @property
  def head_streams(self) -> np.ndarray:
    return self._pairs[1]

  @functools.cached_property
  def heads_at(self) -> np.ndarray:
    """[ratio, most] the heads of each offset, -1 where there are no more."""
    heads = [[] for _ in range(self.ratio)]
    for head, offset in enumerate(self.offsets):
      heads[offset].append(head)
    most = max(map(len, heads))
    return np.array([row + [-1] * (most - len(row)) for row in heads], np.int32)

  @property
  def rows_pattern(self) -> Dilated:
    """Who sees whom among the rows of one head."""
    return Dilated((self.segment,), (1,))

  def row_number(self, position):
    """Rows are counted on from segment to segment."""
    within = position % self.segment // self.ratio
    return position // self.segment * self.per_segment + within

  def row_position(self, number):
    """Where a row is, but for the head's offset."""
    segment, row = number // self.per_segment, number % self.per_segment
    return segment * self.segment + row * self.ratio

  def keeps(self, positions, offsets):
    """[T], [N] -> bool [T, N]: who keeps which; padding (negative) nobody."""
    residue = positions % self.segment % self.ratio
    return (positions >= 0)[:, None] & (residue[:, None] == offsets)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['keys', 'values'],
  meta_fields=['thinning'],
)
@dataclasses.dataclass(frozen=True)
class SegmentCache:
  """The rows of one (w, r).

  Attributes:
    keys, values: [batch, streams, slots, head_dim], un-rotated.
    thinning: which rows.
  """

  keys: jax.Array
  values: jax.Array
  thinning: Thinning

  def attend(self, q, k, v, positions, attend):
    """Appends a chunk, whose queries see it and what was there before.

    Args:
      q: [batch, T, heads, head_dim]; k, v: [batch, T, kv_heads, head_dim].
      positions: int32 [batch, T], consecutive but for padding (negative).
      attend: `attention` but for arrays, positions and pattern; takes which
        heads it is given (None for all).

    Returns:
      ((out [batch, T, heads, head_dim], lse [batch, T, heads]), new cache).
    """
    rows = functools.partial(_append, self.thinning)
    keys, values = jax.vmap(rows)(self.keys, self.values, k, v, positions)
    after = dataclasses.replace(self, keys=keys, values=values)
    if q.shape[1] == 1:
      run = functools.partial(_one_query, self.thinning, attend)
      part = jax.vmap(run)(q, keys, values, positions)
    else:
      run = functools.partial(_chunk, self.thinning, attend)
      part = jax.vmap(run)(q, k, v, self.keys, self.values, positions)
    return part, after


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['segments', 'relative'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DilatedCache:
  """The cache of one attention layer with a `Dilated` pattern.

  Attributes:
    segments: a `SegmentCache` for each (w, r).
    relative: as in `longjax.nn.cache.LayerCache`.
  """

  segments: tuple[SegmentCache, ...]
  relative: jax.Array | None

  def attend(self, q, k, v, positions, *, pattern, position, implementation):
    """Appends a chunk and attends; see `longjax.nn.cache.LayerCache.attend`."""
    del pattern  # The segments know theirs.
    num_heads = q.shape[2]

    def run(*arrays, heads, **more):
      scheme = position
      if position is not None and heads is not None:
        scheme = position.of_heads(heads, num_heads)
      return attention(
        *arrays,
        position=scheme,
        implementation=implementation,
        return_lse=True,
        **more,
      )

    parts, segments = zip(
      *(x.attend(q, k, v, positions, run) for x in self.segments), strict=True
    )
    out, _ = merge([(out.astype(jnp.float32), lse) for out, lse in parts])
    return out.astype(q.dtype), DilatedCache(segments, self.relative)


def init_dilated_cache(
  pattern: Dilated,
  *,
  batch_size: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_length: int | None = None,
  relative: jax.Array | None = None,
  dtype=jnp.float32,
) -> DilatedCache:
  """An empty cache for one layer; `max_length` as in `longjax.nn.cache`."""

  def make(segment, ratio):
    held = segment if max_length is None else min(segment, max_length)
    thinning = Thinning(
      segment,
      ratio,
      pattern.head_offsets(ratio, num_heads),
      num_kv_heads,
      slots=-(-held // ratio),
    )
    streams = len(thinning.stream_offsets)
    shape = batch_size, streams, thinning.slots, head_dim
    # An array each: a caller may give both away to be written in place.
    return SegmentCache(
      jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), thinning
    )

  sizes = zip(pattern.segment_lengths, pattern.ratios, strict=True)
  return DilatedCache(tuple(make(*size) for size in sizes), relative)


# --- One row of the batch ----------------------------------------------------


def _append(thinning, keys, values, k, v, positions):
  """Writes what a chunk [T, kv_heads, D] leaves of its last segment."""
  segment = positions // thinning.segment
  kept = thinning.keeps(positions, thinning.stream_offsets)
  kept = kept & (segment == segment.max())[:, None]
  row = positions % thinning.segment // thinning.ratio
  row = jnp.where(kept, row[:, None], thinning.slots)
  return tuple(
    _put(old, row, new[:, thinning.stream_kv_heads])
    for old, new in ((keys, k), (values, v))
  )


def _put(rows, index, new):
  """rows [N, R, D] with new [T, N, D] at index [T, N]; R is nowhere."""
  stream = np.arange(len(rows))
  return rows.at[stream, index].set(new.astype(rows.dtype), mode='drop')


def _one_query(thinning, attend, q, keys, values, positions):
  """q [1, H, D] at positions [1] against keys [streams, slots, D].

  Only the heads that keep the position are computed.
  """
  (position,) = positions
  everyone = thinning.ratio == 1
  if everyone:
    heads = mine = None
  else:
    heads = jnp.asarray(thinning.heads_at)[
      position % thinning.segment % thinning.ratio
    ]
    mine = jnp.maximum(heads, 0)
    streams = jnp.asarray(thinning.head_streams)[mine]
    q, keys, values = q[:, mine], keys[streams], values[streams]
  number = thinning.row_number(position)
  first = number - number % thinning.per_segment
  told = thinning.row_position(number)
  out, lse = attend(
    q[None],
    keys.swapaxes(0, 1)[None],
    values.swapaxes(0, 1)[None],
    thinning.rows_pattern,
    q_positions=jnp.where(position < 0, -1, told)[None, None],
    kv_positions=thinning.row_position(
      first + jnp.arange(thinning.slots, dtype=jnp.int32)
    )[None],
    heads=mine,
  )
  if everyone:
    return out[0], lse[0]
  where = jnp.where(heads < 0, thinning.num_heads, heads)
  shape = (1, thinning.num_heads)
  return (
    jnp.zeros((*shape, out.shape[-1]), out.dtype)
    .at[:, where]
    .set(out[0], mode='drop'),
    jnp.full(shape, -jnp.inf, lse.dtype).at[:, where].set(lse[0], mode='drop'),
  )


def _chunk(thinning, attend, q, k, v, keys, values, positions):
  """q [T, H, D], k, v [T, K, D] after keys, values [streams, slots, D].

  Queries and keys are moved together, to the rows of each head.
  """
  length = len(positions)
  # Neighbours are at most one row apart, and each segment may begin a row.
  rows = min(
    length,
    (length - 1) // thinning.ratio + (length - 1) // thinning.segment + 3,
  )
  valid = positions >= 0
  first = jnp.where(valid, positions, jnp.iinfo(jnp.int32).max).min()
  first = thinning.row_number(jnp.where(valid.any(), first, 0))
  start = first - first % thinning.per_segment  # of the first token's segment
  number = thinning.row_number(positions)[:, None]
  room = thinning.slots + rows - 1

  kept = thinning.keeps(positions, thinning.stream_offsets)
  index = jnp.where(kept, number - start, room)

  def with_new(old, new):
    *_, size = new.shape
    window = jnp.zeros((len(old), room, size), new.dtype)
    window = window.at[:, : thinning.slots].set(old.astype(new.dtype))
    window = _put(window, index, new[:, thinning.stream_kv_heads])
    if thinning.ratio > 1:
      window = window[thinning.head_streams]
    return window.swapaxes(0, 1)[None]

  kept = thinning.keeps(positions, np.asarray(thinning.offsets))
  index_q = jnp.where(kept, number - first, rows)
  q_rows = jnp.zeros((thinning.num_heads, rows, q.shape[-1]), q.dtype)
  q_rows = _put(q_rows, index_q, q)
  steps = functools.partial(jnp.arange, dtype=jnp.int32)
  out, lse = attend(
    q_rows.swapaxes(0, 1)[None],
    with_new(keys, k),
    with_new(values, v),
    thinning.rows_pattern,
    q_positions=thinning.row_position(first + steps(rows))[None],
    kv_positions=thinning.row_position(start + steps(room))[None],
    heads=None,
  )
  heads = np.arange(thinning.num_heads)
  index_q = jnp.minimum(index_q, rows - 1)
  return (
    jnp.where(kept[..., None], out[0, index_q, heads], 0),
    jnp.where(kept, lse[0, index_q, heads], -jnp.inf),
  )
