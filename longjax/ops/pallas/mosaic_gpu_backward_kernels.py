"""The kernels of `mosaic_gpu_backward`: dQ, and dK with dV.

Operands are a dictionary, those that a call does not have being None, and so
are results and scratch.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas import mosaic_gpu_common as common
from longjax.ops.pallas import mosaic_gpu_masks as masks
from longjax.ops.pallas import mosaic_gpu_ring as ring
from longjax.ops.pallas.contract import Spec
from longjax.ops.pallas.mosaic_gpu_common import GpuConfig


class Plan(NamedTuple):
  """The static part of a kernel.

  classes: of the results: residues, or parts of the queries that meet the
    prefix; then `part` is the number of tiles in each, and otherwise 0.
  tiles: programs for a head, class and sequence.
  heads: of the results.
  share: query heads of each head of the results.
  group: heads of the results for each head of the keys.
  ids: whether there are segment ids.
  kept: share of the weights that dropout keeps.
  """

  spec: Spec
  config: GpuConfig
  num_queries: int
  num_keys: int
  size: int
  ids: bool
  kept: float
  classes: int
  tiles: int
  heads: int
  share: int
  group: int
  part: int = 0


# --- What both kernels do with a tile ----------------------------------------


class _Place(NamedTuple):
  """Where a program is: numbers in the grid, and what follows from them."""

  head: Any
  sequence: Any
  in_class: Any
  tile: Any
  residue: Any
  at: masks.Interval


def _place(plan, ref):
  head, flat = lax.axis_index('head'), lax.axis_index('tile')
  tile, flat = lax.rem(flat, plan.tiles), lax.div(flat, plan.tiles)
  in_class, sequence = lax.rem(flat, plan.classes), lax.div(flat, plan.classes)
  residue = 0 if plan.part else in_class
  if ref.get('residues') is not None:
    residue = ref['residues'][head]
  at = masks.interval(ref['where'], sequence, plan.num_keys)
  return _Place(head, sequence, in_class, tile, residue, at)


def _products(own, walked, count):
  """[S, dP] of a tile, or the first alone."""

  def products(*accs):
    for acc, a, b in zip(accs, own, walked, strict=False):
      plgpu.wgmma(acc, a, b.T)
    left = range(len(accs) - 1, -1, -1)
    return [
      plgpu.wgmma_accumulator_load(acc, wait_n=n)
      for acc, n in zip(accs, left, strict=True)
    ]

  acc = plgpu.ACC((own[0].shape[0], walked[0].shape[0]), jnp.float32)
  return pl.run_scoped(products, *[acc] * count)


def _differentiate(plan, q_axis, own, walked, hide, vector, wants_ds=True):
  """(drop(P), dS) of a tile, or (drop(P), None).

  Args:
    own, walked: pairs of tiles whose products are S and dP.
    hide: sets logits to -inf.
    vector: a number for each query or key, by name. Called late, so that what
      is loaded does not lie in registers meanwhile.
  """
  spec = plan.spec
  # Both products at once keep the tensor cores busier. Beside the sums of dK
  # and dV and the slope of the soft cap there are no registers for both.
  at_once = spec.soft_cap is None or q_axis == 0
  s, *dp = _products(own, walked, 1 + (wants_ds and at_once))
  s, factor, slope = masks.logits(spec, s)
  p = hide(s) * factor - masks.wide(vector('lse'), s.shape, q_axis)
  p = jnp.exp2(p)

  def drop(y):
    if not spec.dropout_rate:
      return y
    words = vector('q_words'), vector('k_words')
    return masks.drop(y, spec, *words, q_axis)

  dropped = drop(p)
  if not wants_ds:
    return dropped, None
  if slope is not None:
    p = p * slope
  (dp,) = dp or _products(own[1:], walked[1:], 1)
  delta = masks.wide(vector('delta'), p.shape, q_axis)
  return dropped, p * (drop(dp) - delta)


def _hide(plan, at, q_axis, first_query, first_key, vector):
  """A function that sets logits of a tile to -inf where nothing is seen.

  Args:
    first_key: of the band's keys; None for keys of the prefix.
  """

  def hide(s):
    if first_key is None:
      row, causal = vector('prefix_row'), plan.spec.prefix_causal
      s = masks.mask_prefix(s, at, first_query, row, q_axis, causal)
    else:
      s = masks.mask_band(s, at, first_query, first_key, q_axis)
    if plan.ids:
      s = masks.mask_ids(s, vector('q_ids'), vector('k_ids'), q_axis)
    return s

  return hide


def _vectors(own, scratch, slot):
  """Numbers by name: a program's own rows', or the walked rows' in a slot."""

  def vector(name):
    if name in own:
      return own[name]
    ref = scratch[f'{name}_s'].at[slot]
    return plgpu.load(ref, layout=common.COLUMN)

  return vector


def _of_rows(source):
  return plgpu.load(source, layout=common.ROW, optimized=False)


def _consume(config, scratch, first, count, update):
  """Walks tiles first, ..., first + count - 1 of the ring: update(j, slot)."""

  def step(j, _):
    slot = lax.rem(j, config.stages)
    plgpu.barrier_wait(scratch['full'].at[slot])
    update(j, slot)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch['empty'].at[slot])

  lax.fori_loop(first, first + count, step, None)


def _own(own_s, numbers, j):
  """Tiles of the program's own, addressed anew for walked tile j.

  ptxas would find the address of each of their parts before the walk and hold
  it in registers all along, 32 of them at head size 256. It cannot know that no
  walk has 2^30 tiles.
  """
  none = lax.shift_right_logical(j, 30)
  return [own_s.at[number + none] for number in numbers]


def _factor(scratch, warpgroup, number, value, dtype):
  """The left operand of a product."""
  buffer = None
  if 'factors_s' in scratch:
    buffer = scratch['factors_s'].at[warpgroup, number]
  return ring.left_operand(value.astype(dtype), buffer)


def _write(value, buffer, target):
  """Begins to copy a result out, through shared memory no longer in use."""
  buffer[...] = value.astype(buffer.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(buffer, target)


# --- dQ ----------------------------------------------------------------------


def dq(plan, ref, out, **scratch):
  spec, config = plan.spec, plan.config
  place = _place(plan, ref)
  # The last rows of a causal sequence have the longest walks: start with them.
  first_query = (plan.tiles - 1 - place.tile) * config.rows
  g, residue, head, at = place.sequence, place.residue, place.head, place.at
  first_tile, count = masks.key_tiles(at, first_query, config.rows, config.walk)
  prefix_tiles = 0
  if 'prefix_k' in ref:
    prefix_tiles = pl.cdiv(ref['prefix_k'].shape[1], config.walk)
  warpgroup = lax.axis_index('warpgroup')

  def load(j, slot, barrier):
    def copy(names, where, tile):
      rows = pl.ds(tile * config.walk, config.walk)
      key_head = lax.div(head, plan.group)
      for i, name in enumerate(names[:2]):
        plgpu.copy_gmem_to_smem(
          ref[name].at[g, rows, *where, key_head],
          scratch['walked_s'].at[slot, i],
          barrier,
        )
      for name, target in zip(names[2:], ('k_ids_s', 'k_words_s'), strict=True):
        if target in scratch:
          plgpu.copy_gmem_to_smem(
            ref[name].at[g, *where, rows], scratch[target].at[slot], barrier
          )

    def from_prefix():
      names = ('prefix_k', 'prefix_v', 'prefix_ids', 'prefix_words')
      copy(names, (), j)

    def from_band():
      names = ('k', 'v', 'k_ids', 'k_words')
      copy(names, (residue,), first_tile + j - prefix_tiles)

    if prefix_tiles:
      pl.when(j < prefix_tiles)(from_prefix)
      pl.when(j >= prefix_tiles)(from_band)
    else:
      from_band()

  def compute():
    ring.take_registers(config)
    first = first_query + warpgroup * config.own
    rows, own_s = pl.ds(first, config.own), scratch['own_s'].at[warpgroup]
    mine = scratch['mine'].at[warpgroup]
    sources = [ref['q'].at[g, rows, residue, head]]
    sources += [ref['dout'].at[g, rows, residue, head]]
    if 'prefix_q' in out:
      sources += [ref['prefix_q'].at[g, rows, 0, head]]
    for i, source in enumerate(sources):
      plgpu.copy_gmem_to_smem(source, own_s.at[i], mine)
    own = {
      name: _of_rows(ref[name].at[g, place.in_class, head, rows])
      for name in ('lse', 'delta', 'q_words')
      if ref.get(name) is not None
    }
    if plan.ids:
      own['q_ids'] = _of_rows(ref['q_ids'].at[g, residue, rows])
    plgpu.barrier_wait(mine)

    def update(acc, pair, slot, first_key, more):
      walked = [scratch['walked_s'].at[slot, i] for i in range(2)]
      vector = _vectors(own | more, scratch, slot)
      hide = _hide(plan, at, 0, first, first_key, vector)
      _, ds = _differentiate(plan, 0, pair, walked, hide, vector)
      ds = _factor(scratch, warpgroup, 0, ds, own_s.dtype)
      plgpu.wgmma(acc, ds, walked[0])

    def walk_prefix(acc, numbers):
      def step(j, slot):
        keys = pl.ds(j * config.walk, config.walk)
        row = plgpu.load(
          ref['prefix_row'].at[g, keys], layout=common.COLUMN, optimized=False
        )
        pair = _own(own_s, numbers, j)
        update(acc, pair, slot, None, dict(prefix_row=row))

      _consume(config, scratch, 0, prefix_tiles, step)

    def walk_band(acc, numbers):
      def step(j, slot):
        tile = first_tile + j - prefix_tiles
        pair = _own(own_s, numbers, j)
        update(acc, pair, slot, tile * config.walk, {})

      _consume(config, scratch, prefix_tiles, count, step)

    def write(name, i, walks):
      def run(acc):
        for walk in walks:
          walk(acc, (i, 1))
        return acc[...]

      sums = pl.run_scoped(run, plgpu.ACC(own_s.shape[1:], jnp.float32))
      target = out[name].at[g, rows, place.in_class, head]
      _write(sums * (spec.scale / plan.kept), own_s.at[i], target)

    walks = [walk_band]
    if 'prefix_q' in out:
      write('prefix_q', 2, [walk_prefix])
    elif prefix_tiles:
      walks = [walk_prefix, walk_band]
    write('q', 0, walks)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == config.groups)
  def _():
    full, empty = scratch['full'], scratch['empty']
    ring.produce(config, prefix_tiles + count, load, full, empty)

  pl.when(warpgroup < config.groups)(compute)


# --- dK and dV ---------------------------------------------------------------


def dkv(plan, ref, out, **scratch):
  spec, config = plan.spec, plan.config
  place = _place(plan, ref)
  g, residue, head, at = place.sequence, place.residue, place.head, place.at
  first_row = place.tile * config.rows
  prefix = plan.part > 0
  if prefix:
    first_tile = place.in_class * plan.part
    tiles = pl.cdiv(plan.num_queries, config.walk) - first_tile
    tiles = jnp.minimum(tiles, plan.part)
  else:
    first_tile, tiles = masks.query_tiles(
      at, first_row, config.rows, plan.num_queries, config.walk
    )
  warpgroup = lax.axis_index('warpgroup')

  def place_of(j):
    """(query head, first query) of a walked tile."""
    number, tile = 0, j
    if plan.share > 1:
      number, tile = lax.div(j, tiles), lax.rem(j, tiles)
    return head * plan.share + number, (first_tile + tile) * config.walk

  def load(j, slot, barrier):
    q_head, first = place_of(j)
    rows = pl.ds(first, config.walk)
    in_class = 0 if prefix else place.in_class
    q = ref['q'].at[g, rows, residue, q_head]
    if prefix and ref['prefix_q'] is not None:
      q = ref['prefix_q'].at[g, rows, 0, q_head]
    for i, source in enumerate((q, ref['dout'].at[g, rows, residue, q_head])):
      target = scratch['walked_s'].at[slot, i]
      plgpu.copy_gmem_to_smem(source, target, barrier)
    for name in ('lse', 'delta', 'q_words', 'q_ids'):
      if f'{name}_s' in scratch:
        where = (residue,) if name == 'q_ids' else (in_class, q_head)
        plgpu.copy_gmem_to_smem(
          ref[name].at[g, *where, rows], scratch[f'{name}_s'].at[slot], barrier
        )

  def compute():
    ring.take_registers(config)
    first = first_row + warpgroup * config.own
    rows, own_s = pl.ds(first, config.own), scratch['own_s'].at[warpgroup]
    mine = scratch['mine'].at[warpgroup]
    before, where = ('prefix_', ()) if prefix else ('', (residue,))
    key_head = lax.div(head, plan.group)
    for i, name in enumerate('kv'):
      plgpu.copy_gmem_to_smem(
        ref[f'{before}{name}'].at[g, rows, *where, key_head], own_s.at[i], mine
      )
    own = {}
    before = 'prefix' if prefix else 'k'
    for name in ('ids', 'words'):
      if ref[f'k_{name}'] is not None:
        source = ref[f'{before}_{name}'].at[g, *where, rows]
        own[f'k_{name}'] = _of_rows(source)
    if prefix:
      own['prefix_row'] = _of_rows(ref['prefix_row'].at[g, rows])
    plgpu.barrier_wait(mine)

    def update(sums, j, slot):
      _, first_query = place_of(j)
      walked = [scratch['walked_s'].at[slot, i] for i in range(2)]
      vector = _vectors(own, scratch, slot)
      first_key = None if prefix else first
      hide = _hide(plan, at, 1, first_query, first_key, vector)
      pair = _own(own_s, range(2), j)
      p, ds = _differentiate(plan, 1, pair, walked, hide, vector, 'k' in sums)
      factors = dict(v=(p, walked[1]), k=(ds, walked[0]))
      for number, (name, acc) in enumerate(sums.items()):
        left, right = factors[name]
        left = _factor(scratch, warpgroup, number, left, own_s.dtype)
        plgpu.wgmma(acc, left, right)

    def run(*accs):
      sums = dict(zip(out, accs, strict=True))
      step = functools.partial(update, sums)
      _consume(config, scratch, 0, tiles * plan.share, step)
      return [acc[...] for acc in accs]

    acc = plgpu.ACC(own_s.shape[1:], jnp.float32)
    values = pl.run_scoped(run, *[acc] * len(out))
    for name, value in zip(out, values, strict=True):
      value = value * ((spec.scale if name == 'k' else 1.0) / plan.kept)
      if prefix:
        out[name].at[g, place.in_class, head, rows][...] = value
      else:
        target = out[name].at[g, rows, place.in_class, head]
        _write(value, own_s.at['kv'.index(name)], target)
    if not prefix:
      plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == config.groups)
  def _():
    full, empty = scratch['full'], scratch['empty']
    ring.produce(config, tiles * plan.share, load, full, empty)

  pl.when(warpgroup < config.groups)(compute)
