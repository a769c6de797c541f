"""The forward kernel compiles for an H200, within its registers and memory."""

import jax
import jax.numpy as jnp
import pytest

from longjax.ops.pallas import mosaic_gpu
from longjax.ops.pallas.contract import Operands, Spec, where_rows
from longjax.ops.pallas.mosaic_gpu_common import SHARED_MEMORY, GpuConfig
from tests.ops.pallas import compiling, oracle
from tests.ops.pallas.gpu_cases import ALSO_COMPILED, COMPILED, FEATURES


def compiled(size, *, spec=None, config=None, dtype=jnp.bfloat16, **options):
  spec = Spec(scale=size**-0.5, **(spec or {}))
  x = jax.eval_shape(
    lambda: oracle.operands(
      num_queries=1024,
      heads=4,
      kv_heads=2,
      size=size,
      left=100,
      dtype=dtype,
      dropout=spec.dropout_rate > 0,
      **options,
    )
  )
  program = compiling.gpu(
    lambda x: mosaic_gpu.forward(spec, x, config=config), x
  )
  (kernel,) = program.kernels
  (shared,) = program.shared_memory
  # What our estimate says, on which the choice of tiles rests.
  assert shared == mosaic_gpu.shared_memory(spec, x, config) <= SHARED_MEMORY
  assert not kernel.serialized, 'ptxas puts waits between the products'
  return kernel


def check(size, feature):
  kernel = compiled(size, **FEATURES[feature])
  assert kernel.spills == 0
  # Those of the launch, for three warpgroups; the kernel makes it 240 for each
  # of the two that compute, and 24.
  assert kernel.registers <= 168


@pytest.mark.parametrize('size, feature', COMPILED)
def test_shipped_tiles_fit(size, feature):
  check(size, feature)


@pytest.mark.full
@pytest.mark.parametrize('size, feature', ALSO_COMPILED)
def test_all_shipped_tiles_fit(size, feature):
  check(size, feature)


@pytest.mark.parametrize('size', (64, 128))
def test_float16_fits(size):
  assert compiled(size, dtype=jnp.float16).spills == 0


@pytest.mark.parametrize(
  'config',
  [
    GpuConfig(walk=64, groups=1),
    GpuConfig(walk=64, stages=4, groups=2),
    GpuConfig(walk=64, groups=3),
    GpuConfig(walk=64, p_in_smem=True),
  ],
  ids=['1 group', '4 stages', '3 groups', 'shared memory'],
)
def test_other_tiles_compile(config):
  assert compiled(64, config=config).spills == 0


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
def test_nothing_but_arguments_and_results_is_in_memory(name):
  spec, x, results = layer(**VIEWS[name])
  program = compiling.gpu(lambda x: mosaic_gpu.forward(spec, x), x)
  assert program.temporary <= 4096
  assert program.peak <= 3 * ARRAY + results + 2**20
  # Strided views are read as they lie.
  for word in (' copy(', ' transpose(', ' gather(', ' pad(', ' slice('):
    assert word not in program.text


def layer(*, segments=1, residues=1, thinned=False):
  """(spec, shapes, bytes of the results) of one sequence."""
  rows = LENGTH // residues // segments
  y = jax.ShapeDtypeStruct(
    (segments, rows, residues, HEADS, SIZE), jnp.bfloat16
  )
  where = jax.eval_shape(lambda: where_rows(segments, left=512))
  chosen = tuple(h % residues for h in range(HEADS)) if thinned else None
  spec = Spec(scale=SIZE**-0.5, residues=chosen)
  results = (ARRAY + LSE) // (residues if thinned else 1)
  return spec, Operands(y, y, y, where), results
