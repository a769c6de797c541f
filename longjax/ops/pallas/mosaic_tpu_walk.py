"""What a program of the Mosaic TPU kernels works on, and their call.

A program of the grid owns a tile of queries (or of keys) and walks the tiles of
keys (or queries) that can meet it. Which these are follows from `where`, which
is prefetched into scalar memory: nothing of it is static but the number of
steps, and steps beyond the last tile do nothing and fetch nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Operands
from longjax.ops.pallas.mosaic_tpu_common import VMEM_BYTES, Plan
from longjax.ops.varying import structs_like


class Scalars(NamedTuple):
  """What is prefetched into scalar memory, int32.

  where: [G * 9]; residues: [H], of each head (unless all walk all); seed: [2].
  """

  where: Any
  residues: Any
  seed: Any

  def column(self, sequence, number):
    return self.where[sequence * contract.COLUMNS + number]


def scalars(plan: Plan, x: Operands) -> Scalars:
  seed = jnp.zeros(2, jnp.int32)
  if plan.spec.dropout_rate:
    seed = jax.lax.bitcast_convert_type(x.seed, jnp.int32)
  residues = plan.spec.residues or (0,)
  return Scalars(
    x.where.astype(jnp.int32).reshape(-1),
    jnp.asarray(residues, jnp.int32),
    seed,
  )


# --- Which tiles meet --------------------------------------------------------


class At(NamedTuple):
  """What a program of the grid works on; numbers of sequence, head, tile, ...

  own_head: of the gradients of keys. in_prefix, in_band: whether the tile of
  prefix keys, or of keys, is to be visited; None if it never is.
  """

  sequence: Any
  head: Any
  kv_head: Any
  own_head: Any
  residue_class: Any
  residue: Any
  q_tile: Any
  k_tile: Any
  m_tile: Any
  in_prefix: Any
  in_band: Any


def _interval(lo, hi, block, tiles):
  """(first tile, tiles) of the rows lo, ..., hi; lo >= 0."""
  some = hi >= lo
  first = jnp.minimum(jax.lax.div(lo, block), tiles - 1)
  last = jax.lax.div(jnp.maximum(hi, 0), block)
  return first, jnp.where(some, last - first + 1, 0)


def _nth(first, count, n):
  """Tile n of the walk; the last one again after the end, as is free."""
  return first + jnp.clip(n, 0, jnp.maximum(count - 1, 0))


def walk_keys(plan: Plan, s: Scalars, g, h, c, t, j) -> At:
  """Query tile t of head h meets the prefix, then its band, in step j."""
  column = functools.partial(s.column, g)
  at = t * plan.block_q + column(contract.SHIFT)
  lo = at - column(contract.LEFT)
  hi = at + plan.block_q - 1 + column(contract.RIGHT)
  first, count = _interval(
    jnp.maximum(jnp.maximum(lo, column(contract.BEGIN)), 0),
    jnp.minimum(jnp.minimum(hi, column(contract.END) - 1), plan.num_keys - 1),
    plan.block_k,
    plan.k_tiles,
  )
  n = j - plan.m_tiles
  return At(
    sequence=g,
    head=h,
    kv_head=jax.lax.div(h, plan.group),
    own_head=None,
    residue_class=c,
    residue=c if plan.spec.residues is None else s.residues[h],
    q_tile=t,
    k_tile=_nth(first, count, n),
    m_tile=jnp.minimum(j, max(plan.m_tiles - 1, 0)),
    in_prefix=n < 0 if plan.m_tiles else None,
    in_band=(n >= 0) & (n < count),
  )


def walk_queries(plan: Plan, s: Scalars, g, h, c, t, j) -> At:
  """Key tile t of key head h meets its queries, head after head."""
  column = functools.partial(s.column, g)
  share, n = jax.lax.div(j, plan.query_steps), jax.lax.rem(j, plan.query_steps)
  head = h * plan.key_share + share
  lo = jnp.maximum(t * plan.block_k, column(contract.BEGIN))
  hi = jnp.minimum(t * plan.block_k + plan.block_k, column(contract.END))
  hi = jnp.minimum(hi, plan.num_keys) - 1
  shift = column(contract.SHIFT)
  first, count = _interval(
    jnp.maximum(lo - shift - column(contract.RIGHT), 0),
    jnp.minimum(hi - shift + column(contract.LEFT), plan.num_queries - 1),
    plan.block_q,
    plan.q_tiles,
  )
  return At(
    sequence=g,
    head=head,
    kv_head=jax.lax.div(head, plan.group),
    own_head=h,
    residue_class=c,
    residue=c if plan.spec.residues is None else s.residues[head],
    q_tile=_nth(first, count, n),
    k_tile=t,
    m_tile=None,
    in_prefix=None,
    in_band=(n < count) & (hi >= lo),
  )


def walk_prefix(plan: Plan, s: Scalars, g, h, c, t, j) -> At:
  """Prefix tile t of key head h meets every query, head after head."""
  del s
  share, n = jax.lax.div(j, plan.q_tiles), jax.lax.rem(j, plan.q_tiles)
  return At(
    sequence=g,
    head=h * plan.group + share,
    kv_head=h,
    own_head=h,
    residue_class=c,
    residue=c,
    q_tile=n,
    k_tile=None,
    m_tile=t,
    in_prefix=n >= 0,
    in_band=None,
  )


def _block(plan, name):
  """(block shape, function from At to the block's numbers) of an array."""
  one, size = None, plan.size
  rows = {
    'q': lambda at: (at.sequence, at.head, at.residue, at.q_tile, 0),
    'k': lambda at: (at.sequence, at.kv_head, at.residue, at.k_tile, 0),
    'out': lambda at: (at.sequence, at.head, at.residue_class, at.q_tile, 0),
    'dk': lambda at: (at.sequence, at.own_head, at.residue_class, at.k_tile, 0),
    'prefix_k': lambda at: (at.sequence, at.kv_head, 0, at.m_tile, 0),
  }
  like = dict(v='k', dout='q', dq='out', dv='dk', prefix_q='q', prefix_dq='out')
  like |= dict.fromkeys(('prefix_v', 'prefix_dk', 'prefix_dv'), 'prefix_k')
  kind = like.get(name, name)
  if kind in rows:
    block = dict(q='q', out='q', k='k', dk='k', prefix_k='m')[kind]
    block = dict(q=plan.block_q, k=plan.block_k, m=plan.block_m)[block]
    return (one, one, one, block, size), rows[kind]
  if name in ('lse', 'delta'):
    return (one, one, one, 1, plan.block_q), lambda at: (
      at.sequence,
      at.residue_class,
      at.head,
      0,
      at.q_tile,
    )
  if name in ('q_ids', 'k_ids'):
    queries = name == 'q_ids'
    return (one, one, 1, plan.block_q if queries else plan.block_k), (
      lambda at: (
        at.sequence,
        at.residue,
        0,
        at.q_tile if queries else at.k_tile,
      )
    )
  assert name in ('prefix_row', 'prefix_ids'), name
  return (one, 1, plan.block_m), lambda at: (at.sequence, 0, at.m_tile)


def call(
  kernel: Callable,
  plan: Plan,
  walk: Callable[..., At],
  grid: tuple[int, int, int, int, int],
  s: Scalars,
  ins: dict[str, jax.Array],
  outs: dict[str, jax.ShapeDtypeStruct],
  scratch: dict[str, tuple[int, int]],
  *,
  products: int,
  interpret: Any,
) -> dict[str, jax.Array]:
  """Runs `kernel(plan, at, scalars, refs)` over the grid.

  Args:
    kernel: gets the refs of ins, outs and scratch in one namespace, and the
      step of the walk with their number.
    walk: what each program works on.
    grid: sequences, heads, classes, own tiles, steps of the walk.
    ins, outs: by the names that `_block` knows.
    scratch: shapes in VMEM, float32.
    products: of matrices, for each tile: what the kernel costs.
  """

  def body(where, residues, seed, in_refs, out_refs, scratch_refs):
    s = Scalars(where, residues, seed)
    numbers = [pl.program_id(axis) for axis in range(5)]
    at = walk(plan, s, *numbers)
    refs = {**in_refs, **out_refs, **scratch_refs}
    kernel(plan, at, s, refs, numbers[4], grid[4])

  def spec(name):
    shape, numbers = _block(plan, name)
    return pl.BlockSpec(
      shape,
      lambda *a: numbers(walk(plan, Scalars(*a[5:]), *a[:5])),
    )

  pairs = plan.sequences * plan.heads * plan.classes * plan.num_queries
  if walk is walk_prefix:
    pairs *= plan.num_prefix
  else:
    reach = min(plan.num_keys, max(sum(plan.spec.reach) + 1, 0))
    pairs *= reach + (plan.num_prefix if walk is walk_keys else 0)
  arrays = [*ins.values(), *outs.values()]
  return pl.pallas_call(
    body,
    out_shape=structs_like(outs, s, ins),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=grid,
      in_specs=[{name: spec(name) for name in ins}],
      out_specs={name: spec(name) for name in outs},
      scratch_shapes=[
        {n: pltpu.VMEM(shape, jnp.float32) for n, shape in scratch.items()}
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 4 + ('arbitrary',),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * pairs * plan.size,
      transcendentals=pairs * (1 + (plan.spec.soft_cap is not None)),
      bytes_accessed=sum(y.size * y.dtype.itemsize for y in arrays),
    ),
    # None leaves it to `pltpu.force_tpu_interpret_mode`.
    interpret=interpret or False,
    name='longjax' + kernel.__name__,
  )(*s, ins)
