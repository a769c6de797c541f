"""The kernels for GPUs, interpreted with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas import contract, mosaic_gpu
from longjax.ops.pallas.contract import UNBOUNDED, Spec
from longjax.ops.pallas.mosaic_gpu_common import GpuConfig
from tests.ops.pallas import interpreting, oracle
from tests.ops.pallas.gpu_cases import CASES, GRID, MORE_CASES, of_grid


@pytest.fixture(autouse=True)
def _interpreter(capsys):
  with interpreting.interpreter():
    yield
  assert interpreting.RACE not in capsys.readouterr().out


def spec_of(x, **options) -> Spec:
  return Spec(scale=x.q.shape[-1] ** -0.5, **options)


def forward(x):
  return jax.block_until_ready(interpreting.forward(spec_of(x), None, x))


# --- Forward and backward ----------------------------------------------------


@pytest.mark.parametrize('name', CASES)
def test_kernels_are_the_dense_definition(name):
  interpreting.check(**CASES[name])


@pytest.mark.full
@pytest.mark.parametrize('name', MORE_CASES)
def test_kernels_are_the_dense_definition_too(name):
  interpreting.check(**MORE_CASES[name])


@pytest.mark.full
@pytest.mark.parametrize('number', range(len(GRID)))
def test_kernels_over_the_grid(number):
  for case in of_grid(number):
    interpreting.check(**case)


def test_there_are_a_hundred_short_cases():
  assert len(CASES) >= 100
  assert max(case['num_queries'] for case in CASES.values()) <= 300


# --- Forward -----------------------------------------------------------------


def test_a_change_of_where_traces_nothing():
  x = oracle.operands(num_queries=100, heads=1, left=0)
  spec = spec_of(x)
  # The first kernel of a process imports modules of JAX that add to what its
  # cache of traces is keyed by.
  forward(x)
  traces = []

  @jax.jit
  def f(x):
    traces.append(x)
    return mosaic_gpu.forward(spec, x, interpret=interpreting.INTERPRET)

  for where in (
    dict(left=5),
    dict(left=90, right=20),
    dict(left=UNBOUNDED, shift=3, begin=4, end=70),
  ):
    x = x._replace(where=contract.where_rows(1, **where))
    got = jax.block_until_ready(f(x))  # before anything else is dispatched
    interpreting.assert_forward(x, got, interpreting.dense(spec, x))
  assert len(traces) == 1


def test_an_empty_prefix_is_none():
  x = oracle.operands(num_queries=70, heads=1, left=9, prefix=3)
  prefix = x.prefix
  nothing = contract.Prefix(prefix.k[:, :0], prefix.v[:, :0], prefix.row[:, :0])
  got = forward(x._replace(prefix=nothing))
  x = x._replace(prefix=None)
  interpreting.assert_forward(x, got, interpreting.dense(spec_of(x), x))


def test_interpreting_by_context_is_the_same():
  x = oracle.operands(num_queries=100, heads=1, left=30)
  wanted = forward(x)
  with plgpu.force_gpu_interpret_mode(interpreting.INTERPRET):
    got = jax.jit(lambda x: mosaic_gpu.forward(spec_of(x), x))(x)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_same_call_gives_the_same_bits():
  x = oracle.operands(num_queries=150, left=60, ids=True)
  for a, b in zip(forward(x), forward(x), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_nan_is_not_hidden():
  x = oracle.operands(num_queries=100, heads=1, left=3)
  x = x._replace(q=x.q.at[0, 40].set(jnp.nan))
  out, lse = forward(x)
  nan = np.isnan(np.asarray(lse[0, 0, 0]))
  np.testing.assert_array_equal(np.flatnonzero(nan), [40])
  assert np.isnan(np.asarray(out[0, 40], np.float32)).all()


def test_race_detection_sees_a_missing_fence(monkeypatch, capsys):
  """Without the fence before wgmma reads what was written: results agree."""
  monkeypatch.setattr(plgpu, 'commit_smem', lambda: None)
  x = oracle.operands(num_queries=64, heads=1, left=9)
  jax.block_until_ready(
    jax.jit(
      lambda x: mosaic_gpu.forward(
        spec_of(x), x, interpret=interpreting.INTERPRET
      )
    )(x)
  )
  assert interpreting.RACE in capsys.readouterr().out


# --- What is refused ---------------------------------------------------------


def refusal(x, **options):
  spec = spec_of(x, **options)
  with pytest.raises(NotImplementedError) as error:
    mosaic_gpu.forward(spec, x)
  return str(error.value)


def test_refuses_float32():
  assert 'float32' in refusal(oracle.operands(dtype=jnp.float32))


def test_refuses_mixed_dtypes():
  x = oracle.operands()
  assert 'float16' in refusal(x._replace(v=x.v.astype(jnp.float16)))


@pytest.mark.parametrize('size', [16, 48, 80, 192, 512])
def test_refuses_other_head_sizes(size):
  assert f'head size {size}' in refusal(oracle.operands(size=size))


def test_refuses_another_value_size():
  x = oracle.operands()
  reason = refusal(x._replace(v=x.v[..., :32]))
  assert 'value size 32' in reason


def test_refuses_a_prefix_with_residues():
  x = oracle.operands(residues=2)
  x = x._replace(prefix=oracle.operands(prefix=3).prefix)
  assert 'one residue, not 2' in refusal(x)


def test_refuses_heads_that_do_not_divide():
  x = oracle.operands(heads=3)
  x = x._replace(k=x.k[:, :, :, :2], v=x.v[:, :, :, :2])
  assert '3 heads' in refusal(x)


@pytest.mark.parametrize('scale', [0.0, -1.0])
def test_refuses_a_scale_that_is_not_positive(scale):
  with pytest.raises(NotImplementedError, match='positive scale'):
    mosaic_gpu.check(Spec(scale=scale), oracle.operands())


@pytest.mark.parametrize(
  'tiles', [dict(own=32), dict(walk=48), dict(stages=0), dict(groups=4)]
)
def test_a_config_that_cannot_be_says_so(tiles):
  with pytest.raises(ValueError, match=next(iter(tiles))):
    GpuConfig(**tiles)
