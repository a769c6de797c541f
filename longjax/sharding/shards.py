"""What part of a model's arrays a device has.

Models are written for whole arrays [batch, length, ...]. Inside `shard_map`
they are given shards, and few layers have to know it: attention, whose keys
other devices have, whatever depends on the position, and dropout. These ask
here. Whoever calls a model says it, once, by `split`; `map_shards` does both.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from longjax.sharding import exchange
from longjax.sharding.mesh import DATA, SEQ

# The mesh axes along which batch and sequence lie now, or None.
_batch = contextvars.ContextVar('batch', default=None)
_sequence = contextvars.ContextVar('sequence', default=None)
# Of the positions here, the first of those at hand, and how many are here.
_piece = contextvars.ContextVar('piece', default=None)


@contextlib.contextmanager
def split(
  batch: str | None = None, sequence: str | None = None
) -> Iterator[None]:
  """Arrays of models are shards, while entered; inside `shard_map` only.

  Args:
    batch: the mesh axis along which batch rows lie; None where all are here.
    sequence: the mesh axis along which positions lie; None likewise.
  """
  tokens = _batch.set(batch), _sequence.set(sequence)
  try:
    yield
  finally:
    _batch.reset(tokens[0])
    _sequence.reset(tokens[1])


@contextlib.contextmanager
def piece(first, length: int) -> Iterator[None]:
  """Arrays are pieces of the `length` positions here, from number `first`."""
  token = _piece.set((first, length))
  try:
    yield
  finally:
    _piece.reset(token)


def whole_sequence():
  """Sequences are whole, while entered: a decoder's, beside a split encoder."""
  return split(_batch.get(), None)


def map_shards(f: Callable, mesh, in_specs, out_specs) -> Callable:
  """`jax.shard_map` of a function that calls models.

  Args:
    f: of shards; batch rows lie along 'data', sequences along 'seq'.
    mesh: as of `make_mesh`.
    in_specs, out_specs: of `jax.shard_map`.
  """

  def body(*arguments):
    with split(DATA, SEQ):
      return f(*arguments)

  return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def sequence_axis() -> str | None:
  """The mesh axis along which sequences are split; None where they are not."""
  return _used(_sequence.get())


def _used(axis):
  return None if axis is None or jax.lax.axis_size(axis) == 1 else axis


def here(tree):
  """Arrays that are the same on all devices, as ones that may differ.

  What a loop's carry begins with, say, when it will not be the same.
  """
  axes = tuple(axis for axis in (_batch.get(), _sequence.get()) if axis)
  return exchange.varying(tree, axes)


def first_row(rows: int):
  """Number of the first of `rows` batch rows in the whole batch."""
  axis = _used(_batch.get())
  return 0 if axis is None else jax.lax.axis_index(axis) * rows


def first_position(length: int):
  """Number of the first of `length` positions in the whole sequence."""
  start, length = _piece.get() or (0, length)
  axis = sequence_axis()
  return start if axis is None else start + jax.lax.axis_index(axis) * length


def whole_length(length: int) -> int:
  """Length of the sequence of which `length` positions are here."""
  axis = sequence_axis()
  return length if axis is None else length * jax.lax.axis_size(axis)


def sum_over_sequence(tree):
  """Of sums over the positions here, those over all of the sequence's."""
  axis = sequence_axis()
  if axis is None:
    return tree
  return exchange.varying(jax.lax.psum(tree, axis), axis)


def largest_in_sequence(x):
  """Of maxima over the positions here, those over all; not differentiable."""
  axis = sequence_axis()
  x = jax.lax.stop_gradient(x)
  return x if axis is None else exchange.varying(jax.lax.pmax(x, axis), axis)


def gather(x):
  """[batch, few, ...] of every device of the sequence, side by side."""
  axis = sequence_axis()
  if axis is None:
    return x
  return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def deal(x):
  """Of [batch, few, ...] that all devices of a sequence have, each its share.

  As `gather` puts them together again, but with zeros at the end where the
  devices do not divide `few`.
  """
  axis = sequence_axis()
  if axis is None:
    return x
  devices = jax.lax.axis_size(axis)
  share = -(-x.shape[1] // devices)
  missing = share * devices - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
  first = jax.lax.axis_index(axis) * share
  return jax.lax.dynamic_slice_in_dim(x, first, share, axis=1)


def any_in_sequence(flags):
  """Of bools, whether they are True on any device of the sequence."""
  axis = sequence_axis()
  return flags if axis is None else sum_over_sequence(flags.astype(int)) > 0


def sum_before(x):
  """Of a sum over the positions here, the sum over all positions before."""
  axis = sequence_axis()
  if axis is None:
    return jnp.zeros_like(x)
  before = jnp.arange(jax.lax.axis_size(axis)) < jax.lax.axis_index(axis)
  sums = jax.lax.all_gather(x, axis)
  return jnp.tensordot(before.astype(x.dtype), sums, 1)


def rows_at(x, positions, *, same: bool = False):
  """x[b, positions[b, g]]: rows of the sequence, wherever they are.

  Args:
    x: [batch, length, ...].
    positions: int [batch, G], counted from the whole sequence's first row; of
      those outside of it come zeros.
    same: typed as what is the same on all devices of the sequence, and may
      leave `shard_map` as such.
  """
  axis = sequence_axis()
  if axis is not None:
    first = first_position(x.shape[1])
    rows = exchange.rows_at(x, positions, first, axis)
    return rows if same else exchange.varying(rows, axis)
  inside = (positions >= 0) & (positions < x.shape[1])
  extra = (1,) * (x.ndim - 2)
  index = jnp.where(inside, positions, 0).reshape(*positions.shape, *extra)
  rows = jnp.take_along_axis(x, index, axis=1)
  return jnp.where(inside.reshape(index.shape), rows, 0)


def rows_before(x, rows: int):
  """x with as many rows before it: the sequence's, zeros before its first.

  Args:
    x: [batch, length, ...].
    rows: at most as many as a device has.
  """
  axis = sequence_axis()
  if axis is None:
    return jnp.pad(x, ((0, 0), (rows, 0), *[(0, 0)] * (x.ndim - 2)))
  return exchange.halo(x, rows, 0, axis)


def first_token(x):
  """x[:, 0] of the whole sequence, on every device."""
  axis = sequence_axis()
  if axis is None:
    return x[:, 0]
  return exchange.first_rows(x, 1, axis)[:, 0].astype(x.dtype)
