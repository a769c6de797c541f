"""Gradients of band attention on TPU, from lse and delta of the final result.

Three kernels: dQ walks keys as the forward pass does, dK and dV walk queries,
and the prefix keys walk all queries. Weights are computed again in each.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from longjax.ops.pallas import mosaic_tpu_common as common
from longjax.ops.pallas import mosaic_tpu_tile as tiles
from longjax.ops.pallas import mosaic_tpu_walk as walk
from longjax.ops.pallas.contract import Gradients, Operands, Spec
from longjax.ops.pallas.mosaic_tpu_common import TpuConfig
from longjax.ops.pallas.mosaic_tpu_tile import LOG2E


def backward(
  spec: Spec,
  x: Operands,
  lse: Float[Array, 'G C H P'],
  delta: Float[Array, 'G C H P'],
  dout: Float[Array, 'G P R H D'],
  *,
  configs: tuple[TpuConfig, TpuConfig] | None = None,
  interpret=None,
) -> Gradients:
  """Cotangents of the operands.

  Args:
    lse, delta, dout: see `contract`.
    configs: tiles of dQ and of dK, dV; `default_config` if None.
    interpret: as in `pl.pallas_call`; None: as the context has it.

  Raises:
    NotImplementedError: see `check`.
  """
  common.check(spec, x)
  if configs is None:
    configs = (common.default_config(spec, x, backward=True),) * 2
  plan = common.plan(spec, x, configs[0])
  scalars = walk.scalars(plan, x)
  ins = inputs(plan, x, lse, delta, dout)
  dq = run_dq(plan, scalars, ins, interpret)
  dq = {n: common.rows_outside(y, plan.num_queries) for n, y in dq.items()}
  if configs[1] != configs[0]:
    plan = common.plan(spec, x, configs[1])
    ins = inputs(plan, x, lse, delta, dout)
  dkv = run_dkv(plan, scalars, ins, interpret)
  dkv = {n: common.rows_outside(y, plan.num_keys) for n, y in dkv.items()}
  prefix = {}
  if x.prefix is not None:
    prefix = run_prefix_dkv(plan, scalars, ins, interpret)
    prefix = {
      name: common.rows_outside(y, plan.num_prefix)[:, :, 0]
      for name, y in prefix.items()
    }
  return Gradients(
    dq['dq'],
    dkv['dk'],
    dkv['dv'],
    dq.get('prefix_dq'),
    prefix.get('prefix_dk'),
    prefix.get('prefix_dv'),
  )


def inputs(plan, x: Operands, lse, delta, dout) -> dict[str, jax.Array]:
  """The arrays that the three kernels read, as they read them."""
  # A row without a denominator has no weights: exp2(logit - inf) = 0. Nor have
  # rows that only fill a block.
  none = jnp.isinf(lse)
  lse = jnp.where(none, jnp.inf, lse * LOG2E)
  delta = jnp.where(none, 0.0, delta)
  return common.inputs(plan, x) | dict(
    dout=common.rows_inside(dout.astype(x.q.dtype), plan.block_q),
    lse=common.lanes(lse, plan.block_q, jnp.inf),
    delta=common.lanes(delta, plan.block_q),
  )


_PREFIX = ('prefix_q', 'prefix_k', 'prefix_v', 'prefix_row', 'prefix_ids')


def run_dq(plan, scalars, ins, interpret=None):
  shape = (
    plan.sequences,
    plan.heads,
    plan.classes,
    plan.q_tiles * plan.block_q,
    plan.size,
  )
  dtype = ins['q'].dtype
  outs = dict(dq=jax.ShapeDtypeStruct(shape, dtype))
  scratch = dict(dq_sums=(plan.size, plan.block_q))
  if 'prefix_q' in ins:
    outs['prefix_dq'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch['prefix_dq_sums'] = (plan.size, plan.block_q)
  return walk.call(
    _dq,
    plan,
    walk.walk_keys,
    (*shape[:3], plan.q_tiles, plan.m_tiles + plan.key_steps),
    scalars,
    ins,
    outs,
    scratch,
    products=3,
    interpret=interpret,
  )


def run_dkv(plan, scalars, ins, interpret=None):
  shape = (
    plan.sequences,
    plan.key_heads,
    plan.classes,
    plan.k_tiles * plan.block_k,
    plan.size,
  )
  out = jax.ShapeDtypeStruct(shape, ins['q'].dtype)
  sums = plan.block_k, plan.size
  return walk.call(
    _dkv,
    plan,
    walk.walk_queries,
    (*shape[:3], plan.k_tiles, plan.key_share * plan.query_steps),
    scalars,
    {name: y for name, y in ins.items() if name not in _PREFIX},
    dict(dk=out, dv=out),
    dict(dk_sums=sums, dv_sums=sums),
    products=4,
    interpret=interpret,
  )


def run_prefix_dkv(plan, scalars, ins, interpret=None):
  rows = plan.m_tiles * plan.block_m
  shape = plan.sequences, plan.kv_heads, 1, rows, plan.size
  out = jax.ShapeDtypeStruct(shape, jnp.float32)
  sums = plan.block_m, plan.size
  unused = {'k', 'v', 'k_ids'} | ({'q'} if 'prefix_q' in ins else set())
  return walk.call(
    _prefix_dkv,
    plan,
    walk.walk_prefix,
    (*shape[:3], plan.m_tiles, plan.group * plan.q_tiles),
    scalars,
    {name: y for name, y in ins.items() if name not in unused},
    dict(prefix_dk=out, prefix_dv=out),
    dict(dk_sums=sums, dv_sums=sums),
    products=4,
    interpret=interpret,
  )


def _weights(plan, tile, refs):
  """(weights, gradient of the products q . k), but for the scale."""
  logits, slope = tiles.logits(plan, tile)
  p = jnp.exp2(tiles.where_seen(tile, logits) - refs['lse'][...])
  dp = tiles.dot(tile.v, refs['dout'][...], 1, 1)
  ds = p * (tiles.drop(plan, tile, dp) - refs['delta'][...])
  if slope is not None:
    ds = ds * slope
  return tiles.drop(plan, tile, p), ds.astype(tile.q.dtype)


def _dq(plan, at, s, refs, step, steps):
  own = 'prefix_dq' in refs

  @pl.when(step == 0)
  def _():
    for name in ('dq_sums', 'prefix_dq_sums')[: 1 + own]:
      refs[name][...] = jnp.zeros_like(refs[name])

  def visit(tile):
    _, ds = _weights(plan, tile, refs)
    sums = refs['prefix_dq_sums' if own and tile.of_prefix else 'dq_sums']
    sums[...] += tiles.dot(tile.k, ds, 0, 0)

  tiles.each_tile(plan, at, s, refs, visit)

  @pl.when(step == steps - 1)
  def _():
    for name in ('dq', 'prefix_dq')[: 1 + own]:
      sums = (refs[name + '_sums'][...] * plan.spec.scale).T
      refs[name][...] = sums.astype(refs[name].dtype)


def _dkv(plan, at, s, refs, step, steps, prefix=''):
  dk, dv = refs['dk_sums'], refs['dv_sums']

  @pl.when(step == 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def visit(tile):
    p, ds = _weights(plan, tile, refs)
    dout = refs['dout'][...]
    dv[tile.rows] += tiles.dot(p.astype(dout.dtype), dout, 1, 0)
    dk[tile.rows] += tiles.dot(ds, tile.q, 1, 0)

  tiles.each_tile(plan, at, s, refs, visit)

  @pl.when(step == steps - 1)
  def _():
    for name, sums in (('dk', dk[...] * plan.spec.scale), ('dv', dv[...])):
      out = refs[prefix + name]
      out[...] = sums.astype(out.dtype)


def _prefix_dkv(*args):
  _dkv(*args, prefix='prefix_')
