"""A tile of attention in the Mosaic TPU kernels, [keys, queries].

Its logits, who sees whom in it, and what dropout leaves of it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longjax.ops import dropout
from longjax.ops.pallas import contract
from longjax.ops.pallas.mosaic_tpu_common import Plan
from longjax.ops.pallas.mosaic_tpu_walk import At, Scalars

# Softmax is in base 2, which is what the hardware has.
LOG2E = math.log2(math.e)


def dot(a, b, axis_a: int, axis_b: int):
  """Sums over axis_a of a and axis_b of b, in float32."""
  # The MXU would round float32 operands to bfloat16 unless told.
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


class Tile(NamedTuple):
  """Some keys and queries that meet.

  seen, kept: [keys, queries], or None where all are; kept: by dropout.
  """

  q: Any
  k: Any
  v: Any
  of_prefix: bool
  seen: Any
  kept: Any


def each_tile(plan: Plan, at: At, s: Scalars, refs, visit):
  """Calls visit(Tile) for what the program has to visit in this step."""
  if at.in_prefix is not None:
    pl.when(at.in_prefix)(lambda: visit(_prefix_tile(plan, at, s, refs)))
  if at.in_band is None:
    return
  if plan.has_ids:
    pl.when(at.in_band)(lambda: visit(_band_tile(plan, at, s, refs, True)))
    return
  # Most tiles of a wide band lie inside it and need no mask.
  inside = _inside(plan, at, s)
  for masked, wanted in ((False, inside), (True, ~inside)):
    pl.when(at.in_band & wanted)(
      lambda masked=masked: visit(_band_tile(plan, at, s, refs, masked))
    )


def _inside(plan, at, s):
  column = functools.partial(s.column, at.sequence)
  b = at.k_tile * plan.block_k
  distance = at.q_tile * plan.block_q + column(contract.SHIFT) - b
  end = jnp.minimum(column(contract.END), plan.num_keys)
  return (
    (distance + plan.block_q - 1 <= column(contract.LEFT))
    & (distance - plan.block_k + 1 >= -column(contract.RIGHT))
    & (b >= column(contract.BEGIN))
    & (b + plan.block_k <= end)
  )


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _as_column(y):
  """[1, n] -> [n, 1]. Mosaic turns whole sublanes around, not single ones."""
  return jnp.broadcast_to(y, (8, y.shape[1])).T[:, :1]


def _band_tile(plan, at, s, refs, masked):
  column = functools.partial(s.column, at.sequence)
  shape = plan.block_k, plan.block_q
  a, b = at.q_tile * plan.block_q, at.k_tile * plan.block_k
  seen = kept = None
  if masked:
    rows = _iota(shape, 0)
    distance = _iota(shape, 1) - rows
    base = a + column(contract.SHIFT) - b
    end = jnp.minimum(column(contract.END), plan.num_keys)
    seen = (
      (distance <= column(contract.LEFT) - base)
      & (distance >= -column(contract.RIGHT) - base)
      & (rows >= column(contract.BEGIN) - b)
      & (rows < end - b)
    )
    if plan.has_ids:
      seen &= _as_column(refs['k_ids'][...]) == refs['q_ids'][...]
  if plan.spec.dropout_rate:
    k_row = b + _iota((plan.block_k, 1), 0)
    kept = _kept(plan, at, s, k_row * plan.residues + at.residue)
  k, v = refs['k'][...], refs['v'][...]
  return Tile(refs['q'][...], k, v, False, seen, kept)


def _prefix_tile(plan, at, s, refs):
  column = functools.partial(s.column, at.sequence)
  shape = plan.block_m, plan.block_q
  a = at.q_tile * plan.block_q + column(contract.SHIFT)
  own_row = _as_column(refs['prefix_row'][...])
  row = jnp.broadcast_to(own_row, shape)
  distance = a + _iota(shape, 1) - row
  in_band = (
    (distance <= column(contract.LEFT))
    & (distance >= -column(contract.RIGHT))
    & (row >= column(contract.BEGIN))
    & (row < column(contract.END))
  )
  seen = (row != contract.NOWHERE) & ~in_band
  if plan.spec.prefix_causal:
    seen &= distance >= 0
  if plan.has_ids:
    seen &= _as_column(refs['prefix_ids'][...]) == refs['q_ids'][...]
  kept = _kept(plan, at, s, own_row) if plan.spec.dropout_rate else None
  q = refs['prefix_q' if 'prefix_q' in refs else 'q'][...]
  k, v = refs['prefix_k'][...], refs['prefix_v'][...]
  return Tile(q, k, v, True, seen, kept)


def _kept(plan, at, s, k_position):
  column = functools.partial(s.column, at.sequence)
  a = at.q_tile * plan.block_q + _iota((1, plan.block_q), 1)
  seed = [s.seed[i].astype(jnp.uint32) for i in range(2)]
  return dropout.keep(
    plan.spec.dropout_rate,
    dropout.query_words(
      seed,
      column(contract.BATCH_ROW),
      column(contract.FIRST_HEAD) + at.head,
      column(contract.Q_POSITION) + a * plan.residues + at.residue,
    ),
    dropout.key_words(seed, column(contract.K_POSITION) + k_position),
  )


def logits(plan: Plan, tile: Tile):
  """(logits in base 2, their slope under a soft cap or None), not masked."""
  s, cap = dot(tile.k, tile.q, 1, 1), plan.spec.soft_cap
  if cap is None:
    return s * (plan.spec.scale * LOG2E), None
  s = jnp.tanh(s * (plan.spec.scale / cap))
  return s * (cap * LOG2E), 1 - s * s


def where_seen(tile: Tile, s):
  return s if tile.seen is None else jnp.where(tile.seen, s, -jnp.inf)


def drop(plan: Plan, tile: Tile, p):
  if tile.kept is None:
    return p
  return jnp.where(tile.kept, p * (1 / (1 - plan.spec.dropout_rate)), 0.0)
