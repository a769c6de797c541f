"""Blocks: norms, the four MLPs, where dropout applies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.nn import MLP, Block, dropout
from longjax.nn.transformer import make_norm

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def gelu(x):
  return x * jax.scipy.stats.norm.cdf(x)


@pytest.mark.parametrize(
  ('mlp', 'hidden'),
  [
    ('gelu', lambda gate, up: gelu(up)),
    ('relu2', lambda gate, up: jnp.maximum(up, 0) ** 2),
    ('swiglu', lambda gate, up: gate * jax.nn.sigmoid(gate) * up),
    ('geglu', lambda gate, up: gelu(gate) * up),
  ],
)
def test_mlp_written_out(mlp, hidden):
  module = MLP(8, 12, mlp=mlp, use_bias=True, rngs=nnx.Rngs(0))
  gate = None if module.gate is None else X @ module.gate.kernel[...]
  expected = hidden(gate, X @ module.up.kernel[...])
  expected = expected @ module.down.kernel[...]
  np.testing.assert_allclose(module(X), expected, atol=1e-6)


def test_norms_are_float32_and_do_not_cancel():
  x = (1000 + X).astype(jnp.float32)
  layer = make_norm('layer', 8, rngs=nnx.Rngs(0))
  x64 = np.asarray(x, np.float64)
  centred = x64 - x64.mean(-1, keepdims=True)
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(layer(x), expected, atol=2e-4)
  for norm in ('layer', 'rms'):
    module = make_norm(norm, 8, rngs=nnx.Rngs(0))
    assert module(X.astype(jnp.bfloat16)).dtype == jnp.float32
  scale = make_norm('layer', 4096, scale_std=0.02, rngs=nnx.Rngs(0)).scale[...]
  assert abs(scale.mean() - 1) < 2e-3 and abs(scale.std() - 0.02) < 2e-3


def test_dropout():
  x = jnp.ones((100, 100))
  key = jax.random.key(0)
  y = dropout(x, 0.25, key)
  # 10,000 draws: five standard deviations are 0.022.
  assert abs((y == 0).mean() - 0.25) < 0.022
  np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)
  assert (dropout(x, 0.25, key, site=1) != y).any()
  assert dropout(x, 0.25, None) is x and dropout(x, 0.0, key) is x


def test_block_written_out():
  block = Block(
    8, 2, pattern=longjax.SlidingWindow(2), norm='rms', rngs=nnx.Rngs(0)
  )
  x = X + block.attention(block.attention_norm(X))
  x = x + block.mlp(block.mlp_norm(x))
  np.testing.assert_allclose(block(X), x, atol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match="'relu' is not one of .*'swiglu'"):
    MLP(8, 8, mlp='relu', rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="'batch' is not one of .*'rms'"):
    make_norm('batch', 8, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='dropout_rate must be in'):
    MLP(8, 8, dropout_rate=-0.1, rngs=nnx.Rngs(0))
