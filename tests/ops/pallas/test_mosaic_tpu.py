"""The Mosaic TPU kernels against the definition, interpreted on a CPU.

What varies most, `where`, is traced: the cases of one structure share what was
compiled. Plain interpretation is quick; `pltpu.InterpretParams` simulates the
memories, so that reads out of bounds, what was never written and races come to
light: every kind of structure goes through it too, all of them in the full
grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from longjax.ops.pallas import mosaic_tpu
from longjax.ops.pallas import mosaic_tpu_common as common
from longjax.ops.pallas.contract import UNBOUNDED, Spec
from longjax.ops.pallas.mosaic_tpu_common import TpuConfig
from tests.ops.helpers import QUICK
from tests.ops.pallas import oracle

F32, BF16 = jnp.float32, jnp.bfloat16
SIMULATED = pltpu.InterpretParams(detect_races=True)
# Relative to the largest entry of each array.
BOUNDS = {
  F32: dict(out=2e-6, lse=2e-6, gradient=2e-5),
  BF16: dict(out=6e-3, lse=2e-5, gradient=8e-3),
}

# Of two sequences; lengths are about 200.
WHERE = dict(
  causal=dict(left=[63, UNBOUNDED], right=0),
  two_sided=dict(left=[30, 128], right=[20, 127]),
  ahead_left_out=dict(left=[90, UNBOUNDED], right=[-10, -64]),
  shifted=dict(
    left=[80, 100], right=[0, 5], shift=[37, -60], begin=[20, 0], end=[150, 90]
  ),
  nothing=dict(left=[0, 50], right=[0, -60], end=[UNBOUNDED, 40]),
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def kernels(spec, config, interpret, x, lse, delta, dout):
  """Forward and backward; as jit's cache: one entry for each structure."""
  configs = None if config is None else (config, config)
  options = dict(interpret=interpret)
  results = mosaic_tpu.forward(spec, x, config=config, **options)
  gradients = mosaic_tpu.backward(
    spec, x, lse, delta, dout, configs=configs, **options
  )
  return results, gradients


definition = functools.partial(
  jax.jit, static_argnums=0, compiler_options=QUICK
)(oracle.forward_and_backward)


def cotangents(spec, x):
  rng = np.random.default_rng(7)
  sequences, rows, residues, heads, _ = x.q.shape
  classes = 1 if spec.residues else residues
  dlse = rng.normal(size=(sequences, classes, heads, rows))
  return (
    jnp.asarray(rng.normal(size=x.q.shape), x.q.dtype),
    jnp.asarray(dlse, F32),
  )


def assert_near(name, got, wanted, bound):
  got, wanted = (np.asarray(y, np.float64) for y in (got, wanted))
  assert got.shape == wanted.shape, name
  if name == 'lse':
    np.testing.assert_array_equal(got == -np.inf, wanted == -np.inf)
    got, wanted = (np.where(y == -np.inf, 0, y) for y in (got, wanted))
  assert np.isfinite(got).all(), name
  worst, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
  assert worst <= bound * largest, f'{name} is off by {worst / largest:.2e}'


def check(spec, x, *, config=None, interpret=True):
  """Kernels equal the definition, forward and backward."""
  dout, dlse = cotangents(spec, x)
  out, lse, delta, wanted = definition(spec, x, dout, dlse)
  (got_out, got_lse), got = kernels(
    spec, config, interpret, x, lse, delta, dout
  )
  bounds = BOUNDS[x.q.dtype.type]
  assert got_out.dtype == x.q.dtype and got_lse.dtype == F32
  assert_near('out', got_out, out, bounds['out'])
  assert_near('lse', got_lse, lse, bounds['lse'])
  for name, a, b in zip(got._fields, got, wanted, strict=True):
    if b is None:
      assert a is None, name
      continue
    narrow = x.q.dtype if name in ('q', 'k', 'v') else F32
    assert a.dtype == narrow, name
    assert_near(name, a, b, bounds['gradient'])


def operands(where='causal', **options):
  options = dict(num_queries=200, heads=2, size=32, dtype=F32) | options
  numbers = dict(
    q_position=[1000, 5], k_position=[990, 7], batch_row=[3, 4], first_head=2
  )
  numbers |= WHERE[where] if isinstance(where, str) else where
  numbers = {name: jnp.asarray(n) for name, n in numbers.items()}
  return oracle.operands(3, sequences=2, **options, **numbers)


SMALL = TpuConfig(128, 128)
STEPPED = TpuConfig(128, 384, 128)
# name: (spec, options of `operands`, tiles)
STRUCTURES = {
  'plain': ({}, {}, SMALL),
  'bfloat16': ({}, dict(dtype=BF16, size=64), SMALL),
  'reach': (dict(reach=(128, 127)), dict(num_queries=300), STEPPED),
  'wide tiles of keys': ({}, dict(num_keys=300), TpuConfig(128, 256, 128)),
  'wide tiles of queries': ({}, dict(num_queries=300), TpuConfig(256, 128)),
  'default tiles': ({}, dict(num_queries=129, num_keys=257), None),
  'one query': ({}, dict(num_queries=1, num_keys=70), SMALL),
  'few queries': ({}, dict(num_queries=7, num_keys=300), SMALL),
  'few keys': ({}, dict(num_queries=131, num_keys=3), SMALL),
  'whole tiles': ({}, dict(num_queries=128, num_keys=256), SMALL),
  'grouped heads': ({}, dict(heads=4, kv_heads=2), SMALL),
  'one kv head': ({}, dict(heads=3, kv_heads=1, dtype=BF16), SMALL),
  'head size 8': ({}, dict(size=8), SMALL),
  'head size 40': ({}, dict(size=40, dtype=BF16), SMALL),
  'head size 96': ({}, dict(size=96, dtype=BF16), SMALL),
  'head size 128': ({}, dict(size=128, dtype=BF16), SMALL),
  'head size 256': ({}, dict(size=256, num_queries=140), SMALL),
  'soft cap': (dict(soft_cap=2.0), {}, SMALL),
  'segment ids': ({}, dict(ids=True), SMALL),
  'dropout': (dict(dropout_rate=0.3), dict(dropout=True), SMALL),
  'dilated': ({}, dict(residues=2, num_queries=150), SMALL),
  'dilated, everything': (
    dict(soft_cap=3.0, dropout_rate=0.2),
    dict(residues=3, dropout=True, ids=True, num_queries=70, num_keys=140),
    STEPPED,
  ),
  'thinned': (
    dict(residues=(0, 2, 1, 2)),
    dict(residues=3, heads=4, kv_heads=2, num_queries=140),
    SMALL,
  ),
  'thinned, everything': (
    dict(residues=(1, 0, 0), soft_cap=3.0, dropout_rate=0.2),
    dict(residues=2, heads=3, kv_heads=1, dropout=True, ids=True, dtype=BF16),
    SMALL,
  ),
  'prefix': ({}, dict(prefix=5), SMALL),
  'prefix, both ways': (
    dict(prefix_causal=False),
    dict(prefix=20, heads=4, kv_heads=2, dtype=BF16),
    SMALL,
  ),
  'prefix of many tiles': ({}, dict(prefix=130, num_queries=140), SMALL),
  'prefix, own queries': ({}, dict(prefix=10, prefix_q=True), SMALL),
  'prefix, everything': (
    dict(soft_cap=3.0, dropout_rate=0.2, reach=(UNBOUNDED, 127)),
    dict(
      heads=4,
      kv_heads=2,
      prefix=9,
      prefix_q=True,
      dropout=True,
      ids=True,
      dtype=BF16,
      num_queries=140,
      num_keys=260,
    ),
    TpuConfig(128, 256, 128),
  ),
}
SIMULATED_STRUCTURES = (
  'few keys',
  'reach',
  'default tiles',
  'grouped heads',
  'dilated, everything',
  'thinned, everything',
  'prefix of many tiles',
  'prefix, everything',
)


SIMULATED_WHERE = 'shifted'


def structure(name, where):
  spec, options, config = STRUCTURES[name]
  x = operands(where, **options)
  spec = dict(scale=1.3 * x.q.shape[-1] ** -0.5) | spec
  return Spec(**spec), x, config


def excessive(name, where):
  """Whether `where` goes beyond the reach that the structure promises."""
  reach = STRUCTURES[name][0].get('reach', (UNBOUNDED, UNBOUNDED))
  numbers = WHERE[where]
  most = np.max(numbers['left']), np.max(numbers['right'])
  return most[0] > reach[0] or most[1] > reach[1]


CASES = [
  pair for pair in itertools.product(STRUCTURES, WHERE) if not excessive(*pair)
]
SIMULATED_CASES = [
  (name, where)
  for name, where in CASES
  if name in SIMULATED_STRUCTURES and where == SIMULATED_WHERE
]


@pytest.mark.parametrize(('name', 'where'), CASES)
def test_equals_the_definition(name, where):
  spec, x, config = structure(name, where)
  check(spec, x, config=config)


@pytest.mark.parametrize(('name', 'where'), SIMULATED_CASES)
def test_equals_the_definition_in_simulated_memory(name, where):
  spec, x, config = structure(name, where)
  check(spec, x, config=config, interpret=SIMULATED)


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'where'),
  [pair for pair in CASES if pair not in SIMULATED_CASES],
)
def test_equals_the_definition_in_simulated_memory_too(name, where):
  spec, x, config = structure(name, where)
  check(spec, x, config=config, interpret=SIMULATED)


@pytest.mark.full
@pytest.mark.parametrize('dtype', [F32, BF16])
@pytest.mark.parametrize(
  'tiles', [(128, 128), (128, 256, 128), (256, 384, 128)]
)
@pytest.mark.parametrize('lengths', [(1, 1), (127, 129), (300, 130), (257, 40)])
@pytest.mark.parametrize(
  'features',
  [
    {},
    dict(ids=True, dropout=True),
    dict(residues=2),
    dict(residues=4, thinned=(3, 0, 1, 1), ids=True, dropout=True),
    dict(prefix=7, dropout=True),
    dict(prefix=140, prefix_q=True, ids=True),
  ],
  ids=lambda features: ' '.join(features) or 'plain',
)
def test_whole_grid(features, lengths, tiles, dtype):
  features = dict(features)
  spec = Spec(
    scale=0.2,
    soft_cap=4.0 if dtype == F32 else None,
    dropout_rate=0.25 if 'dropout' in features else 0.0,
    residues=features.pop('thinned', None),
  )
  queries, keys = lengths
  for where in WHERE:
    x = operands(
      where,
      num_queries=queries,
      num_keys=keys,
      heads=4,
      kv_heads=2,
      size=64,
      dtype=dtype,
      **features,
    )
    check(spec, x, config=TpuConfig(*tiles))


def test_kernels_compile_once_for_all_windows_and_shards():
  before = kernels._cache_size()
  for where in WHERE:
    check(Spec(0.17), operands(where, num_queries=33), config=SMALL)
  assert kernels._cache_size() == before + 1


def test_rows_without_a_denominator_get_and_give_no_gradient():
  spec, x = Spec(0.2), operands('two_sided')
  dout, dlse = cotangents(spec, x)
  none = np.zeros(dlse.shape, bool)
  none[..., 40:43] = none[..., 150] = True
  quiet = np.moveaxis(none, -1, 1)[..., None]
  _, lse, delta, wanted = definition(
    spec, x, jnp.where(quiet, 0, dout), jnp.where(none, 0, dlse)
  )
  # What such rows are given otherwise does not matter.
  lse, delta = jnp.where(none, jnp.inf, lse), jnp.where(none, jnp.nan, delta)
  _, got = kernels(spec, SMALL, True, x, lse, delta, dout)
  for name in ('q', 'k', 'v'):
    a, b = getattr(got, name), getattr(wanted, name)
    assert_near(name, a, b, BOUNDS[F32]['gradient'])
  assert not np.asarray(got.q)[np.broadcast_to(quiet, got.q.shape)].any()


def test_gradients_of_two_bands_add_up_to_those_of_both():
  """lse and delta are of the result into which a band was merged."""
  spec = Spec(0.2)
  x = operands(dict(left=150, right=20))
  dout, dlse = cotangents(spec, x)
  _, lse, delta, wanted = definition(spec, x, dout, dlse)
  parts = []
  for begin, end in ((0, 90), (90, UNBOUNDED)):
    part = operands(dict(left=150, right=20, begin=begin, end=end))
    _, gradients = kernels(spec, SMALL, True, part, lse, delta, dout)
    parts.append(gradients)
  for name in ('q', 'k', 'v'):
    got = sum(getattr(part, name) for part in parts)
    assert_near(name, got, getattr(wanted, name), BOUNDS[F32]['gradient'])


@pytest.mark.full
def test_sums_have_one_order_whatever_the_order_of_programs():
  spec, x, config = structure('prefix, everything', 'two_sided')
  dout, _ = cotangents(spec, x)
  shape = x.q.shape[0], 1, x.q.shape[3], x.q.shape[1]
  lse, delta = jnp.full(shape, 2.0), jnp.zeros(shape)
  results = [
    kernels(
      spec,
      config,
      pltpu.InterpretParams(random_seed=seed),
      x,
      lse,
      delta,
      dout,
    )
    for seed in (1, 2)
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_tiles_are_whole_lanes():
  with pytest.raises(ValueError, match='block_k must be a multiple of 128'):
    TpuConfig(128, 96)


def test_default_tiles_fit_into_vmem():
  for size, dtype in itertools.product((8, 64, 128, 256), (F32, BF16)):
    for backward, prefix in itertools.product((False, True), (0, 5000)):
      make = functools.partial(
        oracle.operands,
        num_queries=8192,
        size=size,
        dtype=dtype,
        prefix=prefix,
        prefix_q=bool(prefix),
      )
      x, spec = jax.eval_shape(make), Spec(1.0)
      config = common.default_config(spec, x, backward=backward)
      need = common.vmem(spec, x, config, backward=backward)
      assert need <= common.VMEM_BYTES
      assert min(config.block_q, config.block_k) >= 256


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    (dict(dtype=jnp.float16), 'not in float16'),
    (dict(size=36), 'multiple of 8 up to 256, got 36'),
    (dict(size=264), 'multiple of 8 up to 256, got 264'),
    (dict(residues=2, prefix=3), 'one residue, got 2'),
    (dict(sequences=2**15), '32768 sequences'),
  ],
)
def test_refusals(options, reason):
  make = functools.partial(oracle.operands, num_queries=8, **options)
  x, spec = jax.eval_shape(make), Spec(1.0)
  with pytest.raises(NotImplementedError, match=reason):
    mosaic_tpu.check(spec, x)
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(functools.partial(mosaic_tpu.forward, spec), x)
  stats = x.q.shape[0], x.q.shape[2], x.q.shape[3], x.q.shape[1]
  stats = jax.ShapeDtypeStruct(stats, F32)
  backward = functools.partial(mosaic_tpu.backward, spec)
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(backward, x, stats, stats, x.q)


def test_refuses_values_of_another_width():
  x = jax.eval_shape(functools.partial(oracle.operands, num_queries=8))
  narrow = jax.ShapeDtypeStruct((*x.v.shape[:-1], 32), x.v.dtype)
  with pytest.raises(NotImplementedError, match='got 32 and 64'):
    mosaic_tpu.check(Spec(1.0), x._replace(v=narrow))


def test_interprets_as_the_context_says():
  spec, x = Spec(0.2), operands(num_queries=20)
  with pltpu.force_tpu_interpret_mode():
    out, lse = jax.jit(functools.partial(mosaic_tpu.forward, spec))(x)
  wanted, wanted_lse = oracle.dense(spec, x)
  assert_near('out', out, wanted, BOUNDS[F32]['out'])
  assert_near('lse', lse, wanted_lse, BOUNDS[F32]['lse'])


def test_a_config_that_would_not_fit_is_known_to(monkeypatch):
  x = jax.eval_shape(functools.partial(oracle.operands, num_queries=8192))
  spec = Spec(1.0)
  large = TpuConfig(4096, 4096)
  assert common.vmem(spec, x, large) > common.VMEM_BYTES
  assert common.vmem(spec, x, large, backward=True) > common.VMEM_BYTES
