"""The attention layer against the same computation written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.nn import Attention
from longjax.nn.embedding import (
  distances,
  relative_embedding,
  token_positions,
)

WINDOW = longjax.SlidingWindow(3, 2)


def make(pattern=WINDOW, features=8, num_heads=2, **kwargs):
  return Attention(
    features, num_heads, pattern=pattern, rngs=nnx.Rngs(0), **kwargs
  )


def inputs(length=9, features=8, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, length, features))


def test_layer_is_projections_around_attention():
  layer = make(num_heads=4, num_kv_heads=2, qk_norm=True, position='rope')
  x = inputs()

  def heads(kernel, n):
    return (x @ kernel[...]).reshape(2, 9, n, 2)

  def rms(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

  expected = longjax.attention(
    rms(heads(layer.query.kernel, 4)),
    rms(heads(layer.key.kernel, 2)),
    heads(layer.value.kernel, 2),
    WINDOW,
    position=longjax.RoPE(),
  ).reshape(2, 9, 8)
  np.testing.assert_allclose(
    layer(x), expected @ layer.output.kernel[...], atol=1e-6
  )


def test_transformer_xl_written_out():
  """[(q + u) . k + (q + v) . W_r r_(i - j)] / sqrt(D), also for keys ahead."""
  layer = make(position='transformer_xl')
  x = inputs()
  u, v = jax.random.normal(jax.random.key(1), (2, 2, 4))
  relative = relative_embedding(u, v, [WINDOW], 2, 8, span=8)
  assert relative.min_distance == -2 and len(relative.embeddings) == 6

  def heads(y, kernel):
    return (y @ kernel[...]).reshape(*y.shape[:-1], 2, 4)

  q, k, value = (
    heads(x, p.kernel) for p in (layer.query, layer.key, layer.value)
  )
  away = np.arange(9)[:, None] - np.arange(9)
  r = heads(longjax.positions.sinusoidal(away, 8), layer.relative.kernel)
  logits = jnp.einsum('bihd,bjhd->bhij', q + u, k)
  logits += jnp.einsum('bihd,ijhd->bhij', q + v, r)
  logits = jnp.where((away <= 3) & (away >= -2), logits / 2, -jnp.inf)
  out = jnp.einsum('bhij,bjhd->bihd', jax.nn.softmax(logits), value)
  np.testing.assert_allclose(
    layer(x, relative=relative),
    out.reshape(2, 9, 8) @ layer.output.kernel[...],
    atol=1e-6,
  )
  # The table is cut to the sequence: a longer one gives the same.
  long = relative_embedding(u, v, [WINDOW], 2, 8, span=100)
  np.testing.assert_allclose(
    layer(x, relative=long), layer(x, relative=relative), atol=1e-7
  )


@pytest.mark.parametrize(
  'pattern',
  [
    longjax.SlidingWindow(3, 1, dilation=(1, 2)),
    longjax.Lambda(window=4, start=2),
    longjax.Lambda(window=4, start=0),
    longjax.Lambda(window=4, start=2, ceiling=False),
    longjax.DistanceCeiling(window=4),
    longjax.AttentionSinks(window=4, start=2),
    longjax.SelfExtend(window=4, group=3),
    longjax.Dilated((4, 8), (1, 2)),
    longjax.Full(),
  ],
)
def test_distances_cover_all_that_the_pattern_tells(pattern):
  for length in (1, 2, 5, 6, 20):
    q, k = np.arange(length)[:, None], np.arange(length)
    seen = sum(
      pattern.multiplicity(q, k, head, 2) + np.zeros_like(q - k)
      for head in range(2)
    )
    told = (pattern.distance(q, k) + 0 * seen)[seen > 0]
    first, last = distances(pattern, 2, length - 1)
    assert first <= told.min() and told.max() <= last
    # Projecting the table costs time: nothing beyond reach or length.
    assert last <= told.max() + 1


def test_attention_dropout_only_with_a_key():
  layer, x = make(dropout_rate=0.5), inputs()
  key = jax.random.key(3)
  dropped = layer(x, dropout_key=key)
  np.testing.assert_array_equal(dropped, layer(x, dropout_key=key))
  assert jnp.abs(dropped - layer(x)).max() > 1e-3
  np.testing.assert_array_equal(layer(x), make()(x))


def test_bfloat16_activations_float32_parameters():
  layer = make(
    dtype='bfloat16', qk_norm=True, position='transformer_xl', use_bias=True
  )
  parameters = jax.tree.leaves(nnx.state(layer))
  assert {p.dtype for p in parameters} == {jnp.dtype('float32')}
  biases = jnp.zeros((2, 2, 4))
  relative = relative_embedding(*biases, [WINDOW], 2, 8, 8, jnp.bfloat16)
  out = layer(inputs().astype(jnp.bfloat16), relative=relative)
  assert out.dtype == jnp.bfloat16


def test_token_positions():
  np.testing.assert_array_equal(token_positions(5, 3), [[5, 6, 7]])
  np.testing.assert_array_equal(
    token_positions(jnp.asarray([5, 0]), 2), [[5, 6], [0, 1]]
  )
  segments = jnp.asarray([[-1, 7, 7, 2, 2, -1]])
  np.testing.assert_array_equal(
    token_positions(0, 6, segments), [[0, 0, 1, 0, 1, 0]]
  )


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(features=9), 'features=9 is not divisible by num_heads=2'),
    (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=2'),
    (dict(num_kv_heads=0), 'num_kv_heads=0 does not divide num_heads=2'),
    (dict(position='ropes'), "'ropes' is not one of .*'rope', 'xpos', 'alibi'"),
    (
      dict(position=longjax.ALiBi(np.ones(2))),
      'a scheme without arrays',
    ),
    (dict(position='rope', head_dim=3), 'RoPE rotates pairs'),
    (
      dict(pattern=longjax.SlidingWindow(1, dilation=(1, 2, 3))),
      '3 dilations .* for 2 heads',
    ),
    (dict(dropout_rate=1.0), r'must be in \[0, 1\), got 1.0'),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)


def test_transformer_xl_needs_its_shared_part():
  with pytest.raises(ValueError, match='needs relative='):
    make(position='transformer_xl')(inputs())
