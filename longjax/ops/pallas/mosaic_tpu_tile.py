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

  rows: of the block of keys. seen, kept: [keys, queries], or None where all
  are; kept: by dropout.
  """

  q: Any
  k: Any
  v: Any
  rows: Any
  of_prefix: bool
  seen: Any
  kept: Any


def each_tile(plan: Plan, at: At, s: Scalars, refs, visit):
  """Calls visit(Tile) for what the program has to visit in this step."""
  if at.in_prefix is not None:
    pl.when(at.in_prefix)(lambda: visit(_prefix_tile(plan, at, s, refs)))
  if at.in_band is None:
    return

  def visit_step(i):
    start = pl.multiple_of(i * plan.step_k, plan.step_k)
    touched, inside = _meeting(plan, at, s, start)
    # Most steps of a wide band lie inside it and need no mask.
    if plan.has_ids:
      cases = ((True, touched),)
    else:
      cases = ((False, inside), (True, touched & ~inside))
    for masked, wanted in cases:
      pl.when(wanted)(
        lambda masked=masked: visit(
          _band_tile(plan, at, s, refs, start, masked)
        )
      )

  @pl.when(at.in_band)
  def _():
    steps = plan.block_k // plan.step_k
    if steps == 1:
      visit_step(0)
    else:
      pl.loop(0, steps)(visit_step)


def _meeting(plan, at, s, start):
  """Whether the band touches some pair of a step, and has all of them."""
  column = functools.partial(s.column, at.sequence)
  left, right = column(contract.LEFT), column(contract.RIGHT)
  begin = column(contract.BEGIN)
  end = jnp.minimum(column(contract.END), plan.num_keys)
  first = at.k_tile * plan.block_k + start
  last = first + plan.step_k - 1
  a = at.q_tile * plan.block_q + column(contract.SHIFT)
  nearest, furthest = a - last, a + plan.block_q - 1 - first
  touched = (nearest <= left) & (furthest >= -right)
  touched &= (last >= begin) & (first < end)
  inside = (furthest <= left) & (nearest >= -right)
  inside &= (first >= begin) & (last < end)
  return touched, inside


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _as_column(y):
  """[1, n] -> [n, 1]. Mosaic turns whole sublanes around, not single ones."""
  return jnp.broadcast_to(y, (8, y.shape[1])).T[:, :1]


def _band_tile(plan, at, s, refs, start, masked):
  column = functools.partial(s.column, at.sequence)
  shape = plan.step_k, plan.block_q
  rows_k = pl.ds(start, plan.step_k)
  a, b = at.q_tile * plan.block_q, at.k_tile * plan.block_k + start
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
      seen &= _as_column(refs['k_ids'][:, rows_k]) == refs['q_ids'][...]
  if plan.spec.dropout_rate:
    k_row = b + _iota((plan.step_k, 1), 0)
    kept = _kept(plan, at, s, k_row * plan.residues + at.residue)
  k, v = refs['k'][rows_k], refs['v'][rows_k]
  return Tile(refs['q'][...], k, v, rows_k, False, seen, kept)


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
  return Tile(q, k, v, slice(None), True, seen, kept)


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
