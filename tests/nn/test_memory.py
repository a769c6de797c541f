"""Ways to keep less for the backward pass change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import DecoderLM, Dilated, SlidingWindow
from longjax.nn.memory import POLICIES, checkpointed, in_pieces

TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (2, 12), 0, 11))


def gradients(num_layers=2, **options):
  """(loss, {name: gradient}, products in the program) of a small decoder."""
  model = DecoderLM(
    11,
    num_layers,
    16,
    2,
    patterns=Dilated((8,), (2,)),
    rngs=nnx.Rngs(0),
    **options,
  )
  graphdef, params = nnx.split(model, nnx.Param)

  @jax.value_and_grad
  def loss(params):
    key = jax.random.key(0) if options.get('dropout_rate') else None
    logits = nnx.merge(graphdef, params)(TOKENS, dropout_key=key)
    return jnp.square(logits).mean()

  value, grads = jax.jit(loss)(params)
  jaxpr = jax.make_jaxpr(loss)(params).jaxpr
  grads = {'.'.join(map(str, p)): g[...] for p, g in nnx.to_flat_state(grads)}
  return value, grads, count_products(jaxpr)


def count_products(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == 'dot_general'
    for parameter in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        total += count_products(inner)
  return total


@functools.cache
def plain():
  return gradients()


def check(found, expected):
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  for name, gradient in expected[1].items():
    np.testing.assert_allclose(
      found[1][name], gradient, atol=1e-6, err_msg=name
    )


def test_policies_change_what_is_computed_again_and_no_gradient():
  expected = gradients(1)
  products = {False: expected[2]}
  for name in POLICIES:
    found = gradients(1, remat=name)
    check(found, expected)
    products[name] = found[2]
  # Attention has 2 products.
  assert products['block'] - products['attention'] == 2
  assert products['dots'] - products[False] == 2
  assert products['block'] > products['dots']


def test_pieces_of_the_mlp_and_a_loop_over_layers_change_nothing():
  # 12 positions in pieces of 5, 5 and 2.
  found = gradients(remat=True, mlp_piece=5, scan_layers=True)
  check(found, plain())
  # The program holds one layer: fewer products, though some are computed again.
  assert found[2] < plain()[2]


@pytest.mark.full
def test_loops_over_layers_and_pieces_drop_the_same():
  options = dict(dropout_rate=0.5)
  plain = gradients(**options)
  check(gradients(scan_layers=True, **options), plain)
  check(gradients(mlp_piece=5, **options), plain)


@pytest.mark.parametrize('size', [1, 4, 7, 100])
def test_in_pieces(size):
  x = jax.random.normal(jax.random.key(0), (2, 12, 3))
  weights = jax.random.normal(jax.random.key(1), (3, 5))

  @jax.jit
  @jax.value_and_grad
  def cut(weights, x):
    def f(x, y):
      return jnp.sin(x @ weights) * y

    return jnp.square(in_pieces(f, size, x, x[..., :1])).sum()

  @jax.jit
  @jax.value_and_grad
  def whole(weights, x):
    return jnp.square(jnp.sin(x @ weights) * x[..., :1]).sum()

  for got, wanted in zip(cut(weights, x), whole(weights, x), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=2e-6)


def test_errors():
  with pytest.raises(ValueError, match="'everything' is not one of .'block'"):
    DecoderLM(
      11, 1, 8, 1, patterns=SlidingWindow(1), remat='everything', rngs=None
    )
  with pytest.raises(ValueError, match='scan_layers needs one pattern'):
    DecoderLM(
      11,
      2,
      8,
      1,
      patterns=[SlidingWindow(1), SlidingWindow(2)],
      scan_layers=True,
      rngs=None,
    )
  with pytest.raises(ValueError, match='mlp_piece must be at least 1, got 0'):
    DecoderLM(
      11, 1, 8, 1, patterns=SlidingWindow(1), mlp_piece=0, rngs=nnx.Rngs(0)
    )
  for blocks, message in ((0, 'at least 1, got 0'), (2, '2 does not divide')):
    with pytest.raises(ValueError, match=f'remat_blocks .*{message}'):
      DecoderLM(
        11,
        3,
        8,
        1,
        patterns=SlidingWindow(1),
        remat_blocks=blocks,
        scan_layers=True,
        rngs=nnx.Rngs(0),
      )
  assert checkpointed(abs, False) is abs
