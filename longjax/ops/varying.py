"""Types of arrays inside `shard_map`: which may differ between devices.

JAX keeps account of it, and wants that what a loop begins with is typed as what
it makes, and a cotangent as its primal. Outside of `shard_map` these functions
do nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _kind(x):
  return jax.typeof(x).manual_axis_type


def _axes(trees) -> frozenset[str]:
  """The mesh axes along which some array of `trees` may differ."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return frozenset()
  return frozenset().union(*(_kind(x).varying for x in jax.tree.leaves(trees)))


def _vary(x, axes):
  new = tuple(sorted(axes - _kind(x).varying)) if axes else ()
  return jax.lax.pcast(x, new, to='varying') if new else x


def alike(tree, *others):
  """The same arrays, all of which may differ if one of them or of `others` may.

  Cotangents of those that were the same everywhere are summed.
  """
  axes = _axes((tree, others))
  return jax.tree.map(lambda x: _vary(x, axes), tree) if axes else tree


def full_like(*trees) -> Callable:
  """`jnp.full`, of arrays that may differ if any of `trees` may."""
  axes = _axes(trees)
  return lambda *arguments: _vary(jnp.full(*arguments), axes)


def structs_like(structs, *trees):
  """Shapes of a kernel's results, which differ if any of `trees` may."""
  axes = _axes(trees)
  if not axes:
    return structs
  kind = _kind(_vary(jnp.int32(0), axes))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind),
    structs,
  )
