"""Band attention on Hopper GPUs: the contract's three functions.

Forward: each program owns queries of one head, residue and sequence; it walks
the tiles of the prefix and then those of the band with an online softmax in
base 2. Everything is read and written in place by strided TMA, which also
clips what lies beyond the last row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from longjax.ops.pallas import mosaic_gpu_common as common
from longjax.ops.pallas import mosaic_gpu_masks as masks
from longjax.ops.pallas import mosaic_gpu_ring as ring
from longjax.ops.pallas.contract import Operands, Spec
from longjax.ops.pallas.mosaic_gpu_backward import backward
from longjax.ops.pallas.mosaic_gpu_common import GpuConfig, check
from longjax.ops.varying import alike

__all__ = ['backward', 'check', 'default_config', 'forward', 'shared_memory']


def forward(
  spec: Spec,
  x: Operands,
  *,
  config: GpuConfig | None = None,
  interpret: Any = None,
) -> tuple[Float[Array, 'G P C H D'], Float[Array, 'G C H P']]:
  """(out, lse) as `contract` defines them.

  Args:
    config: tiles; None for `default_config`.
    interpret: `plgpu.InterpretGPUParams` to interpret the kernel on a CPU.

  Returns:
    out in the dtype of q, lse in float32.

  Raises:
    NotImplementedError: what `check` refuses.
  """
  check(spec, x)
  if x.prefix is not None and not x.prefix.row.shape[1]:
    x = x._replace(prefix=None)
  config = common.resolve(config or default_config(spec, x), interpret)
  sequences, num_queries, residues, heads, size = x.q.shape
  classes = residues if spec.residues is None else 1
  operands = _operands(spec, x, config)
  num_keys, kv_heads = x.k.shape[1], x.k.shape[3]
  tiles = pl.cdiv(num_queries, config.rows)
  plan = _Plan(
    spec, config, (*operands,), classes, tiles, heads // kv_heads, num_keys
  )
  out, lse = plgpu.kernel(
    functools.partial(_kernel, plan),
    out_type=(
      jax.ShapeDtypeStruct(
        (sequences, operands['q'].shape[1], classes, heads, size), x.q.dtype
      ),
      jax.ShapeDtypeStruct(
        (sequences, classes, heads, tiles * config.rows), jnp.float32
      ),
    ),
    scratch_types=_scratch(spec, x, config),
    grid=(heads, sequences * classes * tiles),
    grid_names=('head', 'tile'),
    num_threads=config.groups + 1,
    thread_name='warpgroup',
    kernel_name='band_forward',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )(*operands.values())
  # Inside `shard_map` kernels lose account of what differs between devices.
  out, lse = alike((out, lse), operands)
  return out[:, :num_queries], lse[..., :num_queries]


class _Plan(NamedTuple):
  """The static part of a kernel.

  names: of the operands, in order. tiles: programs for a head, residue and
  sequence. share: query heads of a key head.
  """

  spec: Spec
  config: GpuConfig
  names: tuple[str, ...]
  classes: int
  tiles: int
  share: int
  num_keys: int


def default_config(spec: Spec, x: Operands) -> GpuConfig:
  """Tiles of `forward` for these operands."""
  has_prefix_q = x.prefix is not None and x.prefix.q is not None
  return common.default_config(x.q.shape[-1], prefix_q=has_prefix_q)


def _operands(spec, x, config):
  """The arrays that the kernel reads, by name."""
  # TMA clips in tiles of 8 rows.
  arrays = {
    name: common.pad_rows(y, 1, 8)
    for name, y in (('q', x.q), ('k', x.k), ('v', x.v))
  }
  arrays['where'] = x.where

  def add(**more):
    arrays.update({name: y for name, y in more.items() if y is not None})

  of_queries = common.query_notes(spec, x, config.rows)
  of_keys = common.key_notes(spec, x, config.walk)
  add(
    q_ids=of_queries.ids,
    q_words=of_queries.words,
    k_ids=of_keys.ids,
    k_words=of_keys.words,
  )
  if spec.residues is not None:
    add(residues=jnp.asarray(spec.residues, jnp.int32))
  m = x.prefix
  if m is not None:
    row, notes = common.prefix_notes(spec, x, config.walk)
    add(
      prefix_k=common.pad_rows(m.k, 1, config.walk),
      prefix_v=common.pad_rows(m.v, 1, config.walk),
      prefix_q=None if m.q is None else common.pad_rows(m.q, 1, 8),
      prefix_row=row,
      prefix_ids=notes.ids,
      prefix_words=notes.words,
    )
  return arrays


def _scratch(spec, x, config):
  """Shared memory and barriers, by name."""
  c, size, dtype = config, x.q.shape[-1], x.q.dtype
  copies = 1 + (x.prefix is not None and x.prefix.q is not None)
  scratch = dict(
    q_s=ring.smem((c.groups, copies, c.own, size), dtype, c.walk),
    k_s=ring.smem((c.stages, c.walk, size), dtype, c.walk),
    v_s=ring.smem((c.stages, c.walk, size), dtype, c.walk),
    lse_s=plgpu.SMEM((c.groups, c.own), jnp.float32),
    mine=plgpu.Barrier(num_barriers=c.groups, num_arrivals=copies),
    empty=plgpu.Barrier(num_barriers=c.stages, num_arrivals=c.groups),
  )
  arrivals = 2
  for name, wanted, kind in (
    ('ids_s', x.q_ids is not None, jnp.int32),
    ('words_s', spec.dropout_rate > 0, jnp.uint32),
  ):
    if wanted:
      scratch[name] = plgpu.SMEM((c.stages, c.walk), kind)
      arrivals += 1
  scratch['full'] = plgpu.Barrier(num_barriers=c.stages, num_arrivals=arrivals)
  if c.alternates:
    scratch['turn'] = plgpu.Barrier(num_arrivals=c.groups)
  if c.p_in_smem:
    scratch['p_s'] = ring.smem((c.groups, c.own, c.walk), dtype, size)
  return scratch


def shared_memory(
  spec: Spec, x: Operands, config: GpuConfig | None = None
) -> int:
  """Bytes of shared memory that a program of `forward` asks for."""
  scratch = _scratch(spec, x, config or default_config(spec, x))
  return ring.shared_memory(scratch.values())


class _Walk(NamedTuple):
  """Where a program is, and its tiles: first those of the prefix."""

  at: masks.Interval
  sequence: Any
  residue: Any
  residue_out: Any
  head: Any
  first_query: Any
  prefix_tiles: Any
  first_tile: Any
  count: Any


def _walk(plan, ref):
  head, flat = lax.axis_index('head'), lax.axis_index('tile')
  # The last rows of a causal sequence have the longest walks: start with them.
  tile = plan.tiles - 1 - lax.rem(flat, plan.tiles)
  flat = lax.div(flat, plan.tiles)
  residue_out, sequence = (
    lax.rem(flat, plan.classes),
    lax.div(flat, plan.classes),
  )
  residue = ref['residues'][head] if 'residues' in ref else residue_out
  rows, walk = plan.config.rows, plan.config.walk
  at = masks.interval(ref['where'], sequence, plan.num_keys)
  first_query = tile * rows
  first_tile, band = masks.key_tiles(at, first_query, rows, walk)
  prefix = ref['prefix_row'].shape[1] // walk if 'prefix_row' in ref else 0
  return _Walk(
    at,
    sequence,
    residue,
    residue_out,
    head,
    first_query,
    prefix,
    first_tile,
    prefix + band,
  )


def _kernel(plan, *refs, **scratch):
  ref = dict(zip((*plan.names, 'out', 'lse'), refs, strict=True))
  walk, warpgroup = _walk(plan, ref), lax.axis_index('warpgroup')

  @pl.when(warpgroup == plan.config.groups)
  def _():
    _memory(plan, ref, scratch, walk)

  @pl.when(warpgroup < plan.config.groups)
  def _():
    _compute(plan, ref, scratch, walk, warpgroup)


def _memory(plan, ref, scratch, walk):
  g, r, kv_head = walk.sequence, walk.residue, lax.div(walk.head, plan.share)

  def load(j, slot, barrier):
    def copy(source, target):
      plgpu.copy_gmem_to_smem(source, scratch[target].at[slot], barrier)

    def rows(tile):
      return pl.ds(tile * plan.config.walk, plan.config.walk)

    def from_prefix():
      at = rows(j)
      copy(ref['prefix_k'].at[g, at, kv_head], 'k_s')
      copy(ref['prefix_v'].at[g, at, kv_head], 'v_s')
      for name in ('ids', 'words'):
        if f'{name}_s' in scratch:
          copy(ref[f'prefix_{name}'].at[g, at], f'{name}_s')

    def from_band():
      at = rows(walk.first_tile + j - walk.prefix_tiles)
      copy(ref['k'].at[g, at, r, kv_head], 'k_s')
      copy(ref['v'].at[g, at, r, kv_head], 'v_s')
      for name in ('ids', 'words'):
        if f'{name}_s' in scratch:
          copy(ref[f'k_{name}'].at[g, r, at], f'{name}_s')

    if 'prefix_k' in ref:
      pl.when(j < walk.prefix_tiles)(from_prefix)
      pl.when(j >= walk.prefix_tiles)(from_band)
    else:
      from_band()

  ring.produce(plan.config, walk.count, load, scratch['full'], scratch['empty'])


def _compute(plan, ref, scratch, walk, warpgroup):
  spec, config = plan.spec, plan.config
  ring.take_registers(config)
  g, r, c, head = walk.sequence, walk.residue, walk.residue_out, walk.head
  first_query = walk.first_query + warpgroup * config.own
  rows = pl.ds(first_query, config.own)
  q_s, lse_s = scratch['q_s'].at[warpgroup], scratch['lse_s'].at[warpgroup]
  _, size = q_s.shape[1:]
  mine = scratch['mine'].at[warpgroup]
  plgpu.copy_gmem_to_smem(ref['q'].at[g, rows, r, head], q_s.at[0], mine)
  if 'prefix_q' in ref:
    plgpu.copy_gmem_to_smem(
      ref['prefix_q'].at[g, rows, 0, head], q_s.at[1], mine
    )
  q_ids = q_words = None
  if 'q_ids' in ref:
    q_ids = _of_rows(ref['q_ids'].at[g, r, rows])
  if 'q_words' in ref:
    q_words = _of_rows(ref['q_words'].at[g, c, head, rows])
  whole = masks.inside_tiles(walk.at, first_query, config.own, config.walk)
  plgpu.barrier_wait(mine)

  def change_turns():
    # Where one warpgroup starts its softmax, the other starts its products.
    if config.alternates:
      plgpu.barrier_arrive(scratch['turn'])
      plgpu.barrier_wait(scratch['turn'])

  def step(j, carry):
    acc, largest, total = carry
    slot = lax.rem(j, config.stages)
    in_prefix = j < walk.prefix_tiles
    plgpu.barrier_wait(scratch['full'].at[slot])
    which = in_prefix.astype(jnp.int32) if 'prefix_q' in ref else 0
    s = _product(
      (config.own, config.walk),
      q_s.at[which],
      scratch['k_s'].at[slot].T,
      change_turns,
    )
    s, factor, _ = masks.logits(spec, s)
    s = _masked(plan, ref, walk, s, first_query, j, in_prefix, whole)
    if q_ids is not None:
      s = masks.mask_ids(s, q_ids, _of_columns(scratch['ids_s'].at[slot]), 0)
    new = jnp.maximum(largest, s.max(axis=1) * factor)
    old = jnp.exp2(largest - new)
    p = jnp.exp2(s * factor - masks.wide(new, s.shape, 0))
    total = total * old + p.sum(axis=1)
    if q_words is not None:
      words = _of_columns(scratch['words_s'].at[slot])
      p = masks.drop(p, spec, q_words, words, 0)
    acc = acc * masks.wide(old, acc.shape, 0)
    change_turns()
    acc = _add_product(
      config, acc, p.astype(q_s.dtype), scratch, warpgroup, slot
    )
    plgpu.barrier_arrive(scratch['empty'].at[slot])
    return acc, new, total

  def full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  # The second warpgroup is half a step behind, from here to the end.
  pl.when(warpgroup == 1)(change_turns)
  acc, largest, total = lax.fori_loop(
    0,
    walk.count,
    step,
    (
      full((config.own, size), 0.0, common.TILE),
      full((config.own,), common.LOWEST, common.ROW),
      full((config.own,), 0.0, common.ROW),
    ),
  )
  pl.when(warpgroup == 0)(change_turns)
  # A row that saw nothing has total 0; one with a NaN keeps it.
  none = total == 0.0
  share = jnp.where(none, 0.0, (1 / (1 - spec.dropout_rate)) / total)
  q_s.at[0][...] = (acc * masks.wide(share, acc.shape, 0)).astype(q_s.dtype)
  lse_s[...] = jnp.where(none, -jnp.inf, largest * common.LN2 + jnp.log(total))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(q_s.at[0], ref['out'].at[g, rows, c, head])
  plgpu.copy_smem_to_gmem(lse_s, ref['lse'].at[g, c, head, rows])
  plgpu.wait_smem_to_gmem(0)


def _masked(plan, ref, walk, s, first_query, j, in_prefix, whole):
  """Logits of tile j, -inf where interval or prefix rule hide the key."""

  tile = walk.first_tile + j - walk.prefix_tiles

  def interval():
    # Read again: in registers, it would be there for the whole walk.
    return masks.interval(ref['where'], walk.sequence, plan.num_keys)

  def edge(s):
    first_key = tile * plan.config.walk
    return masks.mask_interval(s, interval(), first_query, first_key, 0)

  def band(s):
    seen = (tile >= whole[0]) & (tile < whole[1])
    return lax.cond(seen, lambda s: s, edge, s)

  def prefix(s):
    keys = pl.ds(j * plan.config.walk, plan.config.walk)
    row = plgpu.load(
      ref['prefix_row'].at[walk.sequence, keys],
      layout=common.COLUMN,
      optimized=False,
    )
    return masks.mask_prefix(
      s, interval(), first_query, row, 0, plan.spec.prefix_causal
    )

  if 'prefix_row' not in ref:
    return band(s)
  return lax.cond(in_prefix, prefix, band, s)


def _product(shape, a, b, meanwhile=lambda: None):
  def product(acc):
    plgpu.wgmma(acc, a, b)
    meanwhile()
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _add_product(config, acc, p, scratch, warpgroup, slot):
  """acc + p @ v."""
  v = scratch['v_s'].at[slot]
  if config.p_in_smem:
    # All that the interpreter knows: a fresh accumulator, added in registers.
    p = ring.left_operand(p, scratch['p_s'].at[warpgroup])
    return acc + _product(acc.shape, p, v)

  def add(acc):
    plgpu.wgmma(acc, p, v)

  return pl.run_state(add)(plgpu.ACC.init(acc))


def _of_rows(source):
  return plgpu.load(source, layout=common.ROW, optimized=False)


def _of_columns(source):
  return plgpu.load(source, layout=common.COLUMN)
