"""Absolute position embeddings, added to the token embeddings."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.positions.rotary import angles


def sinusoidal(
  positions: Int[Array, '...'], features: int
) -> Float[Array, '... features']:
  """concat(sin, cos) of positions times 10000^(-2k / features), float32.

  The angles are reduced exactly, so positions up to 2**30 (of either sign) are
  as accurate as small ones. (Learned absolute positions are a table: see
  `longjax.nn`.)
  """
  if features % 2 or features < 2:
    raise ValueError(f'sinusoidal features must be even, got {features}')
  inverse_frequency = 10000.0 ** (-np.arange(0, features, 2) / features)
  angle = angles(positions, inverse_frequency)
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
