"""`longjax.attention` with the sequence split over a mesh axis.

A pattern's branches say what must travel. Branches that see near keys get them
from the neighbours (`halo`); start keys and global keys are few rows that
everyone gets; of a LongNet segment longer than a shard, the devices that share
it gather the thinned keys; what sees the whole sequence goes around a ring.
Each of these is one call of `longjax.attention` on one device, at the absolute
positions of its rows, and their results are merged. So no path but
`all_to_all` ever holds the sequence, and none changes a result.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.ops.merge import merge
from longjax.patterns import TRUE_DISTANCE, Branch, Pattern
from longjax.positions import Position
from longjax.sharding import exchange, thinned
from longjax.sharding.calls import Dropout, Options, Rows, Shard
from longjax.sharding.parts import Branches, GlobalsOnly
from longjax.sharding.ring import ring_attention


def sharded_attention(
  q: Float[Array, 'B T H D'],
  k: Float[Array, 'B T K D'],
  v: Float[Array, 'B T K E'],
  pattern: Pattern,
  *,
  axis_name: str,
  position: Position | None = None,
  positions: int | Int[Array, ''] | Int[Array, 'B'] = 0,
  global_tokens: Int[Array, 'B G'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  dropout_rate: float = 0.0,
  dropout_key: Array | None = None,
  dropout_row: int | Int[Array, ''] = 0,
  scale: float | None = None,
  logit_soft_cap: float | None = None,
  implementation: str | Sequence[str] | None = None,
  return_lse: bool = False,
):
  """Self-attention of a sequence that `axis_name` shards; inside `shard_map`.

  Equals `longjax.attention` on the whole sequence, outputs and gradients.

  Args:
    q, k, v: the shard, [batch, length, heads, head size]: neighbouring rows,
      equally many on every device of the axis, in order.
    axis_name: the mesh axis along which the sequence lies.
    positions: absolute position of the whole sequence's first row.
    global_tokens: absolute positions, the same on every device.
    segment_ids: of the shard's rows.
    pattern, position, dropout_rate, dropout_key, dropout_row, scale,
      logit_soft_cap, implementation, return_lse: as for `longjax.attention`;
      the same on every device of the axis.

  Raises:
    ValueError: as `longjax.attention`.
    NotImplementedError: a combination that cannot be split this way, with the
      reason.
  """
  if q.shape[:2] != k.shape[:2]:
    raise ValueError(
      'sharded_attention is self-attention: q and k must have as many rows, '
      f'got {q.shape} and {k.shape}'
    )
  if np.ndim(positions) > 1:
    raise ValueError(
      'sharded_attention takes the position of the first row, shared or per '
      f'batch row, got shape {np.shape(positions)}'
    )
  if implementation is not None and not isinstance(implementation, str):
    implementation = tuple(implementation)
  dropout = Dropout(dropout_key, dropout_row)
  options = Options(dropout_rate, scale, logit_soft_cap, implementation)
  position = exchange.varying(position, axis_name)
  length = q.shape[1]
  first = jnp.asarray(positions, jnp.int32)
  first = first + jax.lax.axis_index(axis_name) * length
  rows = Rows((q, k, v), first, segment_ids)
  shard = Shard(
    options,
    axis_name,
    rows,
    position,
    dropout,
    start=positions if isinstance(positions, int) else None,
  )
  parts = _assign(shard, pattern.branches(q.shape[2]))
  results = []
  if parts.near:
    results.append(_near(shard, pattern, parts.near))
  results += [_start(shard, pattern, branch) for branch in parts.start]
  results += [
    thinned.thinned_attention(shard, pattern, branch)
    for branch in parts.thinned
  ]
  if parts.around:
    around = Branches(parts.around, pattern)
    results.append(
      ring_attention(around, options, axis_name, rows, position, dropout)
    )
  if global_tokens is not None and global_tokens.shape[1]:
    results.append(_globals(shard, pattern, global_tokens))
  wide = jnp.promote_types(q.dtype, jnp.float32)
  results = [(out.astype(wide), lse) for out, lse in results]
  out, lse = merge(results, detach_weights=pattern.detached)
  out = out.astype(q.dtype)
  return (out, lse) if return_lse else out


class _Parts(NamedTuple):
  """Branches by where their keys come from."""

  near: tuple[Branch, ...]
  start: tuple[Branch, ...]
  thinned: tuple[Branch, ...]
  around: tuple[Branch, ...]


def _assign(shard, branches):
  parts = _Parts([], [], [], [])
  whole = shard.length * shard.devices
  for branch in branches:
    if shard.rows.ids is not None and not _shift_invariant(branch):
      raise NotImplementedError(
        f'segment_ids with {branch}: positions restart in each document, whose '
        'first row another device may hold'
      )
    if branch.start <= shard.length:
      parts.start.append(branch)
    elif thinned.is_local(shard, branch):
      parts.near.append(branch)
    elif thinned.is_plain(branch) and branch.segment > shard.length:
      reason = thinned.refusal(shard, branch)
      if reason is None:
        parts.thinned.append(branch)
      elif max(_halo(shard, branch)) < whole - shard.length:
        parts.near.append(branch)
      else:
        raise NotImplementedError(reason)
    elif max(_halo(shard, branch)) < whole - shard.length:
      parts.near.append(branch)
    else:
      parts.around.append(branch)
  return _Parts(*map(tuple, parts))


def _shift_invariant(branch) -> bool:
  """Whether differences of positions say all."""
  return (
    branch.start == branch.segment == branch.block == math.inf
    and branch.columns is None
    and branch.distance == TRUE_DISTANCE
  )


def _halo(shard, branch) -> tuple[int, int]:
  """Rows that the branch needs before and after the shard."""
  if thinned.is_local(shard, branch):
    return 0, 0
  others = shard.length * (shard.devices - 1)
  return tuple(
    int(min(max(side, 0) * branch.stride, others)) for side in branch.steps()
  )


def _near(shard, pattern, branches):
  """Branches whose keys lie in the shard and its neighbours'."""
  left, right = (
    max(side) for side in zip(*(_halo(shard, b) for b in branches), strict=True)
  )
  queries, keys, ids = shard.queries, shard.keys, shard.rows.ids
  if not left and not right:
    return shard.attend(Branches(branches, pattern), queries, keys)
  if shard.start != 0:
    for branch in branches:
      if not _shift_invariant(branch):
        raise NotImplementedError(
          f'{branch} across devices, unless the sequence is known to begin at '
          'position 0'
        )
    if shard.options.dropout_rate:
      raise NotImplementedError(
        'dropout_rate with windows across devices, unless the sequence is '
        'known to begin at position 0: entries are named by positions'
      )
  # Positions are counted from the sequence's first row. So those before it are
  # negative: nobody's. `start` says the same of those after its last, unless
  # documents do.
  first = jnp.int32(jax.lax.axis_index(shard.axis_name) * shard.length)
  if right and ids is None:
    end = shard.length * shard.devices
    branches = tuple(
      dataclasses.replace(b, start=min(b.start, end)) for b in branches
    )

  def grow(x):
    return exchange.halo(x, left, right, shard.axis_name)

  if ids is not None:
    # What no device sent belongs to no document.
    ids = grow(ids + 1) - 1
  return shard.attend(
    Branches(branches, pattern),
    queries._replace(first=first),
    Rows(tuple(map(grow, keys.x)), first - left, ids),
  )


def _start(shard, pattern, branch):
  """A branch of the sequence's first keys."""
  rows = [
    exchange.first_rows(x, int(branch.start), shard.axis_name)
    for x in shard.keys.x
  ]
  rank = jax.lax.axis_index(shard.axis_name)
  first = shard.rows.first - rank * shard.length
  return shard.attend(
    Branches((branch,), pattern), shard.queries, Rows(tuple(rows), first)
  )


def _globals(shard, pattern, tokens):
  """Keys that every query may see, less those that the pattern shows it."""
  if 'reference' in shard.options.implementations:
    raise NotImplementedError(
      "implementation='reference' with global_tokens across devices: it counts "
      'a global key that the pattern shows as that pattern does, and so twice'
    )
  tokens = jnp.asarray(tokens, jnp.int32)

  def fetch(x):
    rows = exchange.rows_at(x, tokens, shard.rows.first, shard.axis_name)
    return exchange.varying(rows, shard.axis_name)

  batch, length = shard.rows.x[0].shape[:2]
  there = fetch(jnp.ones((batch, length), jnp.int32)) > 0
  positions = jnp.where(there & (tokens >= 0), tokens, -1)
  ids = shard.rows.ids
  key_ids = None if ids is None else jnp.where(there, fetch(ids), -1)
  steps = jnp.arange(length, dtype=jnp.int32)
  q_positions = jnp.reshape(shard.rows.first, (-1, 1)) + steps
  queries = shard.queries._replace(
    first=jnp.broadcast_to(q_positions, (batch, length))
  )
  keys = Rows(tuple(map(fetch, shard.keys.x)), positions, key_ids)
  return shard.attend(
    GlobalsOnly(pattern), queries, keys, global_tokens=positions
  )
