"""Interprets the GPU kernels with race detection, against the definition."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas import mosaic_gpu
from longjax.ops.pallas.contract import Gradients, Spec
from tests.ops.pallas import oracle

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# Of the largest entry. Two roundings of out, of the weights and of the result,
# half a unit each; gradients add those of the weights' gradients, whose sums
# may be much smaller than they are. float16 has three bits more.
BOUNDS = {
  jnp.bfloat16: dict(out=2.0**-8, gradient=8e-3),
  jnp.float16: dict(out=2.0**-11, gradient=1e-3),
}


# Said by the interpreter, whose own record is that of the last kernel alone.
RACE = 'RACE DETECTED'


@contextlib.contextmanager
def interpreter():
  """An exception in one kernel is not another's."""
  try:
    yield
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(spec, config, x):
  """(out, lse); like the others here, jit's cache has one for each structure,
  since `where` is traced.
  """
  return mosaic_gpu.forward(spec, x, config=config, interpret=INTERPRET)


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(spec, configs, x, lse, delta, dout):
  return mosaic_gpu.backward(
    spec, x, lse, delta, dout, configs=configs, interpret=INTERPRET
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(spec, config, x, lse, delta, dout):
  configs = None if config is None else (config, config)
  return forward(spec, config, x), backward(spec, configs, x, lse, delta, dout)


dense = functools.partial(jax.jit, static_argnums=0)(oracle.dense)
_definition = functools.partial(jax.jit, static_argnums=0)(
  oracle.forward_and_backward
)


def problem(*, spec=None, prefix_row=None, **operands):
  """(spec, operands, dout, (out, lse, delta, gradients) wanted)."""
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
  wanted = _definition(spec, x, dout, jnp.asarray(dlse, jnp.float32))
  return spec, x, dout, wanted


def check(*, config=None, **case):
  """All kernels of the case equal the definition on its narrow operands."""
  spec, x, dout, (out, lse, delta, gradients) = problem(**case)
  results = _both(spec, config, x, lse, delta, dout)
  (got_out, got_lse), got = jax.block_until_ready(results)
  assert_forward(x, (got_out, got_lse), (out, lse))
  for name, y in zip(Gradients._fields, got, strict=True):
    if y is not None:
      narrow = name not in ('prefix_k', 'prefix_v')
      assert y.dtype == (x.q.dtype if narrow else jnp.float32), name
  assert_gradients(got, gradients, BOUNDS[x.q.dtype.type]['gradient'])


def assert_forward(x, got, wanted):
  out, lse = got
  want, want_lse = wanted
  assert out.shape == want.shape and lse.shape == want_lse.shape
  assert out.dtype == x.q.dtype and lse.dtype == jnp.float32
  out, want, lse, want_lse = map(np.asarray, (out, want, lse, want_lse))
  largest = max(np.abs(want).max(), 1e-30)
  bound = BOUNDS[x.q.dtype.type]['out'] * largest
  np.testing.assert_allclose(
    out.astype(np.float32), want, rtol=0, atol=bound, err_msg='out'
  )
  np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5, err_msg='lse')
  nothing = want_lse == -np.inf
  assert not np.moveaxis(out, 1, 3)[nothing].any()


def assert_gradients(got, wanted, bound):
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
