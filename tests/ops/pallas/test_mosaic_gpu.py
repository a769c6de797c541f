"""The forward kernel for GPUs, interpreted with race detection."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas import contract, mosaic_gpu
from longjax.ops.pallas.contract import UNBOUNDED, Spec
from longjax.ops.pallas.mosaic_gpu_common import HEAD_SIZES, GpuConfig
from tests.ops.pallas import oracle

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# Two roundings, of the weights and of the result, half a unit each.
ROUNDING = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}
F16 = jnp.float16


@pytest.fixture(autouse=True)
def _fresh_interpreter():
  """An exception in one test must not be another's."""
  yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


def races() -> bool:
  return interpret_pallas_call.get_races().races_found


def spec_of(x, **options) -> Spec:
  return Spec(scale=x.q.shape[-1] ** -0.5, **options)


def forward(spec, x, config=None):
  out, lse = jax.jit(
    lambda x: mosaic_gpu.forward(spec, x, config=config, interpret=INTERPRET)
  )(x)
  out.block_until_ready()
  assert not races(), 'the interpreter saw a race'
  return out, lse


def compare(spec, x, got):
  """Against the dense definition, on the same narrow operands."""
  out, lse = got
  want, want_lse = oracle.dense(spec, x)
  assert out.shape == want.shape and lse.shape == want_lse.shape
  assert out.dtype == x.q.dtype and lse.dtype == jnp.float32
  largest = max(float(jnp.abs(want).max()), 1e-30)
  np.testing.assert_allclose(
    out.astype(jnp.float32),
    want,
    rtol=0,
    atol=ROUNDING[x.q.dtype.type] * largest,
  )
  np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(
    jnp.where(want_lse[..., None] == -jnp.inf, jnp.moveaxis(out, 1, 3), 0), 0
  )


def check(*, spec=None, config=None, **operands):
  x = oracle.operands(**operands)
  spec = spec_of(x, **(spec or {}))
  compare(spec, x, forward(spec, x, config))


# What a call may have, by name: arguments of `oracle.operands`, and `spec`.
# 'where' is merged. Lengths are 150 where a case does not say, so that the
# last tile is never whole.
FULL = dict(left=UNBOUNDED, right=UNBOUNDED)
CASES = {
  # Intervals.
  'itself': dict(left=0),
  'window 1': dict(left=1),
  'window 63': dict(left=63),
  'window 64': dict(left=64, num_queries=256),
  'window 100': dict(left=100),
  'causal': dict(left=UNBOUNDED, num_queries=200),
  'two sides': dict(left=20, right=30),
  'all': FULL,
  'all, from whole tiles': dict(FULL, num_queries=256, heads=1),
  'right only': dict(left=0, right=UNBOUNDED),
  'not the nearest': dict(left=100, right=-20),
  'only the nearest future': dict(left=-5, right=40),
  'nothing': dict(left=10, right=-20),
  'shift': dict(left=40, shift=50, num_keys=200),
  'shift back': dict(left=40, shift=-70),
  'shift past the end': dict(left=10, shift=500),
  'begin': dict(left=80, begin=33),
  'end': dict(left=UNBOUNDED, right=5, end=70),
  'begin and end': dict(FULL, begin=65, end=66),
  'begin after end': dict(FULL, begin=66, end=65),
  'end beyond': dict(FULL, begin=-9, end=900),
  'a where for each sequence': dict(
    sequences=3,
    num_queries=70,
    left=jnp.array([5, 30, UNBOUNDED]),
    right=jnp.array([0, 10, -3]),
    shift=jnp.array([0, 7, 20]),
    begin=jnp.array([0, 11, 0]),
    end=jnp.array([70, 50, 64]),
  ),
  # Lengths.
  **{
    f'length {n}': dict(num_queries=n, sequences=2, heads=1, left=90)
    for n in (1, 7, 8, 64, 65, 127, 128, 129, 300)
  },
  'one query': dict(num_queries=1, num_keys=150, shift=149, left=99),
  'one key': dict(num_queries=150, num_keys=1, left=UNBOUNDED),
  'few keys': dict(FULL, num_keys=13, sequences=2),
  # Heads, sizes, dtypes.
  'groups of heads': dict(heads=4, kv_heads=2, left=70, right=9),
  'one key head': dict(heads=3, kv_heads=1, left=70),
  **{
    f'size {size} {dtype.__name__}': dict(size=size, dtype=dtype, left=70)
    for size, dtype in itertools.product(HEAD_SIZES, ROUNDING)
  },
  # Segment ids, dropout, soft cap.
  'ids': dict(ids=True, left=64),
  'ids, two sides': dict(ids=True, sequences=2, left=30, right=40, dtype=F16),
  'dropout': dict(spec=dict(dropout_rate=0.3), dropout=True, left=64),
  'dropout, located': dict(
    spec=dict(dropout_rate=0.1),
    dropout=True,
    sequences=2,
    heads=4,
    kv_heads=2,
    num_queries=70,
    left=64,
    q_position=jnp.array([1000, 2**31 - 500]),
    k_position=jnp.array([900, 5]),
    batch_row=jnp.array([3, 4]),
    first_head=12,
  ),
  'soft cap': dict(spec=dict(soft_cap=0.5), left=64),
  'ids, dropout, soft cap': dict(
    spec=dict(soft_cap=2.0, dropout_rate=0.2),
    ids=True,
    dropout=True,
    left=64,
    right=64,
    size=128,
  ),
  # Residues.
  'residues': dict(residues=3, num_queries=70, sequences=2, left=10),
  'residues, ids, dropout': dict(
    spec=dict(dropout_rate=0.2),
    residues=2,
    num_queries=70,
    heads=1,
    ids=True,
    dropout=True,
    left=10,
    right=4,
  ),
  'a residue for each head': dict(
    spec=dict(residues=(0, 3, 1, 3)),
    residues=4,
    num_queries=70,
    sequences=2,
    heads=4,
    kv_heads=2,
    left=UNBOUNDED,
  ),
  'a residue for each head, ids, dropout': dict(
    spec=dict(residues=(1, 0), dropout_rate=0.2),
    residues=2,
    num_queries=70,
    ids=True,
    dropout=True,
    left=10,
    right=4,
  ),
  # Prefix.
  'prefix': dict(prefix=5, left=30),
  'prefix of more than a tile': dict(prefix=140, left=30, num_queries=70),
  'prefix, not causal': dict(
    spec=dict(prefix_causal=False), prefix=20, left=30, right=20
  ),
  'prefix of its own queries': dict(prefix=5, prefix_q=True, left=30),
  'prefix, shift and end': dict(
    prefix=20, left=30, right=9, shift=40, begin=10, end=100, sequences=2
  ),
  'prefix only': dict(prefix=20, prefix_q=True, left=10, right=-20),
  'prefix, ids': dict(prefix=20, ids=True, left=30, sequences=2),
  'prefix, groups of heads': dict(
    prefix=70, prefix_q=True, heads=4, kv_heads=1, left=30, num_queries=70
  ),
  **{
    f'prefix, everything, size {size}': dict(
      spec=dict(soft_cap=2.0, dropout_rate=0.2),
      prefix=20,
      prefix_q=True,
      ids=True,
      dropout=True,
      left=30,
      right=5,
      size=size,
    )
    for size in (64, 96, 256)
  },
  # Tiles that are not the default.
  **{
    f'tiles {own}x{walk}, {stages} stages, {groups} warpgroups': dict(
      config=GpuConfig(own, walk, stages, groups, take_turns=take_turns),
      left=70,
      right=3,
      heads=1,
      num_queries=200,
    )
    for own, walk, stages, groups, take_turns in (
      (64, 64, 1, 1, True),
      (64, 64, 4, 3, True),
      (64, 64, 2, 2, False),
      (128, 64, 2, 1, False),
      (64, 128, 1, 2, True),
      (64, 192, 2, 2, True),
      (64, 32, 3, 2, True),
    )
  },
}


@pytest.mark.parametrize('name', CASES)
def test_forward_is_the_dense_definition(name):
  check(**{'num_queries': 150, **CASES[name]})


GRID = [
  dict(interval, **options, size=size, spec=spec)
  for interval in (
    dict(left=70),
    dict(left=20, right=33),
    dict(FULL, begin=30, end=140),
    dict(left=90, right=-9, shift=20),
  )
  for options in (
    {},
    dict(ids=True, heads=4, kv_heads=2),
    dict(prefix=9),
    dict(prefix=70, prefix_q=True, ids=True, sequences=2),
    dict(residues=2, sequences=2),
    dict(num_queries=257, num_keys=131),
  )
  for size in (32, 64, 128)
  for spec in ({}, dict(dropout_rate=0.2, soft_cap=3.0))
]


@pytest.mark.full
@pytest.mark.parametrize('number', range(len(GRID)))
def test_forward_over_the_grid(number):
  case = GRID[number]
  dtype = (jnp.bfloat16, jnp.float16)[number % 2]
  dropout = 'dropout_rate' in case['spec']
  check(**{'num_queries': 150, 'dtype': dtype, 'dropout': dropout, **case})


def test_a_change_of_where_traces_nothing():
  x = oracle.operands(num_queries=100, heads=1, left=0)
  spec = spec_of(x)
  # The first kernel of a process imports modules of JAX that add to what its
  # cache of traces is keyed by.
  forward(spec, x)
  traces = []

  @jax.jit
  def f(x):
    traces.append(x)
    return mosaic_gpu.forward(spec, x, interpret=INTERPRET)

  for where in (
    dict(left=5),
    dict(left=90, right=20),
    dict(left=UNBOUNDED, shift=3, begin=4, end=70),
  ):
    x = x._replace(where=contract.where_rows(1, **where))
    compare(spec, x, f(x))
  assert len(traces) == 1
  assert not races()


def test_an_empty_prefix_is_none():
  x = oracle.operands(num_queries=70, heads=1, left=9, prefix=3)
  prefix = x.prefix
  nothing = contract.Prefix(prefix.k[:, :0], prefix.v[:, :0], prefix.row[:, :0])
  spec = spec_of(x)
  got = forward(spec, x._replace(prefix=nothing))
  compare(spec, x._replace(prefix=None), got)


@pytest.mark.parametrize('end', [50, UNBOUNDED])
def test_rows_of_prefix_keys_need_not_be_rows_of_keys(end):
  x = oracle.operands(
    num_queries=100,
    num_keys=40,
    heads=1,
    left=90,
    shift=20,
    begin=-9,
    end=end,
    prefix=5,
  )
  row = jnp.array([[-30, -5, 45, 60, 100]])
  x = x._replace(prefix=x.prefix._replace(row=row))
  spec = spec_of(x)
  compare(spec, x, forward(spec, x))


def test_interpreting_by_context_is_the_same():
  x = oracle.operands(num_queries=100, heads=1, left=30)
  spec = spec_of(x)
  want = forward(spec, x)
  with plgpu.force_gpu_interpret_mode(INTERPRET):
    got = jax.jit(lambda x: mosaic_gpu.forward(spec, x))(x)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_same_call_gives_the_same_bits():
  x = oracle.operands(num_queries=150, left=60, ids=True)
  first, second = (forward(spec_of(x), x) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_nan_is_not_hidden():
  x = oracle.operands(num_queries=100, heads=1, left=3)
  x = x._replace(q=x.q.at[0, 40].set(jnp.nan))
  out, lse = forward(spec_of(x), x)
  nan = np.isnan(np.asarray(lse[0, 0, 0]))
  np.testing.assert_array_equal(np.flatnonzero(nan), [40])
  assert np.isnan(np.asarray(out[0, 40], np.float32)).all()


def test_race_detection_sees_a_missing_fence(monkeypatch):
  """Without the fence before wgmma reads what was written: results agree."""
  monkeypatch.setattr(plgpu, 'commit_smem', lambda: None)
  x = oracle.operands(num_queries=64, heads=1, left=9)
  with pytest.raises(AssertionError, match='race'):
    forward(spec_of(x), x)


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
