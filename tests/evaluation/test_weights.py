"""Attention weights of a layer, against what the layer does with them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.evaluation import layer_attention_weights

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 11, (2, LENGTH))


def make_model(**options):
  options = {'position': 'rope', 'num_kv_heads': 2} | options
  return longjax.DecoderLM(
    11,
    2,
    16,
    4,
    patterns=(longjax.SlidingWindow(5), longjax.Dilated((8, 16), (1, 2))),
    **options,
    rngs=nnx.Rngs(0),
  )


@pytest.mark.parametrize('layer', [0, -1])
def test_weights_are_those_the_layer_uses(layer):
  model = make_model(qk_norm=True, remat=True)
  weights = layer_attention_weights(model, TOKENS, layer)
  assert weights.shape == (2, 4, LENGTH, LENGTH)
  assert weights.dtype == np.float32
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)

  at = np.arange(LENGTH)
  pattern = model.patterns[layer]
  for head in range(4):
    seen = pattern.multiplicity(at[:, None], at, head, 4) > 0
    assert (weights[:, head][:, ~seen] == 0).all()
    assert (weights[:, head][:, seen] > 0).all()

  # The values mixed by the weights are what the block adds.
  x = model.embedding(jnp.asarray(TOKENS))
  for block in model.layers[: layer % 2]:
    x = block(x)
  block = model.layers[layer]
  normed = block.attention_norm(x)
  values = block.attention.value(normed).reshape(2, LENGTH, 2, 4)
  mixed = np.einsum('bhts,bshe->bthe', weights, np.repeat(values, 2, axis=2))
  np.testing.assert_allclose(
    block.attention.output(jnp.asarray(mixed.reshape(2, LENGTH, 16))),
    block.attention(normed),
    atol=1e-5,
  )


def test_relative_positions_and_padding():
  model = make_model(position='transformer_xl', num_kv_heads=4)
  segment_ids = np.zeros((2, LENGTH), np.int32)
  segment_ids[0, :3] = -1
  weights = layer_attention_weights(model, TOKENS, 0, segment_ids=segment_ids)
  assert (weights[0, :, :3] == 0).all() and (weights[0, :, :, :3] == 0).all()
  np.testing.assert_allclose(weights[0, :, 3:].sum(-1), 1, atol=1e-5)


def test_layers_of_one_loop_have_weights_of_their_own():
  model = longjax.DecoderLM(
    11, 2, 16, 4, patterns=longjax.Full(), scan_layers=True, rngs=nnx.Rngs(0)
  )
  first, last = (layer_attention_weights(model, TOKENS, i) for i in (0, 1))
  assert np.abs(first - last).max() > 1e-3
  assert model.scan_layers  # what was asked is left as it was


def test_what_cannot_be():
  model = make_model()
  with pytest.raises(ValueError, match='layer 2 is not one of the 2 layers'):
    layer_attention_weights(model, TOKENS, 2)
  encoder = longjax.Longformer(
    11,
    1,
    16,
    4,
    patterns=longjax.SlidingWindow(4, 4),
    max_positions=64,
    mlp_features=16,
    rngs=nnx.Rngs(0),
  )
  with pytest.raises(ValueError, match='Longformer'):
    layer_attention_weights(encoder, TOKENS, 0)
