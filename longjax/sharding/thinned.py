"""LongNet's segments longer than a shard (arXiv 2307.02486, section 3.1).

The devices that share a segment gather its keys and values, thinned first: of
every `ratio` rows a head sends the one that it keeps. Queries stay where they
are, and see by position, their own device's keys included. What is gathered
has segment / ratio rows whatever the sequence's length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from longjax.patterns import Branch, StridedDistance
from longjax.sharding import exchange
from longjax.sharding.calls import Rows, Shard
from longjax.sharding.parts import Branches


def refusal(shard: Shard, branch: Branch) -> str | None:
  """Why a segment cannot be gathered thinned; None if it can."""
  length, whole = shard.length, shard.length * shard.devices
  segment, ratio = branch.segment, branch.stride
  if shard.start is None or shard.start % segment:
    return (
      f'segments of {segment} need to begin where the sequence does, at a '
      'position known to be a multiple of it'
    )
  one = segment >= whole
  if not one and (segment % length or shard.devices % (segment // length)):
    return (
      f'segments of {segment} are no whole number of shards of {length} that '
      f'divides the {shard.devices} devices'
    )
  if length % ratio or (not one and segment % ratio):
    return (
      f'the ratio {ratio} does not divide shards of {length} and segments of '
      f'{segment}'
    )
  if shard.options.dropout_rate:
    return 'dropout names keys by their positions, which thinned rows lack'
  return None


def thinned_attention(shard: Shard, pattern, branch: Branch):
  """(out, lse) of the shard's rows that the branch keeps; 0, -inf elsewhere."""
  q, k, v = shard.rows.x
  heads, ratio = q.shape[2], branch.stride
  offsets = np.asarray(branch.offsets or (0,) * heads)
  group = min(shard.devices, max(1, branch.segment // shard.length))
  repeats = heads // k.shape[2]
  # Heads of one kv head may keep different rows of it.
  if (offsets.reshape(-1, repeats) != offsets[::repeats, None]).any():
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    repeats = 1
  keys = tuple(
    exchange.gather_group(
      _thin(x, ratio, offsets[::repeats]), group, shard.axis_name
    )
    for x in (k, v)
  )
  queries = _thin(q, ratio, offsets)
  place = jax.lax.axis_index(shard.axis_name) % group
  # Rows are numbered in the segment; what is told of them are their distances.
  numbered = Branch(
    left=branch.left,
    right=branch.right,
    segment=group * queries.shape[1],
    distance=StridedDistance(ratio),
  )
  out, lse = shard.attend(
    Branches((numbered,), pattern),
    Rows((queries,), place * queries.shape[1]),
    Rows(keys, jnp.int32(0)),
  )
  return _spread(out, ratio, offsets, 0), _spread(lse, ratio, offsets, -jnp.inf)


def _thin(x, ratio, offsets):
  """[B, T, H, D] -> [B, T / ratio, H, D]: each head's row of every `ratio`."""
  if ratio == 1:
    return x
  batch, length, heads, size = x.shape
  x = x.reshape(batch, length // ratio, ratio, heads, size)
  # A sum of one term: its transpose is no scatter.
  kept = np.arange(ratio)[:, None] == offsets
  return jnp.where(kept[..., None], x, 0).sum(2, dtype=x.dtype)


def _spread(y, ratio, offsets, fill):
  """[B, T / ratio, H, ...] -> [B, T, H, ...], `fill` where a head has none."""
  if ratio == 1:
    return y
  kept = np.arange(ratio)[:, None] == offsets
  kept = kept.reshape(kept.shape + (1,) * (y.ndim - 3))
  y = jnp.where(kept, y[:, :, None], jnp.asarray(fill, y.dtype))
  return y.reshape(len(y), -1, *y.shape[3:])


def is_local(shard: Shard, branch: Branch) -> bool:
  """Whether every segment lies within a shard."""
  return (
    branch.segment != math.inf
    and not branch.earlier
    and not shard.length % branch.segment
    and shard.start is not None
    and not shard.start % branch.segment
  )


def is_plain(branch: Branch) -> bool:
  """Whether the branch is a segment and its thinning, and nothing else."""
  plain = dataclasses.replace(
    branch, segment=math.inf, stride=1, offsets=None, right=math.inf
  )
  right = branch.right in (0, math.inf)
  return plain == Branch() and right and branch.segment != math.inf
