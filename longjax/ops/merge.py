"""Merging of attention results over disjoint (multi)sets of keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
  parts: Sequence[tuple[Float[Array, '... E'], Float[Array, '...']]],
  *,
  detach_weights: bool = False,
) -> tuple[Float[Array, '... E'], Float[Array, '...']]:
  """Merges (out, lse) pairs exactly, as one softmax over all their keys.

  The weight of part i is exp(lse_i) / sum_m exp(lse_m): LongNet's equation 10.
  A part that sees nothing has lse -inf and weight 0; where no part sees
  anything the result is 0 with lse -inf.

  Args:
    parts: pairs of an output and the log of its softmax denominator.
    detach_weights: let no gradient pass through the weights.

  Returns:
    The merged (out, lse).
  """
  if len(parts) == 1:
    return parts[0]
  lses = jnp.stack([lse for _, lse in parts])
  largest = jax.lax.stop_gradient(lses.max(axis=0))
  largest = jnp.where(largest == -jnp.inf, 0.0, largest)
  weights = jnp.exp(lses - largest)
  total = weights.sum(axis=0)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
  weights = weights / total
  if detach_weights:
    weights = jax.lax.stop_gradient(weights)
  out = sum(w[..., None] * o for w, (o, _) in zip(weights, parts, strict=True))
  return out, lse
