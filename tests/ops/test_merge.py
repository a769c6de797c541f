"""merge: exact, differentiable, and quiet where there is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.ops import merge

rng = np.random.default_rng(0)


def softmax_part(s, v):
  """(out, lse) of float64 logits [T, S] and values [S, E]."""
  largest = s.max(-1, keepdims=True)
  p = np.exp(s - largest)
  total = p.sum(-1, keepdims=True)
  return p / total @ v, (np.log(total) + largest)[..., 0]


@pytest.mark.parametrize('cuts', [[], [4], [1, 3, 9]])
def test_merging_is_one_softmax_over_all_keys(cuts):
  s, v = 3 * rng.normal(size=(5, 12)), rng.normal(size=(12, 4))
  parts = [
    softmax_part(a, b)
    for a, b in zip(
      np.split(s, cuts, axis=1), np.split(v, cuts, axis=0), strict=True
    )
  ]
  wanted = softmax_part(s, v)
  got = merge([tuple(map(jnp.float32, part)) for part in parts])
  np.testing.assert_allclose(got[0], wanted[0], atol=1e-6)
  np.testing.assert_allclose(got[1], wanted[1], atol=1e-6)


def test_order_and_nesting_do_not_matter():
  a, b, c = (
    (jnp.float32(rng.normal(size=(6, 3))), jnp.float32(rng.normal(size=6)))
    for _ in range(3)
  )
  once = merge([a, b, c])
  for other in (merge([c, a, b]), merge([merge([b, a]), c])):
    np.testing.assert_allclose(other[0], once[0], atol=1e-6)
    np.testing.assert_allclose(other[1], once[1], atol=1e-6)


def test_parts_that_see_nothing():
  nothing = jnp.zeros((2, 3)), jnp.full(2, -jnp.inf)
  something = jnp.ones((2, 3)), jnp.asarray([0.7, -jnp.inf])
  out, lse = merge([nothing, something, nothing])
  np.testing.assert_allclose(out, [[1, 1, 1], [0, 0, 0]])
  np.testing.assert_allclose(lse, [0.7, -np.inf])

  def total(outs, lses):
    out, lse = merge(list(zip(outs, lses, strict=True)))
    return out.sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

  grads = jax.grad(total, argnums=(0, 1))(
    [nothing[0], something[0]], [nothing[1], something[1]]
  )
  assert all(np.isfinite(y).all() for y in jax.tree.leaves(grads))


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_any_size_of_lse(size):
  out, lse = merge(
    [
      (jnp.ones((1, 2)), jnp.float32([size])),
      (-jnp.ones((1, 2)), jnp.float32([size])),
    ]
  )
  np.testing.assert_allclose(out, 0)
  np.testing.assert_allclose(lse, size + np.log(2), rtol=1e-6)


def test_gradients_are_those_of_the_formula():
  outs, lses = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4))
  dout, dlse = rng.normal(size=(4, 2)), rng.normal(size=4)
  weights = np.exp(lses) / np.exp(lses).sum(0)
  merged = (weights[..., None] * outs).sum(0)
  for detach in (False, True):
    _, pull = jax.vjp(
      lambda o, l, detach=detach: merge(
        list(zip(o, l, strict=True)), detach_weights=detach
      ),
      list(jnp.float32(outs)),
      list(jnp.float32(lses)),
    )
    got_outs, got_lses = pull((jnp.float32(dout), jnp.float32(dlse)))
    np.testing.assert_allclose(got_outs, weights[..., None] * dout, atol=1e-6)
    through_weights = (dout * (outs - merged)).sum(-1)
    wanted = weights * ((0 if detach else through_weights) + dlse)
    np.testing.assert_allclose(got_lses, wanted, atol=1e-6)
