"""Band attention on TPU (Mosaic): `contract` by Pallas kernels.

`check` and `forward`; `backward` is in a file of its own.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from longjax.ops.pallas import mosaic_tpu_common as common
from longjax.ops.pallas import mosaic_tpu_tile as tiles
from longjax.ops.pallas import mosaic_tpu_walk as walk
from longjax.ops.pallas.contract import Operands, Spec
from longjax.ops.pallas.mosaic_tpu_backward import backward
from longjax.ops.pallas.mosaic_tpu_common import TpuConfig
from longjax.ops.pallas.mosaic_tpu_tile import LOG2E

__all__ = ['backward', 'check', 'forward']

# Below every logit, yet finite: a tile in which a row sees nothing then adds
# exp2(-inf) = 0 to it, and not exp2(-inf + inf).
_NOTHING_YET = -1e30


def check(spec: Spec, x: Operands):
  """Raises NotImplementedError, with the reason, for what is not served."""
  common.check(spec, x)


def forward(
  spec: Spec,
  x: Operands,
  *,
  config: TpuConfig | None = None,
  interpret=None,
) -> tuple[Float[Array, 'G P C H D'], Float[Array, 'G C H P']]:
  """(out in q's dtype, lse in float32).

  Args:
    config: tiles; `default_config` if None.
    interpret: as in `pl.pallas_call`; None: as the context has it.

  Raises:
    NotImplementedError: see `check`.
  """
  check(spec, x)
  plan = common.plan(spec, x, config or common.default_config(spec, x))
  results = run(plan, walk.scalars(plan, x), common.inputs(plan, x), interpret)
  out = common.rows_outside(results['out'], plan.num_queries)
  return out, results['lse'][..., 0, : plan.num_queries]


def run(plan, scalars, ins, interpret=None) -> dict[str, jax.Array]:
  """The kernel on arrays as it reads them."""
  rows = plan.q_tiles * plan.block_q
  shape = plan.sequences, plan.heads, plan.classes, rows, plan.size
  stats = plan.sequences, plan.classes, plan.heads, 1, rows
  return walk.call(
    _forward,
    plan,
    walk.walk_keys,
    (*shape[:3], plan.q_tiles, plan.m_tiles + plan.key_steps),
    scalars,
    ins,
    dict(
      out=jax.ShapeDtypeStruct(shape, ins['q'].dtype),
      lse=jax.ShapeDtypeStruct(stats, jnp.float32),
    ),
    dict(
      largest=(1, plan.block_q),
      total=(1, plan.block_q),
      sums=(plan.size, plan.block_q),
    ),
    products=2,
    interpret=interpret,
  )


def _forward(plan, at, s, refs, step, steps):
  largest, total, sums = (refs[n] for n in ('largest', 'total', 'sums'))

  @pl.when(step == 0)
  def _():
    largest[...] = jnp.full_like(largest, _NOTHING_YET)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  def visit(tile):
    logits = tiles.where_seen(tile, tiles.logits(plan, tile)[0])
    old = largest[...]
    new = jnp.maximum(old, logits.max(axis=0, keepdims=True))
    p = jnp.exp2(logits - new)
    old = jnp.exp2(old - new)
    largest[...] = new
    total[...] = total[...] * old + p.sum(axis=0, keepdims=True)
    p = tiles.drop(plan, tile, p).astype(tile.v.dtype)
    sums[...] = sums[...] * old + tiles.dot(tile.v, p, 0, 0)

  tiles.each_tile(plan, at, s, refs, visit)

  @pl.when(step == steps - 1)
  def _():
    some = total[...] > 0
    denominator = jnp.where(some, total[...], 1.0)
    out = (sums[...] / denominator).T
    refs['out'][...] = out.astype(refs['out'].dtype)
    lse = (largest[...] + jnp.log2(denominator)) * (1 / LOG2E)
    refs['lse'][...] = jnp.where(some, lse, -jnp.inf)
