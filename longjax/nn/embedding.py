"""Token and position embeddings, and the dropout that is applied to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longjax.ops.coordinates import locate
from longjax.ops.dropout import keep_mask, seed_of
from longjax.patterns import Pattern
from longjax.positions import sinusoidal
from longjax.sharding import shards


def fold_in(key, site: int):
  """The dropout key of one site (a layer, a sub-layer); None stays None."""
  return None if key is None else jax.random.fold_in(key, site)


def dropout(x, rate: float, key, site: int = 0):
  """Zeroes entries with probability `rate` and scales the rest by 1/(1-rate).

  Which ones is a hash of the key, the batch row, the position and the feature,
  so that shards and pieces of x lose what x would lose.

  Args:
    x: [batch, features] or [batch, length, features].
    key: None (evaluation) for x itself, as at rate 0.
    site: among those that use one key.
  """
  if key is None or not rate:
    return x
  batch, *length, features = x.shape
  rows, position = shards.first_row(batch) + jnp.arange(batch)[:, None], 0
  if length:
    position = shards.first_position(*length) + jnp.arange(*length)[:, None]
    rows = rows[..., None]
  kept = keep_mask(
    seed_of(fold_in(key, site)), rate, rows, 0, position, jnp.arange(features)
  )
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def check_rate(name: str, rate: float):
  if not 0 <= rate < 1:
    raise ValueError(f'{name} must be in [0, 1), got {rate}')


def token_positions(first, length: int, segment_ids=None):
  """Position of each token in its own segment, int32 [batch or 1, length].

  As `longjax.attention` counts them: from the first token of the segment.
  Padding gets 0.

  Args:
    first: absolute position of the (whole) sequence's first token, an int or
      int [batch].
    length: how many tokens.
    segment_ids: int [batch, length], or None for one segment.

  Raises:
    NotImplementedError: with segment_ids, where the sequence is split: another
      device may hold the first token of a segment.
  """
  if segment_ids is not None and shards.sequence_axis() is not None:
    raise NotImplementedError(
      'segment_ids with positions that are added to the embeddings, where the '
      'sequence is split over devices: another may hold where a segment begins'
    )
  first = first + shards.first_position(length)
  segments = None if segment_ids is None else (segment_ids, segment_ids)
  located = locate(length, length, first, first, segments)
  return jnp.maximum(located.q_pos, 0)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['content_bias', 'position_bias', 'embeddings'],
  meta_fields=['min_distance', 'span'],
)
@dataclasses.dataclass(frozen=True)
class RelativeEmbedding:
  """What all layers share of Transformer-XL's relative positions.

  Attributes:
    content_bias, position_bias: u and v [heads, head_dim], added to the query
      where it meets the key and where it meets the position.
    embeddings: [distances, features] of distances min_distance and up.
    min_distance: distance of the first row.
    span: the largest true distance that can occur.
  """

  content_bias: jax.Array
  position_bias: jax.Array
  embeddings: jax.Array
  min_distance: int
  span: int

  def rows(self, first: int, last: int):
    """Embeddings of the distances first ... last [last - first + 1, F]."""
    start = first - self.min_distance
    return self.embeddings[start : last - self.min_distance + 1]


def distances(pattern: Pattern, num_heads: int, span: int) -> tuple[int, int]:
  """Smallest and largest distance that a pattern tells the position scheme.

  Args:
    pattern: who sees whom.
    num_heads: how many heads there are.
    span: the largest true distance that can occur (length - 1).
  """

  def furthest(branch):
    seen = min(branch.steps()[0] * branch.stride, span)
    return int(branch.distance.largest(seen))

  right = int(min(pattern.reach()[1], span))
  return -right, max(map(furthest, pattern.branches(num_heads)))


def relative_embedding(
  content_bias,
  position_bias,
  patterns,
  num_heads: int,
  features: int,
  span: int,
  dtype=jnp.float32,
) -> RelativeEmbedding:
  """The sinusoids of every distance that some of `patterns` tells."""
  bounds = [distances(pattern, num_heads, span) for pattern in patterns]
  first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
  embeddings = sinusoidal(jnp.arange(first, last + 1), features)
  return RelativeEmbedding(
    content_bias, position_bias, embeddings.astype(dtype), first, span
  )
