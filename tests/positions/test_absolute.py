"""Sinusoidal embeddings against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from longjax.positions import sinusoidal


@pytest.mark.parametrize('features', [2, 64, 512])
def test_sin_then_cos_accurate_at_any_position(features):
  positions = np.array(
    [0, 1, 2, 1000, 2**20 + 1, 2**24 + 1, 2**30, -5, -(2**30)]
  )
  k = np.arange(features // 2)
  angle = positions[:, None] * 10000.0 ** (-2 * k / features)
  got = sinusoidal(jnp.asarray(positions), features)
  assert got.dtype == jnp.float32 and got.shape == (9, features)
  np.testing.assert_allclose(
    got, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=5e-5
  )


def test_any_leading_axes():
  positions = jnp.arange(6).reshape(2, 3)
  got = sinusoidal(positions, 8)
  assert got.shape == (2, 3, 8)
  np.testing.assert_array_equal(got[1, 2], sinusoidal(jnp.int32(5), 8))


@pytest.mark.parametrize('features', [0, 7, -2])
def test_odd_features_are_refused(features):
  with pytest.raises(ValueError, match=f'must be even, got {features}'):
    sinusoidal(jnp.arange(3), features)
