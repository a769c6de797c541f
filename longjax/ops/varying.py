"""Types of arrays inside `shard_map`: which may differ between devices.

JAX keeps account of it, and wants that what a loop begins with is typed as what
it makes, and that a cotangent is typed as its primal. Outside of `shard_map`
these functions do nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _zero(trees):
  """A 0 that may differ between devices if any array of `trees` may, or None.

  The compiler sees that it is a constant.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return None
  return sum(
    jax.lax.full_like(x, 0, jnp.int32, ()) for x in jax.tree.leaves(trees)
  )


def full_like(*trees) -> Callable:
  """`jnp.full`, of arrays that may differ if any of `trees` may."""
  zero = _zero(trees)
  if zero is None:
    return jnp.full

  def full(shape, value, dtype):
    return jnp.full(shape, value, dtype) + zero.astype(dtype)

  return full


def alike(tree, *others):
  """The same arrays, all of which may differ if one of them or of `others` may.

  Cotangents of those that were the same everywhere are summed.
  """
  zero = _zero((tree, others))
  if zero is None:
    return tree
  return jax.tree.map(lambda x: x + zero.astype(jnp.asarray(x).dtype), tree)
