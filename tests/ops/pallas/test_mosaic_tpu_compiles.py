"""The Mosaic TPU kernels compile for TPUs, within stated bounds of memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from longjax.ops.pallas import mosaic_tpu, mosaic_tpu_backward
from longjax.ops.pallas import mosaic_tpu_common as common
from longjax.ops.pallas import mosaic_tpu_walk as walk
from longjax.ops.pallas.contract import UNBOUNDED, Operands, Spec, where_rows
from tests.ops.pallas import compiling, oracle

MIB = 2**20


def shapes(spec, *, num_queries=262144, num_keys=None, **options):
  """Operands, lse, delta and dout, without values."""
  # Lengths that nothing else has, to be found again in the shapes.
  lengths = {37: num_queries, 41: num_keys or num_queries}
  options = dict(heads=4, kv_heads=2, size=128) | options
  x = oracle.operands(num_queries=37, num_keys=41, **options)
  x = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct(
      tuple(lengths.get(n, n) for n in y.shape), y.dtype
    ),
    x,
  )
  sequences, rows, residues, heads, _ = x.q.shape
  classes = 1 if spec.residues else residues
  stats = (sequences, classes, heads, rows)
  stats = jax.ShapeDtypeStruct(stats, jnp.float32)
  return x, stats, stats, x.q


EVERYTHING = dict(soft_cap=30.0, dropout_rate=0.1)
WINDOW = (512, 0)
# name: (spec, options, kind)
VARIANTS = {
  'plain': ({}, {}),
  'wide': (dict(reach=(UNBOUNDED, 0)), {}),
  'both sides': (dict(reach=(512, 512)), {}),
  'float32': ({}, dict(dtype=jnp.float32)),
  'head size 8': ({}, dict(size=8)),
  'head size 40': ({}, dict(size=40)),
  'head size 64': ({}, dict(size=64)),
  'head size 96': ({}, dict(size=96)),
  'head size 256': ({}, dict(size=256)),
  'head size 256, float32': ({}, dict(size=256, dtype=jnp.float32)),
  'segment ids': ({}, dict(ids=True)),
  'dropout': (dict(dropout_rate=0.1), dict(dropout=True)),
  'soft cap': (dict(soft_cap=30.0), {}),
  'dilated': ({}, dict(residues=4, num_queries=65536)),
  'thinned': (
    dict(residues=(0, 1, 2, 3)),
    dict(residues=4, num_queries=2048, sequences=32),
  ),
  'thinned, everything': (
    dict(residues=(0, 1, 2, 3), **EVERYTHING),
    dict(
      residues=4,
      num_queries=2048,
      sequences=32,
      dropout=True,
      ids=True,
      size=64,
    ),
  ),
  'prefix': ({}, dict(prefix=10)),
  'prefix, own queries': ({}, dict(prefix=64, prefix_q=True)),
  'prefix of many tiles': ({}, dict(prefix=1100)),
  'prefix, everything': (
    EVERYTHING,
    dict(prefix=64, prefix_q=True, dropout=True, ids=True),
  ),
  'prefix, everything, float32': (
    dict(reach=(UNBOUNDED, 0), **EVERYTHING),
    dict(prefix=64, prefix_q=True, dropout=True, ids=True, dtype=jnp.float32),
  ),
  'one query': ({}, dict(num_queries=1, num_keys=65536)),
  'odd lengths': ({}, dict(num_queries=3000, num_keys=60001)),
}


@pytest.mark.parametrize('kind', ['v5e', 'v6e'])
@pytest.mark.parametrize('name', VARIANTS)
def test_compiles_within_the_vmem_it_reckons_with(name, kind, monkeypatch):
  spec, options = VARIANTS[name]
  spec = Spec(**(dict(scale=0.1, reach=WINDOW) | spec))
  for kernel in KERNELS:
    if kernel == 'prefix_dkv' and 'prefix' not in options:
      continue
    run, arguments, limit = direct(spec, kernel, **options)
    assert limit <= common.VMEM_BYTES
    # The compiler refuses a kernel that needs more.
    monkeypatch.setattr(walk, 'VMEM_BYTES', limit)
    program = compiling.tpu(kind, run, *arguments)
    assert f'%longjax_{kernel}' in program.text


KERNELS = dict(
  forward=mosaic_tpu.run,
  dq=mosaic_tpu_backward.run_dq,
  dkv=mosaic_tpu_backward.run_dkv,
  prefix_dkv=mosaic_tpu_backward.run_prefix_dkv,
)


def direct(spec, kernel, **options):
  """(a kernel alone, its arguments, the bytes of VMEM reckoned with)."""
  x, lse, delta, dout = shapes(spec, **options)
  backward = kernel != 'forward'
  config = common.default_config(spec, x, backward=backward)
  limit = common.vmem(spec, x, config, backward=backward)
  plan = common.plan(spec, x, config)
  scalars = jax.eval_shape(functools.partial(walk.scalars, plan), x)
  if backward:
    inputs = functools.partial(mosaic_tpu_backward.inputs, plan)
    ins = jax.eval_shape(inputs, x, lse, delta, dout)
  else:
    ins = jax.eval_shape(functools.partial(common.inputs, plan), x)
  return functools.partial(KERNELS[kernel], plan), (scalars, ins), limit


@pytest.mark.parametrize('kernel', [*KERNELS])
def test_the_compiler_refuses_a_kernel_over_its_limit(kernel, monkeypatch):
  """Else the test above would show nothing."""
  run, arguments, limit = direct(Spec(0.1, reach=WINDOW), kernel, prefix=600)
  monkeypatch.setattr(walk, 'VMEM_BYTES', limit // 3)
  with pytest.raises(jax.errors.JaxRuntimeError, match='exceeded scoped vmem'):
    compiling.tpu('v5e', run, *arguments)


@pytest.mark.full
def test_thousands_of_sequences_fit_into_scalar_memory():
  """Every segment of LongNet's shortest branch at a million tokens."""
  spec = Spec(0.1, residues=(0,) * 4)
  sequences = common.SMEM_BYTES // 36 - 1
  arguments = shapes(spec, sequences=sequences, num_queries=16, size=128)
  mosaic_tpu.check(spec, arguments[0])
  compiling.tpu('v5e', functools.partial(mosaic_tpu.backward, spec), *arguments)


def moved(text, elements):
  """Shapes of the arrays of so many elements that are copied or transposed."""
  shapes = re.findall(r'= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(', text)
  return [s for s in shapes if math.prod(map(int, s.split(','))) >= elements]


@pytest.mark.parametrize(
  ('name', 'forward', 'backward'),
  [
    ('plain', 1230, 1880),
    ('head size 64', 910, 1360),
    ('dilated', 1230, 1880),
    ('prefix', 1230, 2010),
  ],
)
def test_peak_memory_of_131072_tokens(name, forward, backward):
  """In MiB, arguments and results among it; q is 256 MiB at head size 128.

  One copy of q, out, dout and dq is the change of layout, which becomes part of
  the projections in a model (below).
  """
  spec, options = VARIANTS[name]
  spec = Spec(**(dict(scale=0.1, reach=WINDOW) | spec))
  rows = 131072 // options.get('residues', 1)
  options = options | dict(num_queries=rows, heads=8)
  arguments = shapes(spec, **options)
  elements = math.prod(arguments[0].q.shape)
  program = compiling.tpu(
    'v5e', functools.partial(mosaic_tpu.forward, spec), arguments[0]
  )
  assert program.peak <= forward * MIB, program.peak / MIB
  assert len(moved(program.text, elements)) <= 2
  program = compiling.tpu(
    'v5e', functools.partial(mosaic_tpu.backward, spec), *arguments
  )
  assert program.peak <= backward * MIB, program.peak / MIB
  assert len(moved(program.text, elements)) <= 3


def test_projections_write_what_the_kernel_reads():
  """In a layer no array of q's size is copied or transposed on its own."""
  heads, kv_heads, size, rows, width = 8, 2, 128, 4096, 512
  spec = Spec(size**-0.5, reach=WINDOW)

  def layer(x, to_q, to_k, to_v, to_out):
    q, k, v = (
      jnp.einsum('gpe,ehd->gphd', x, w)[:, :, None] for w in (to_q, to_k, to_v)
    )
    operands = Operands(q, k, v, where_rows(1, left=512))
    out, _ = mosaic_tpu.forward(spec, operands)
    return jnp.einsum('gphd,hde->gpe', out[:, :, 0], to_out)

  program = compiling.tpu(
    'v5e',
    layer,
    *(
      jax.ShapeDtypeStruct(shape, jnp.bfloat16)
      for shape in (
        (1, rows, width),
        (width, heads, size),
        (width, kv_heads, size),
        (width, kv_heads, size),
        (heads, size, width),
      )
    ),
  )
  assert not moved(program.text, rows * kv_heads * size)
