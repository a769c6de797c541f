"""How arrays lie in memory while a loop walks over their rows."""

import jax
import jax.numpy as jnp


def flat(y, axis):
  """[B, ..., rows, D] -> [B, rows, all else]; `axis` is that of the rows."""
  y = jnp.moveaxis(y, axis, 1)
  return y.reshape(*y.shape[:2], -1)


def unflat(y, shape, axis):
  """The inverse, to `shape` (but for the number of rows)."""
  shape = list(shape)
  del shape[axis]
  return jnp.moveaxis(y.reshape(*y.shape[:2], *shape[1:]), 1, axis)


class Stored:
  """An array kept as [B, rows, all else], and read by rows.

  Projections write and read it so, and nothing but the rows at hand, which are
  in cache, is transposed. Of more axes, XLA may order those of size 1 in two
  ways outside and inside of a loop, and copy the whole array in between.
  """

  def __init__(self, y, axis):
    self._flat = flat(y, axis)
    self._shape, self._axis = y.shape, axis

  @property
  def num_rows(self):
    return self._flat.shape[1]

  def rows(self, start, size):
    y = jax.lax.dynamic_slice_in_dim(self._flat, start, size, 1)
    return unflat(y, self._shape, self._axis)


class Transposed:
  """Keys [B, C, K, S, D] kept as [B, all else, S], and read by rows.

  As the right operand of q . k they would be transposed chunk by chunk, many
  times over.
  """

  def __init__(self, y):
    *leading, rows, size = y.shape
    self._shape = (*leading, size, -1)
    self._flat = jnp.swapaxes(y, 3, 4).reshape(y.shape[0], -1, rows)

  def rows(self, start, size):
    y = jax.lax.dynamic_slice_in_dim(self._flat, start, size, 2)
    return jnp.swapaxes(y.reshape(self._shape), 3, 4)
