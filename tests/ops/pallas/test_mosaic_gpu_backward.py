"""The backward kernels for GPUs, interpreted with race detection."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import UNBOUNDED, Gradients, Spec
from longjax.ops.pallas.mosaic_gpu_backward import backward
from longjax.ops.pallas.mosaic_gpu_common import HEAD_SIZES, GpuConfig
from tests.ops.pallas import oracle

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# Of the largest entry: weights, their gradients and the results are rounded.
BOUNDS = {jnp.bfloat16: 6e-3, jnp.float16: 1e-3}
F16 = jnp.float16


@pytest.fixture(autouse=True)
def _interpreter(capsys):
  """No kernel has a race, and an exception in one test is not another's."""
  yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  # The interpreter's record of races is that of the last kernel alone.
  assert 'RACE DETECTED' not in capsys.readouterr().out


def problem(*, spec=None, prefix_row=None, **operands):
  """(spec, operands, lse, delta, dout, gradients wanted)."""
  spec = spec or {}
  x = oracle.operands(dropout='dropout_rate' in spec, **operands)
  if prefix_row is not None:
    row = jnp.asarray([prefix_row], jnp.int32)
    x = x._replace(prefix=x.prefix._replace(row=row))
  spec = Spec(scale=x.q.shape[-1] ** -0.5, **spec)
  sequences, num_queries, residues, heads, _ = x.q.shape
  classes = residues if spec.residues is None else 1
  rng = np.random.default_rng(99)
  dout = jnp.asarray(rng.normal(size=x.q.shape), x.q.dtype)
  dlse = rng.normal(size=(sequences, classes, heads, num_queries))
  _, lse, delta, wanted = jax.jit(
    functools.partial(oracle.forward_and_backward, spec)
  )(x, dout, jnp.asarray(dlse, jnp.float32))
  return spec, x, lse, delta, dout, wanted


def run(spec, x, lse, delta, dout, configs=None) -> Gradients:
  call = functools.partial(backward, spec, configs=configs, interpret=INTERPRET)
  return jax.block_until_ready(jax.jit(call)(x, lse, delta, dout))


def compare(got, wanted, bound):
  """Against the dense definition, on the same narrow operands."""
  for name, a, b in zip(Gradients._fields, got, wanted, strict=True):
    if b is None:
      assert a is None, name
      continue
    assert a.shape == b.shape, name
    a, b = np.asarray(a, np.float32), np.asarray(b)
    assert np.isfinite(a).all(), name
    worst = np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)
    assert worst <= bound, f'{name} is off by {worst:.1e}'
    # Rows that see nothing, and keys that nobody sees.
    nothing = (b == 0).all(axis=-1)
    np.testing.assert_array_equal(a[nothing], 0, err_msg=name)


def check(*, configs=None, **case):
  spec, x, lse, delta, dout, wanted = problem(**case)
  got = run(spec, x, lse, delta, dout, configs)
  for name, y in zip(Gradients._fields, got, strict=True):
    if y is not None:
      narrow = name not in ('prefix_k', 'prefix_v')
      assert y.dtype == (x.q.dtype if narrow else jnp.float32), name
  compare(got, wanted, BOUNDS[x.q.dtype.type])


# What a call may have, by name: arguments of `problem`, and configs. Lengths
# are 100 and heads 1 where a case does not say: one program for each kernel,
# whose last tiles are not whole.
FULL = dict(left=UNBOUNDED, right=UNBOUNDED)
CASES = {
  # Intervals.
  'itself': dict(left=0),
  'window 1': dict(left=1),
  'window 63': dict(left=63),
  'window 64, from whole tiles': dict(left=64, num_queries=256),
  'causal': dict(left=UNBOUNDED, num_queries=200),
  'two sides': dict(left=20, right=30, heads=2),
  'all': FULL,
  'right only': dict(left=0, right=UNBOUNDED),
  'not the nearest': dict(left=60, right=-20),
  'only the nearest future': dict(left=-5, right=40),
  'nothing': dict(left=10, right=-20),
  'shift': dict(left=40, shift=50, num_keys=150),
  'shift back': dict(left=40, shift=-70),
  'shift past the end': dict(left=10, shift=500),
  'a billion back': dict(FULL, shift=2**30 - 30),
  'a billion ahead': dict(FULL, shift=30 - 2**30),
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
    f'length {n}': dict(num_queries=n, left=90, right=1)
    for n in (1, 7, 64, 129, 300)
  },
  'one query': dict(num_queries=1, num_keys=150, shift=149, left=99),
  'one key': dict(num_queries=150, num_keys=1, left=UNBOUNDED),
  # Heads, sizes, dtypes.
  'groups of heads': dict(heads=4, kv_heads=2, left=70, right=9),
  'one key head': dict(heads=3, kv_heads=1, left=70, num_queries=130),
  **{
    f'size {size} {dtype.__name__}': dict(size=size, dtype=dtype, left=70)
    for size, dtype in itertools.product(HEAD_SIZES, BOUNDS)
    if (size, dtype) != (64, jnp.bfloat16)
  },
  # Segment ids, dropout, soft cap.
  'ids': dict(ids=True, left=64, sequences=2),
  'dropout': dict(spec=dict(dropout_rate=0.3), left=64),
  'dropout, located': dict(
    spec=dict(dropout_rate=0.1),
    sequences=2,
    heads=2,
    kv_heads=1,
    num_queries=70,
    left=64,
    q_position=jnp.array([1000, 2**31 - 500]),
    k_position=jnp.array([900, 5]),
    batch_row=jnp.array([3, 4]),
    first_head=12,
  ),
  'soft cap': dict(spec=dict(soft_cap=0.5), left=64, dtype=F16),
  'ids, dropout, soft cap': dict(
    spec=dict(soft_cap=2.0, dropout_rate=0.2),
    ids=True,
    left=64,
    right=64,
    size=128,
  ),
  # Residues.
  'residues': dict(residues=3, num_queries=70, left=10),
  'residues, ids, dropout': dict(
    spec=dict(dropout_rate=0.2),
    residues=2,
    num_queries=70,
    ids=True,
    left=10,
    right=4,
  ),
  'a residue for each head': dict(
    spec=dict(residues=(0, 3, 1, 3)),
    residues=4,
    num_queries=70,
    heads=4,
    kv_heads=2,
    left=UNBOUNDED,
  ),
  'a residue for each head, ids, dropout': dict(
    spec=dict(residues=(1, 0), dropout_rate=0.2),
    residues=2,
    num_queries=70,
    heads=2,
    ids=True,
    left=10,
    right=4,
  ),
  # Prefix.
  'prefix': dict(prefix=5, left=30),
  'prefix of more than a tile': dict(prefix=140, left=30, num_queries=70),
  'prefix, not causal': dict(
    spec=dict(prefix_causal=False), prefix=20, left=30, right=20
  ),
  'prefix of its own queries, in parts': dict(
    prefix=5, prefix_q=True, left=30, num_queries=300
  ),
  'prefix, shift and end': dict(
    prefix=20, left=30, right=9, shift=40, begin=10, end=80, sequences=2
  ),
  'prefix, rows that are none of keys': dict(
    spec=dict(prefix_causal=False),
    prefix=5,
    prefix_row=[-3, 5, 69, 70, 200],
    num_queries=70,
    left=30,
    right=20,
    begin=-10,
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
      left=30,
      right=5,
      size=size,
    )
    for size in (96, 256)
  },
  # Tiles that are not the default.
  **{
    f'tiles {own}x{walk}, {stages} stages, {groups} warpgroups': dict(
      configs=(GpuConfig(own=own, walk=walk, stages=stages, groups=groups),)
      * 2,
      left=70,
      right=3,
      num_queries=200,
      prefix=3,
    )
    for own, walk, stages, groups in (
      (64, 32, 3, 1),
      (64, 64, 1, 3),
      (64, 128, 2, 2),
    )
  },
}


@pytest.mark.parametrize('name', CASES)
def test_backward_is_the_dense_definition(name):
  check(**{'num_queries': 100, 'heads': 1, **CASES[name]})


def test_parts_of_a_band_add_up():
  """With the final lse and delta each part gets its share."""
  case = dict(num_queries=100, heads=1, left=70, right=10)
  spec, x, lse, delta, dout, wanted = problem(**case)

  def part(left, right):
    where = contract.where_rows(1, left=left, right=right)
    return run(spec, x._replace(where=where), lse, delta, dout)

  near, far = part(19, 10), part(70, -20)
  got = Gradients(
    *(
      a.astype(jnp.float32) + b.astype(jnp.float32)
      for a, b in zip(near[:3], far[:3], strict=True)
    )
  )
  compare(got, wanted, 8e-3)


def test_a_row_of_lse_infinity_gets_and_gives_nothing():
  case = dict(num_queries=100, heads=1, left=30)
  spec, x, lse, delta, dout, _ = problem(**case)
  got = run(
    spec,
    x,
    lse.at[..., 40:].set(jnp.inf),
    # What delta is there does not matter, nor is it computed anywhere.
    delta.at[..., 40:].set(jnp.nan),
    dout,
  )
  assert not got.q[:, 40:].any() and got.q[:, :40].all()
  assert not got.k[:, 40:].any() and not got.v[:, 40:].any()
  assert got.k[:, :40].any(axis=-1).all()


def test_twice_the_same_is_the_same():
  case = dict(
    spec=dict(dropout_rate=0.2), num_queries=130, heads=2, kv_heads=1, prefix=5
  )
  spec, x, lse, delta, dout, _ = problem(**case)
  first, second = (run(spec, x, lse, delta, dout) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_other_intervals_are_the_same_program():
  case = dict(num_queries=70, heads=1)
  spec, *_ = problem(**case)
  call = jax.jit(functools.partial(backward, spec, interpret=INTERPRET))
  for where in (dict(left=5), dict(left=30, right=9), dict(FULL, shift=-9)):
    _, x, lse, delta, dout, wanted = problem(**case, **where)
    compare(call(x, lse, delta, dout), wanted, BOUNDS[jnp.bfloat16])
  assert call._cache_size() == 1


def test_a_prefix_of_no_keys():
  case = dict(num_queries=70, heads=1, left=5, prefix=1, prefix_q=True)
  spec, x, lse, delta, dout, _ = problem(**case)
  none = x.prefix._replace(
    k=x.prefix.k[:, :0], v=x.prefix.v[:, :0], row=x.prefix.row[:, :0]
  )
  got = run(spec, x._replace(prefix=none), lse, delta, dout)
  assert got.prefix_k.shape == got.prefix_v.shape == (1, 0, 1, 64)
  assert got.prefix_q.shape == x.q.shape and not got.prefix_q.any()


def test_what_is_refused():
  spec, x, lse, delta, dout, _ = problem(num_queries=70, heads=1, left=5)
  wide = x._replace(q=x.q.astype(jnp.float32))
  with pytest.raises(NotImplementedError, match='float32'):
    backward(spec, wide, lse, delta, dout)


# The whole grid.
GRID = list(
  itertools.product(
    (32, 64, 128),
    (jnp.bfloat16, jnp.float16),
    (
      dict(left=3),
      dict(left=100, right=50, shift=13, end=190),
      dict(left=UNBOUNDED),
    ),
    (
      {},
      dict(residues=2),
      dict(residues=2, spec=dict(residues=(1, 0, 1, 1))),
      dict(prefix=9),
      dict(prefix=70, prefix_q=True),
    ),
    (
      {},
      dict(ids=True),
      dict(spec=dict(dropout_rate=0.25)),
      dict(spec=dict(soft_cap=1.0), ids=True),
    ),
  )
)


@pytest.mark.full
@pytest.mark.parametrize('number', range(len(GRID)))
def test_grid(number):
  size, dtype, where, view, feature = GRID[number]
  spec = view.get('spec', {}) | feature.get('spec', {})
  case = where | view | feature | dict(spec=spec)
  # Lengths that are no multiples of tiles, another for each case.
  length = 65 + number * 37 % 136
  check(**case, size=size, dtype=dtype, num_queries=length, heads=4, kv_heads=2)
