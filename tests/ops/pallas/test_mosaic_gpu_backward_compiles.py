"""The backward kernels compile for an H200, within registers and memory."""

import jax
import jax.numpy as jnp
import pytest

from longjax.ops.pallas import mosaic_gpu_backward as module
from longjax.ops.pallas.contract import Operands, Spec, where_rows
from longjax.ops.pallas.mosaic_gpu_common import (
  SHARED_MEMORY,
  GpuConfig,
)
from tests.ops.pallas import compiling, oracle
from tests.ops.pallas.gpu_cases import ALSO_COMPILED, COMPILED, FEATURES

# Bytes that a thread may spill in the tiles we ship, the most of all kernels;
# else none. Where the sums of dK and dV lie side by side, they take 128 (or 96)
# of 240 registers, and the slope of the soft cap 32 beside logits and weights.
SPILLS = {(96, 'everything'): 4, (128, 'soft cap'): 4, (128, 'everything'): 4}


def compiled(size, *, spec=None, configs=None, dtype=jnp.bfloat16, **options):
  """Kernels by name."""
  spec = Spec(scale=size**-0.5, **(spec or {}))
  x, lse = jax.eval_shape(
    lambda: _arguments(
      spec,
      oracle.operands(
        num_queries=1024,
        heads=4,
        kv_heads=2,
        size=size,
        left=100,
        dtype=dtype,
        dropout=spec.dropout_rate > 0,
        **options,
      ),
    )
  )
  program = compiling.gpu(
    lambda *y: module.backward(spec, *y, configs=configs), x, lse, lse, x.q
  )
  kernels = {}
  for kernel in program.kernels:
    name = kernel.name.removesuffix('_mosaic_gpu_kernel').rpartition('_')[2]
    assert not kernel.serialized, 'ptxas puts waits between the products'
    # Head size 256 has two kernels of one name.
    old = kernels.get(name, kernel)
    kernels[name] = max(kernel, old, key=lambda y: y.spills)
  # What our estimates say, on which the choice of tiles rests.
  shared = program.shared_memory
  for name, config in zip(('dq', 'dkv'), configs or (None, None), strict=True):
    assert module.shared_memory(name, spec, x, config) in shared, name
  assert max(shared) <= SHARED_MEMORY
  return kernels


def _arguments(spec, x):
  sequences, num_queries, residues, heads, _ = x.q.shape
  classes = residues if spec.residues is None else 1
  return x, jnp.zeros((sequences, classes, heads, num_queries))


def check(size, feature):
  kernels = compiled(size, **FEATURES[feature])
  names = {'dq', 'dkv'}
  if 'prefix' in FEATURES[feature]:
    names.add('prefix')
  assert kernels.keys() == names
  for name, kernel in kernels.items():
    assert kernel.spills <= SPILLS.get((size, feature), 0), name
    # Those of the launch. With two compute warpgroups, 168 for all three, of
    # which the kernel makes 240 for each of two and 24 for the memory
    # warpgroup; with one, what there is.
    third = 'prefix_q' in FEATURES[feature]
    alone = name == 'prefix' or (name == 'dq' and size == 256 and third)
    assert kernel.registers <= (255 if alone else 168), name


@pytest.mark.parametrize('size, feature', COMPILED)
def test_shipped_tiles_fit(size, feature):
  check(size, feature)


@pytest.mark.full
@pytest.mark.parametrize('size, feature', ALSO_COMPILED)
def test_all_shipped_tiles_fit(size, feature):
  check(size, feature)


def test_float16_fits():
  for kernel in compiled(64, dtype=jnp.float16).values():
    assert kernel.spills == 0


@pytest.mark.parametrize(
  'config',
  [
    GpuConfig(groups=1),
    GpuConfig(groups=3),
    GpuConfig(walk=32, stages=3),
    GpuConfig(p_in_smem=True),
  ],
  ids=['1 group', '3 groups', 'walk 32', 'shared memory'],
)
def test_other_tiles_compile(config):
  for kernel in compiled(64, configs=(config, config)).values():
    # Three warpgroups have 160 registers a thread instead of 240.
    assert kernel.spills <= (80 if config.groups == 3 else 0)


# --- A layer of 131,072 tokens -----------------------------------------------

LENGTH, HEADS, SIZE = 131072, 8, 128
ARRAY = LENGTH * HEADS * SIZE * 2
LSE = LENGTH * HEADS * 4
VIEWS = {
  'window': {},
  'dilated': dict(residues=4),
  'segments': dict(segments=32),
  'LongNet': dict(segments=32, residues=2, thinned=True),
}


@pytest.mark.parametrize('name', VIEWS)
def test_little_but_arguments_and_results_is_in_memory(name):
  spec, x, lse, share = layer(**VIEWS[name])
  program = compiling.gpu(
    lambda *y: module.backward(spec, *y), x, lse, lse, x.q
  )
  # lse in units of log 2, and delta.
  assert program.temporary <= 2 * LSE // share + 4096
  # q, k, v and dout; dq, dk and dv.
  arrays = (4 + 3 / share) * ARRAY
  assert program.peak <= arrays + 4 * LSE // share + 2**20
  # Strided views are read as they lie.
  for word in (' copy(', ' transpose(', ' gather(', ' pad(', ' slice('):
    assert word not in program.text


def layer(*, segments=1, residues=1, thinned=False):
  """(spec, shapes of operands and of lse, rows for each that is selected)."""
  rows = LENGTH // residues // segments
  y = jax.ShapeDtypeStruct(
    (segments, rows, residues, HEADS, SIZE), jnp.bfloat16
  )
  where = jax.eval_shape(lambda: where_rows(segments, left=512))
  chosen = tuple(h % residues for h in range(HEADS)) if thinned else None
  spec = Spec(scale=SIZE**-0.5, residues=chosen)
  classes = 1 if thinned else residues
  lse = jax.ShapeDtypeStruct((segments, classes, HEADS, rows), jnp.float32)
  return spec, Operands(y, y, y, where), lse, residues if thinned else 1
