"""What devices along the sequence's mesh axis tell each other.

Every function is called inside `shard_map` and sees one shard: arrays
[batch, length, ...] of neighbouring positions, equally many on every device of
the axis, in order. All are differentiable: the cotangent of a row that was
moved goes back to the device that owns it.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def halo(x: Array, left: int, right: int, axis_name: str) -> Array:
  """The shard with `left` rows before it and `right` rows after it.

  Rows come from as many devices as hold them, a `ppermute` for each hop; those
  before the sequence's first row and after its last are zeros. Only the rows
  asked for travel: the furthest hop sends no whole shard.

  Args:
    x: [batch, length, ...], the shard.
    left, right: rows, static, >= 0.

  Returns:
    [batch, left + length + right, ...].
  """
  before = [
    _from_distance(x, rows, hop, axis_name, back=True)
    for hop, rows in _hops(left, x.shape[1])
  ]
  after = [
    _from_distance(x, rows, hop, axis_name, back=False)
    for hop, rows in _hops(right, x.shape[1])
  ]
  if not before and not after:
    return x
  return jnp.concatenate([*before[::-1], x, *after], axis=1)


def _hops(rows, length):
  """(distance in devices, rows from there), nearest first."""
  hops = -(-rows // length)
  return [
    (hop, min(length, rows - (hop - 1) * length)) for hop in range(1, hops + 1)
  ]


def _from_distance(x, rows, hop, axis_name, *, back):
  """The last (or first) rows of the shard `hop` devices before (or after)."""
  devices = jax.lax.axis_size(axis_name)
  length = x.shape[1]
  if back:
    part = jax.lax.slice_in_dim(x, length - rows, length, axis=1)
    pairs = [(i, i + hop) for i in range(devices - hop)]
  else:
    part = jax.lax.slice_in_dim(x, 0, rows, axis=1)
    pairs = [(i + hop, i) for i in range(devices - hop)]
  if not pairs:
    return jnp.zeros_like(part)
  return jax.lax.ppermute(part, axis_name, pairs)


def varying(tree, axis_name: str | Sequence[str]):
  """The same arrays, as ones that may differ between devices.

  To `shard_map`, what is the same everywhere has a cotangent that is too, and
  JAX would refuse one that is not; of these the cotangents are summed.
  """

  def cast(x):
    for axis in [axis_name] if isinstance(axis_name, str) else axis_name:
      with contextlib.suppress(ValueError):  # It does already.
        x = jax.lax.pcast(x, axis, to='varying')
    return x

  return jax.tree.map(cast, tree)


def first_rows(x: Array, rows: int, axis_name: str) -> Array:
  """The first `rows` rows of the sequence, on every device.

  Args:
    x: [batch, length, ...]; rows <= length.
  """
  mine = jax.lax.axis_index(axis_name) == 0
  rows = jax.lax.psum(jnp.where(mine, x[:, :rows], 0), axis_name)
  return varying(rows, axis_name)


def rows_at(
  x: Array,
  positions: Int[Array, 'B G'],
  first: Int[Array, ''] | Int[Array, 'B'],
  axis_name: str,
) -> Array:
  """Rows at absolute positions, wherever they are, on every device.

  Args:
    x: [batch, length, ...].
    positions: of the rows; zeros come back for those that nobody has.
    first: absolute position of this shard's first row.

  Returns:
    [batch, G, ...], typed as the same on all devices of the axis.
  """
  slots = positions - jnp.reshape(first, (-1, 1))
  mine = (slots >= 0) & (slots < x.shape[1])
  extra = (1,) * (x.ndim - 2)
  index = jnp.clip(slots, 0, x.shape[1] - 1).reshape(*slots.shape, *extra)
  rows = jnp.take_along_axis(x, index, axis=1)
  rows = jnp.where(mine.reshape(*mine.shape, *extra), rows, 0)
  return jax.lax.psum(rows, axis_name)


def gather_group(x: Array, devices: int, axis_name: str) -> Array:
  """Shards of the group of neighbouring devices that this one is in, joined.

  Args:
    x: [batch, rows, ...].
    devices: how many make a group; divides the axis.

  Returns:
    [batch, devices * rows, ...]. Only these devices send: no group sees
    another's rows. Its cotangent is summed over the group (reduce-scatter).
  """
  size = jax.lax.axis_size(axis_name)
  groups = None
  if devices != size:
    groups = [
      list(range(start, start + devices)) for start in range(0, size, devices)
    ]
  return jax.lax.all_gather(
    x, axis_name, axis=1, tiled=True, axis_index_groups=groups
  )


def merge_over_axis(
  out: Float[Array, '... E'], lse: Float[Array, '...'], axis_name: str
) -> tuple[Float[Array, '... E'], Float[Array, '...']]:
  """Merges every device's (out, lse) over its own keys, as `ops.merge` does."""
  largest = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)
  largest = jnp.where(largest == -jnp.inf, 0.0, largest)
  weight = jnp.exp(lse - largest)
  total = jax.lax.psum(weight, axis_name)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  dtype = out.dtype
  out = jax.lax.psum(out.astype(lse.dtype) * weight[..., None], axis_name)
  out = (out / total[..., None]).astype(dtype)
  return out, jnp.where(some, largest + jnp.log(total), -jnp.inf)
