"""What attention asks of a position scheme.

`logits` is the definition: the scaled logit of a query and a key that are
told a distance. Blocked implementations use the pieces below it instead.

Shape letters: B batch, T queries, S keys, H heads, D head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Position:
  """No position at all, and the base class of the schemes."""

  def check(self, num_heads: int, head_dim: int):
    """Raises ValueError if the scheme cannot serve these heads."""

  def logits(
    self,
    q: Float[Array, 'B H D'],
    k: Float[Array, 'B S H D'],
    distance: Int[Array, 'b S'],
    scale: float,
  ) -> Float[Array, 'B H S']:
    """Scaled logits of one query row against keys at told distances."""
    del distance
    return scale * inner(q, k)

  def of_heads(self, heads: Int[Array, 'N'], num_heads: int) -> 'Position':
    """The scheme for some of the `num_heads` heads, in the order given."""
    del heads, num_heads
    return self

  def rotate(
    self, x: Float[Array, '... D'], positions: Int[Array, '...']
  ) -> Float[Array, '... D']:
    """Rotates queries or keys to positions (broadcast over leading axes)."""
    del positions
    return x


def inner(q, k):
  return jnp.einsum('bhd,bshd->bhs', q, k, precision=jax.lax.Precision.HIGHEST)


def inner_pairs(q, k):
  return jnp.einsum('bshd,bshd->bhs', q, k, precision=jax.lax.Precision.HIGHEST)
