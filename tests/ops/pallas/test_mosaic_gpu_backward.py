"""The backward kernels for GPUs, interpreted; see also test_mosaic_gpu.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Gradients
from longjax.ops.pallas.mosaic_gpu_backward import backward
from tests.ops.pallas import interpreting
from tests.ops.pallas.gpu_cases import FULL
from tests.ops.pallas.interpreting import INTERPRET, assert_gradients, problem


@pytest.fixture(autouse=True)
def _interpreter(capsys):
  with interpreting.interpreter():
    yield
  assert interpreting.RACE not in capsys.readouterr().out


def run(spec, x, lse, delta, dout) -> Gradients:
  results = interpreting.backward(spec, None, x, lse, delta, dout)
  return jax.block_until_ready(results)


def test_parts_of_a_band_add_up():
  """With the final lse and delta each part gets its share."""
  case = dict(num_queries=100, heads=1, left=70, right=10)
  spec, x, dout, (_, lse, delta, wanted) = problem(**case)

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
  assert_gradients(got, wanted, 8e-3)


def test_a_row_of_lse_infinity_gets_and_gives_nothing():
  case = dict(num_queries=100, heads=1, left=30)
  spec, x, dout, (_, lse, delta, _) = problem(**case)
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
  spec, x, dout, (_, lse, delta, _) = problem(**case)
  first, second = (run(spec, x, lse, delta, dout) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_other_intervals_are_the_same_program():
  case = dict(num_queries=70, heads=1)
  spec, *_ = problem(**case)
  call = jax.jit(functools.partial(backward, spec, interpret=INTERPRET))
  for where in (dict(left=5), dict(left=30, right=9), dict(FULL, shift=-9)):
    _, x, dout, (_, lse, delta, wanted) = problem(**case, **where)
    assert_gradients(call(x, lse, delta, dout), wanted, 6e-3)
  assert call._cache_size() == 1


def test_a_prefix_of_no_keys():
  case = dict(num_queries=70, heads=1, left=5, prefix=1, prefix_q=True)
  spec, x, dout, (_, lse, delta, _) = problem(**case)
  none = x.prefix._replace(
    k=x.prefix.k[:, :0], v=x.prefix.v[:, :0], row=x.prefix.row[:, :0]
  )
  got = run(spec, x._replace(prefix=none), lse, delta, dout)
  assert got.prefix_k.shape == got.prefix_v.shape == (1, 0, 1, 64)
  assert got.prefix_q.shape == x.q.shape and not got.prefix_q.any()


def test_what_is_refused():
  spec, x, dout, (_, lse, delta, _) = problem(num_queries=70, heads=1, left=5)
  wide = x._replace(q=x.q.astype(jnp.float32))
  with pytest.raises(NotImplementedError, match='float32'):
    backward(spec, wide, lse, delta, dout)
