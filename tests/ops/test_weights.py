"""`longjax.attention_weights` against `longjax.attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax


def test_weights_times_values_are_the_attention():
  pattern = longjax.Lambda(4, 2)
  options = {
    'position': longjax.RoPE(),
    'global_tokens': np.array([[5], [7]]),
    'segment_ids': np.repeat([[-1, 0, 0, 0], [0, 0, 1, 1]], 3, axis=1),
  }
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], [2, 12, 4, 8])
  k, v = (jax.random.normal(key, [2, 12, 2, 8]) for key in keys[1:])
  weights = longjax.attention_weights(q, k, pattern, **options)
  out = jnp.einsum('bhts,bshe->bthe', weights, jnp.repeat(v, 2, axis=2))
  np.testing.assert_allclose(
    out, longjax.attention(q, k, v, pattern, **options), atol=1e-5
  )
  sums = weights.sum(-1)
  np.testing.assert_allclose(sums, (sums > 0.5).astype(np.float32), atol=1e-5)


def test_half_precision_and_mistakes():
  q = jnp.ones([1, 4, 2, 8], jnp.bfloat16)
  assert longjax.attention_weights(q, q, longjax.Full()).dtype == jnp.float32
  with pytest.raises(ValueError, match='pattern must be a longjax Pattern'):
    longjax.attention_weights(q, q, 'full')
