"""Gradients of band attention on Hopper GPUs, in a fixed order of sums.

Two kernels. That of dQ owns queries and walks the tiles of the prefix and then
of the band, as the forward kernel does. That of dK and dV owns keys and walks
the queries that can see them, one query head of its group after the other; it
works on the transposed tile S^T = K Q^T, of which P^T and dS^T are left
operands as they are, while only right operands are transposed, for nothing.
The prefix's few keys meet all queries: the same kernel, its queries split over
programs whose float32 results XLA adds.

With p the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE,

    dV = drop(P)^T dO    dS = P * (drop(dP) - delta)    dQ = dS K    dK = dS^T Q

where drop is that of the forward pass. It does not divide by the share of
weights kept here: delta is multiplied by it, and the sums are divided at last.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from longjax.ops.pallas import mosaic_gpu_backward_kernels as kernels
from longjax.ops.pallas import mosaic_gpu_common as common
from longjax.ops.pallas import mosaic_gpu_ring as ring
from longjax.ops.pallas.contract import Gradients, Operands, Spec
from longjax.ops.pallas.mosaic_gpu_common import GpuConfig
from longjax.ops.varying import alike

# Programs of the prefix's kernel that are enough to fill a Hopper GPU.
_PROGRAMS = 264
# The fewest tiles of queries that are worth a program of the prefix's kernel.
_FEWEST_TILES = 4


def default_configs(spec: Spec, x: Operands) -> tuple[GpuConfig, GpuConfig]:
  """Tiles of the kernels of dQ, and of dK and dV.

  ptxas needs no spills for them, but for one number (4 bytes) of each thread
  with a soft cap at head size 128, and at 96 with all else besides. Of four
  slots a slot's number is the low bits of the tile's.
  """
  size = x.q.shape[-1]
  # A third tile of queries takes the place of slots, or of a warpgroup.
  third = x.prefix is not None and x.prefix.q is not None
  if size == 256:
    dkv = GpuConfig(walk=32)
    return dataclasses.replace(dkv, groups=1 if third else 2), dkv
  dq = GpuConfig(stages=2 if third and size == 128 else 4)
  return dq, GpuConfig(stages=4)


def backward(
  spec: Spec,
  x: Operands,
  lse: Float[Array, 'G C H P'],
  delta: Float[Array, 'G C H P'],
  dout: Float[Array, 'G P R H D'],
  *,
  configs: tuple[GpuConfig, GpuConfig] | None = None,
  interpret: Any = None,
) -> Gradients:
  """Cotangents of the operands as `contract` defines them.

  Args:
    lse, delta: float32, of the final result; see `contract`.
    dout: cotangent of the final result.
    configs: tiles of dQ's and of dK's and dV's kernel; None for
      `default_configs`.
    interpret: `plgpu.InterpretGPUParams` to interpret the kernels on a CPU.

  Raises:
    NotImplementedError: what `check` refuses.
  """
  common.check(spec, x)
  given = x.prefix
  if given is not None and not given.row.shape[1]:
    x = x._replace(prefix=None)
  configs = configs or default_configs(spec, x)
  dq, dkv = (common.resolve(config, interpret) for config in configs)
  configs = dict(dq=dq, dkv=dkv, prefix=_prefix_config(dkv))
  operands = _operands(spec, x, lse, delta, dout, configs)
  run = functools.partial(_run, spec, x, operands, interpret)
  out = run('dq', dq, ('q', 'prefix_q'))
  for names in _together(x.q.shape[-1]):
    out |= run('dkv', dkv, names)
  if given is not None:
    out |= dict(prefix_k=jnp.zeros_like(given.k, jnp.float32))
    out |= dict(prefix_v=jnp.zeros_like(given.v, jnp.float32))
    if given.q is not None and x.prefix is None:
      out['prefix_q'] = jnp.zeros_like(given.q)
  if x.prefix is not None:
    for names in _together(x.q.shape[-1]):
      parts = run('prefix', configs['prefix'], names)
      # [G, parts, K, M, D], of which some keys are padding.
      out |= {
        f'prefix_{name}': y.sum(1)[:, :, : given.k.shape[1]].swapaxes(1, 2)
        for name, y in parts.items()
      }
  return Gradients(**out)


def _prefix_config(dkv):
  """Of the prefix's dK and dV: more than 64 keys are rare."""
  return dataclasses.replace(dkv, groups=1)


def _together(size):
  """What a launch of the kernel of dK and dV computes."""
  if size > 128:
    # The sums of both do not fit a warpgroup's registers.
    return [('k',), ('v',)]
  return [('k', 'v')]


# --- Operands ----------------------------------------------------------------


def _operands(spec, x, lse, delta, dout, configs):
  """The arrays that the kernels read, by name; None where there is none."""
  # TMA clips, in tiles of 8 rows.
  arrays = {
    name: common.pad_rows(y, 1, 8)
    for name, y in dict(
      q=x.q, k=x.k, v=x.v, dout=dout.astype(x.q.dtype)
    ).items()
  }
  dq, dkv, prefix = (configs[name] for name in ('dq', 'dkv', 'prefix'))
  queries = math.lcm(dq.rows, dkv.walk)
  keys = math.lcm(dq.walk, dkv.rows)
  # exp2(logit - inf) = 0: rows that see nothing, and those that do not exist,
  # get and give nothing.
  some = ~jnp.isinf(lse)
  lse = jnp.where(some, lse * common.LOG2E, jnp.inf)
  delta = jnp.where(some, delta * (1 - spec.dropout_rate), 0.0)
  of_queries = common.query_notes(spec, x, queries)
  of_keys = common.key_notes(spec, x, keys)
  arrays |= dict(
    where=x.where,
    lse=common.pad_rows(lse, 3, queries, jnp.inf),
    delta=common.pad_rows(delta, 3, queries),
    q_ids=of_queries.ids,
    q_words=of_queries.words,
    k_ids=of_keys.ids,
    k_words=of_keys.words,
  )
  if spec.residues is not None:
    arrays['residues'] = jnp.asarray(spec.residues, jnp.int32)
  if x.prefix is not None:
    m = x.prefix
    multiple = math.lcm(dq.walk, prefix.rows)
    row, notes = common.prefix_notes(spec, x, multiple)
    arrays |= dict(
      prefix_q=None if m.q is None else common.pad_rows(m.q, 1, 8),
      prefix_k=common.pad_rows(m.k, 1, 8),
      prefix_v=common.pad_rows(m.v, 1, 8),
      prefix_row=row,
      prefix_ids=notes.ids,
      prefix_words=notes.words,
    )
  return arrays


def _plan(spec, x, kernel, config):
  _, num_queries, residues, heads, size = x.q.shape
  num_keys, kv_heads = x.k.shape[1], x.k.shape[3]
  group = heads // kv_heads
  plan = functools.partial(
    kernels.Plan,
    spec,
    config,
    num_queries,
    num_keys,
    size,
    x.q_ids is not None,
    1 - spec.dropout_rate,
  )
  classes = residues if spec.residues is None else 1
  if kernel == 'dq':
    return plan(classes, pl.cdiv(num_queries, config.rows), heads, 1, group)
  tiles = pl.cdiv(num_keys, config.rows)
  if kernel == 'dkv' and spec.residues is not None:
    return plan(classes, tiles, heads, 1, group)
  if kernel == 'dkv':
    return plan(classes, tiles, kv_heads, group, 1)
  tiles = pl.cdiv(x.prefix.k.shape[1], config.rows)
  walked = pl.cdiv(num_queries, config.walk)
  parts = pl.cdiv(_PROGRAMS, x.q.shape[0] * kv_heads * tiles)
  part = max(pl.cdiv(walked, parts), _FEWEST_TILES)
  return plan(pl.cdiv(walked, part), tiles, kv_heads, group, 1, part)


def _run(spec, x, operands, interpret, kernel, config, names):
  """Launches a kernel; returns its results by name, without padding."""
  plan = _plan(spec, x, kernel, config)
  sequences, size = x.q.shape[0], x.q.shape[-1]
  rows = dict(q=x.q, prefix_q=x.q, k=x.k, v=x.v)
  if kernel == 'prefix':
    out = {
      name: jax.ShapeDtypeStruct(
        (sequences, plan.classes, plan.heads, plan.tiles * config.rows, size),
        jnp.float32,
      )
      for name in names
    }
  else:
    out = {
      name: jax.ShapeDtypeStruct(
        (sequences, operands[name].shape[1], plan.classes, plan.heads, size),
        x.q.dtype,
      )
      for name in names
      if operands.get(name) is not None
    }
  out = plgpu.kernel(
    functools.partial(kernels.dq if kernel == 'dq' else kernels.dkv, plan),
    out_type=out,
    scratch_types=_scratch(spec, x, kernel, config, names),
    grid=(plan.heads, sequences * plan.classes * plan.tiles),
    grid_names=('head', 'tile'),
    num_threads=config.groups + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name=f'band_backward_{kernel}',
  )(operands)
  # Inside `shard_map` kernels lose account of what differs between devices.
  out = alike(out, operands)
  if kernel == 'prefix':
    return out
  return {name: y[:, : rows[name].shape[1]] for name, y in out.items()}


def _scratch(spec, x, kernel, config, names):
  """Shared memory and barriers, by name.

  own_s: for each warpgroup queries, dO and perhaps the prefix's queries; or
  keys and values. walked_s: for each slot the other pair. The rest of a slot
  are numbers for each walked row.
  """
  c, size, dtype = config, x.q.shape[-1], x.q.dtype
  walked = 'k' if kernel == 'dq' else 'q'
  vectors = {}
  if x.q_ids is not None:
    vectors[f'{walked}_ids'] = jnp.int32
  if spec.dropout_rate:
    vectors[f'{walked}_words'] = jnp.uint32
  copies, factors = 2, 1
  if kernel == 'dq':
    copies += x.prefix is not None and x.prefix.q is not None
  else:
    vectors['lse'] = jnp.float32
    if 'k' in names:
      vectors['delta'] = jnp.float32
    factors = len(names)

  def tiles(*shape):
    # Both operands of a product have one swizzle, and some of these are
    # contracted over walked rows.
    return ring.smem(shape, dtype, c.walk, size)

  scratch = dict(
    own_s=tiles(c.groups, copies, c.own, size),
    walked_s=tiles(c.stages, 2, c.walk, size),
    mine=plgpu.Barrier(num_barriers=c.groups, num_arrivals=copies),
    full=plgpu.Barrier(num_barriers=c.stages, num_arrivals=2 + len(vectors)),
    empty=plgpu.Barrier(num_barriers=c.stages, num_arrivals=c.groups),
  )
  for name, kind in vectors.items():
    scratch[f'{name}_s'] = plgpu.SMEM((c.stages, c.walk), kind)
  if c.p_in_smem:
    scratch['factors_s'] = tiles(c.groups, factors, c.own, c.walk)
  return scratch


def shared_memory(
  kernel: str, spec: Spec, x: Operands, config: GpuConfig | None = None
) -> int:
  """Bytes of shared memory that a program of the kernel asks for.

  Args:
    kernel: 'dq' or 'dkv'.
  """
  if config is None:
    config = dict(zip(('dq', 'dkv'), default_configs(spec, x), strict=True))[
      kernel
    ]
  names = _together(x.q.shape[-1])[0]
  scratch = _scratch(spec, x, kernel, config, names)
  return ring.shared_memory(scratch.values(), reductions=False)
