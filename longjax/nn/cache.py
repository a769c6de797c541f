"""Key-value caches for streaming: as large as what a pattern can still see.

A `LayerCache` keeps keys and their values in a fixed number of slots per row,
each with the absolute position it holds (-1: empty). The first `start`
positions have slots of their own and are kept for ever (the start keys of
`Lambda`); all later ones share a ring in which a key is overwritten by the
one that follows it `ring` positions later. Attention is told the positions, so
the order of the slots does not matter. Keys are kept un-rotated, and rotated
for each query: what a pattern such as `Lambda` tells of a key's distance
changes. Where it always tells the true one (windows, `Full`), RoPE's rotation
is done once, before a key is kept.

| pattern | start slots | ring slots |
|---|---|---|
| SlidingWindow(left, dilation=d) | 0 | left * max(d) + 1 |
| Lambda(window, start) | start | window |
| Full, SelfExtend, an unbounded window | 0 | `max_length` |

`Dilated` has caches of its own, thinned as its keys are: `dilated_cache`. They
serve as many positions as a ring of max(segment_lengths) would.

A layer with `MiddleKeys` keeps `max_length` positions as well: any earlier key
may be chosen.

With `max_length` no layer keeps more slots than that. A cache in which some
layer was cut short that way (always so for the last row of the table) ends
after `max_length` positions; any other goes on for as long as rotations are
exact, for 2**30 positions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from longjax.nn.dilated_cache import DilatedCache, init_dilated_cache
from longjax.ops.attention import attention
from longjax.ops.merge import merge
from longjax.ops.middle import MiddleKeys, attend_middle
from longjax.patterns import TRUE_DISTANCE, Dilated, Lambda, Pattern
from longjax.positions import RoPE
from longjax.sharding import shards

# Positions are int32, and rotations exact up to here.
LAST_LIMIT = 2**30


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['keys', 'values', 'positions', 'relative'],
  meta_fields=['start', 'middle'],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """The cache of one attention layer.

  Attributes:
    keys, values: [batch, slots, kv_heads, head_dim].
    positions: int32 [batch, slots], absolute; -1 where a slot is empty.
    relative: the layer's projected Transformer-XL embeddings
      [distances, heads, head_dim], so that a step need not project them
      again; None for other position schemes.
    start: how many of the slots belong to the first positions.
    middle: the layer's top-k middle keys, if any.
  """

  keys: jax.Array
  values: jax.Array
  positions: jax.Array
  relative: jax.Array | None
  start: int
  middle: MiddleKeys | None = None

  def append(self, keys, values, positions) -> 'LayerCache':
    """Writes a chunk [batch, T, ...]; tokens at negative positions are not."""
    batch, slots = self.positions.shape
    ring = slots - self.start
    newest = jnp.max(positions, axis=1, keepdims=True)
    kept = positions >= 0
    if ring:
      in_ring = self.start + (positions - self.start) % ring
      slot = jnp.where(positions < self.start, positions, in_ring)
      # Of a chunk longer than the ring only the end stays: without this, two
      # tokens would be written to one slot, in no particular order.
      kept &= (positions < self.start) | (positions > newest - ring)
    else:
      slot = positions
    slot = jnp.where(kept, slot, slots)  # out of bounds: dropped
    rows = jnp.arange(batch)[:, None]

    def write(old, new):
      return old.at[rows, slot].set(new.astype(old.dtype), mode='drop')

    return dataclasses.replace(
      self,
      keys=write(self.keys, keys),
      values=write(self.values, values),
      positions=write(self.positions, positions),
    )

  def extend(self, keys, values, positions):
    """Appends a chunk; also returns what its queries attend to.

    Args:
      keys, values: [batch, T, kv_heads, head_dim].
      positions: int32 [batch, T], negative for padding.

    Returns:
      (new cache, keys [batch, S, ...], values, positions [batch, S]).
    """
    after = self.append(keys, values, positions)
    if positions.shape[1] == 1:
      # A single query no longer sees what its own key overwrites. XLA must not
      # write it a second time, into a copy of the cache, for attention's sake.
      after = jax.lax.optimization_barrier(after)
      return after, after.keys, after.values, after.positions
    return (
      after,
      jnp.concatenate([self.keys, keys.astype(self.keys.dtype)], 1),
      jnp.concatenate([self.values, values.astype(self.values.dtype)], 1),
      jnp.concatenate([self.positions, positions], 1),
    )

  def filled(self, k, v, *, pattern, position, num_heads) -> 'LayerCache':
    """An empty cache after a text that is split over devices.

    Only the rows that it keeps travel, to all of them.

    Args:
      k, v: [batch, length, kv_heads, head_dim], the rows here.
      pattern, position, num_heads: of the layer.
    """
    batch, here = k.shape[:2]
    length, (_, slots) = shards.whole_length(here), self.positions.shape
    if self.middle is None and _rotates_once(pattern, position, num_heads):
      own = shards.first_position(here) + jnp.arange(here)
      k = position.rotate(k, own[None, :, None])
    start = min(self.start, length)
    recent = max(start, length - (slots - self.start))
    kept = np.r_[:start, recent:length].astype(np.int32)
    positions = jnp.broadcast_to(kept, (batch, len(kept)))
    return self.append(
      *(shards.rows_at(x, positions, same=True) for x in (k, v)), positions
    )

  def attend(self, q, k, v, positions, *, pattern, position, implementation):
    """Appends a chunk, whose queries see it and what is still in the cache.

    Args:
      q: [batch, T, heads, head_dim]; k, v: [batch, T, kv_heads, head_dim].
      positions: int32 [batch, T], consecutive but for padding (negative).
      pattern, position, implementation: of `longjax.attention`.

    Returns:
      (out [batch, T, heads, head_dim], new cache).
    """
    if self.middle is None and _rotates_once(pattern, position, q.shape[2]):
      q, k = (position.rotate(x, positions[:, :, None]) for x in (q, k))
      position = None
    cache, k, v, kv_positions = self.extend(k, v, positions)
    out, lse = attention(
      q,
      k,
      v,
      pattern,
      position=position,
      q_positions=positions,
      kv_positions=kv_positions,
      implementation=implementation,
      return_lse=True,
    )
    if self.middle is not None and q.shape[1] == 1:
      more = attend_middle(
        q, k, v, positions, kv_positions, pattern, self.middle, position
      )
      out, _ = merge([(out.astype(jnp.float32), lse), more])
      out = out.astype(q.dtype)
    return out, cache


def _rotates_once(pattern: Pattern, position, num_heads: int) -> bool:
  """Whether a key's rotation is the same for every query."""
  return isinstance(position, RoPE) and all(
    branch.distance == TRUE_DISTANCE for branch in pattern.branches(num_heads)
  )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['layers', 'lengths'],
  meta_fields=['limit'],
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """The cache of a decoder.

  Attributes:
    layers: one `LayerCache` or `DilatedCache` per layer.
    lengths: int32 [batch], how many tokens each row has seen.
    limit: how many tokens a row may have; None for 2**30.
  """

  layers: tuple[LayerCache | DilatedCache, ...]
  lengths: jax.Array
  limit: int | None

  def next_positions(self, valid):
    """Positions of a chunk's tokens and the lengths after it.

    Args:
      valid: bool [batch, T], False for padding, which may stand anywhere.

    Returns:
      (positions int32 [batch, T], -1 for padding; lengths int32 [batch]).

    Raises:
      ValueError: past `limit`. Inside `jax.jit`, where lengths are not known,
        the caller has to mark such rows (`overflowed`).
    """
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.where(valid, self.lengths[:, None] + count - 1, -1)
    lengths = self.lengths + count[:, -1]
    if not isinstance(lengths, jax.core.Tracer):
      longest = int(lengths.max())
      if self.limit is None and longest > LAST_LIMIT:
        raise ValueError(
          f'a row now has {longest} tokens, positions go to {LAST_LIMIT} only'
        )
      if self.limit is not None and longest > self.limit:
        raise ValueError(
          f'the cache holds max_length={self.limit} positions, but a row now '
          f'has {longest}: call init_cache with a larger max_length'
        )
    return positions, lengths

  def overflowed(self, lengths):
    """bool [batch]: rows of a length that the cache cannot serve."""
    return lengths > (LAST_LIMIT if self.limit is None else self.limit)


def layout(
  pattern: Pattern,
  num_heads: int,
  max_length: int | None = None,
  middle: MiddleKeys | None = None,
) -> tuple[int, int, int | None]:
  """Slots for one layer: (start, ring, limit); see the module's table.

  Raises:
    ValueError: for a pattern that keeps every key, without `max_length`; for
      one that is not causal; and for middle keys of another than `Lambda`.
  """
  if not pattern.causal:
    raise ValueError(f'{pattern} is not causal: it cannot be streamed')
  if max_length is not None and max_length < 1:
    raise ValueError(f'max_length must be at least 1, got {max_length}')
  if middle is not None:
    if not isinstance(pattern, Lambda):
      raise ValueError(f'MiddleKeys go with Lambda, not with {pattern}')
    if max_length is None:
      raise ValueError(
        f'{middle} may choose any earlier key, so none can be evicted: '
        'init_cache needs max_length, the number of positions to keep'
      )
    return 0, max_length, max_length
  start = max(
    (b.start for b in pattern.branches(num_heads) if b.start != math.inf),
    default=0,
  )
  ring = pattern.reach()[0] + 1
  if max_length is not None and start + ring > max_length:
    start = min(start, max_length)
    return start, max_length - start, max_length
  if ring == math.inf:
    raise ValueError(
      f'{pattern} sees every earlier key: init_cache needs max_length, the '
      'number of positions to keep'
    )
  return start, int(ring), None


def init_layer_cache(
  pattern: Pattern,
  *,
  batch_size: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_length: int | None = None,
  relative: jax.Array | None = None,
  middle: MiddleKeys | None = None,
  dtype=jnp.float32,
) -> LayerCache | DilatedCache:
  """An empty cache for one layer."""
  start, ring, _ = layout(pattern, num_heads, max_length, middle)
  if isinstance(pattern, Dilated):
    return init_dilated_cache(
      pattern,
      batch_size=batch_size,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      max_length=max_length,
      relative=relative,
      dtype=dtype,
    )
  shape = (batch_size, start + ring, num_kv_heads, head_dim)
  return LayerCache(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    positions=jnp.full(shape[:2], -1, jnp.int32),
    relative=relative,
    start=start,
    middle=middle,
  )
