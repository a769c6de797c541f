"""The loss by pieces of the sequence: equal, and in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import DecoderLM, SlidingWindow
from longjax.training.loss import next_token_losses
from longjax.training.state import split

VOCABULARY = 13


def make(**options):
  return DecoderLM(
    VOCABULARY,
    1,
    8,
    1,
    patterns=SlidingWindow(2),
    scale_embedding=True,
    implementation='reference',
    rngs=nnx.Rngs(0),
    **options,
  )


@pytest.mark.parametrize('options', [{}, {'dropout_rate': 0.5}], ids=str)
def test_pieces_change_neither_loss_nor_gradient(options):
  merge, params = split(make(tie_embedding=False, output_bias=True, **options))
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCABULARY)
  key = jax.random.key(2) if options else None

  def run(logits):
    def loss(params):
      model = merge(params)
      return next_token_losses(
        model, tokens, dropout_key=key, logits=logits
      ).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  def direct(params):
    logits = merge(params)(tokens[:, :-1], dropout_key=key)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

  expected = jax.jit(jax.value_and_grad(direct))(params)
  # All 11 positions, and 4 of them at a time.
  for logits in (10**6, 2 * VOCABULARY * 4 + 1):
    value, gradients = run(logits)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for name, gradient in expected[1].items():
      np.testing.assert_allclose(
        gradients[name], gradient, atol=1e-7, err_msg=name
      )


@pytest.mark.usefixtures('optimised')
def test_a_large_vocabulary_needs_no_more_memory_than_a_piece():
  merge, params = split(
    DecoderLM(
      2**15, 1, 8, 1, patterns=SlidingWindow(2), remat=True, rngs=nnx.Rngs(0)
    )
  )
  tokens = jax.ShapeDtypeStruct((1, 1025), jnp.int32)

  def temporary(logits):
    def loss(params, tokens):
      return next_token_losses(merge(params), tokens, logits=logits).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, piece = temporary(2**40), temporary(2**21)
  assert whole > 2**10 * 2**15 * 4  # one sheet of logits
  assert piece < whole / 4
