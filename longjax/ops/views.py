"""Views of the sequence in which a branch's keys are a plain interval.

A view turns [B, T, H, ...] queries and [B, S, K, ...] keys into rows with the
axes [B, C, K, R, rows, ...] and [B, C, K, rows, ...] of `band`, and results
back. Dilation and LongNet's thinning are views, never masks: no work is spent
on pairs that the stride leaves out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Identity:
  """All rows as they are."""

  # Whether told distances change by one stride from row to row.
  affine = True

  def __init__(
    self,
    num_queries: int,
    num_keys: int,
    kv_heads: int,
    group: int,
    offsets: tuple = (None, None),
  ):
    self.num_rows, self.num_columns = num_queries, num_keys
    self.kv_heads, self.group = kv_heads, group
    # By how many positions the first query is after the first key.
    q_offset, k_offset = (0 if o is None else o for o in offsets)
    self.shift = q_offset - k_offset

  def queries(self, x):
    """[B, T, H, ...] -> [B, C, K, R, rows, ...]."""
    return self._split(x, 1, (self.kv_heads, self.group))

  def keys(self, x):
    """[B, S, K, ...] -> [B, C, K, rows, ...]."""
    return self._split(x, 1, (x.shape[2],))

  def restore(self, y, fill):
    """[B, C, K, R, rows, ...] -> [B, T, H, ...]; `fill` for rows left out."""
    del fill
    y = jnp.moveaxis(y, 4, 1)
    batch, rows, classes, kv_heads, group, *rest = y.shape
    return y.reshape(batch, rows * classes, kv_heads * group, *rest)

  def put(self, x, y):
    """x [B, T, H, ...] with the rows y [B, C, K, R, rows, ...] in place."""
    new, kept = self.restore(y, 0), self.kept()
    if kept is None:
      return new
    kept = _beside(x, kept.reshape(*kept.shape, *(1,) * (x.ndim - 3)))
    return jnp.where(kept, new, x)

  def kept(self):
    """Which queries have a row, bool [1, T, H]; None for all."""
    return None

  def query_values(self, x, fill):
    """Integers [b, T] of the queries -> [b, c, k, r, rows]."""
    del fill
    return x[:, None, None, None]

  def key_values(self, x, fill):
    """Integers [b, S] of the keys -> [b, c, k, r, rows]."""
    del fill
    return x[:, None, None, None]

  def first_row(self, slot):
    """The first row that holds key `slot` (in [0, S]) or a later one."""
    return slot

  def last_row(self, slot):
    """The last row that holds key `slot` (in [-1, S - 1]) or an earlier one."""
    return slot

  @staticmethod
  def _split(x, classes, heads):
    """[B, rows * classes, H, ...] -> [B, classes, *heads, rows, ...].

    One reshape and one transpose: XLA then cancels it against the inverse in
    `band`, where one class needs no copy.
    """
    batch, length, _, *rest = x.shape
    x = x.reshape(batch, length // classes, classes, *heads, *rest)
    return jnp.moveaxis(x, 1, 2 + len(heads))


def _beside(x, value):
  """`value`, where a program may make it only once it has x.

  What depends on nothing is moved out of loops (over the layers, say), and
  masks and zeros, once as large as x, would stay in memory throughout.
  """
  return jax.lax.optimization_barrier((value, jax.lax.stop_gradient(x)))[0]


def _choose(mask, x, other):
  mask, other = _beside(x, (jnp.asarray(mask), jnp.asarray(other, x.dtype)))
  return jnp.where(mask, x, other)


class Classes(Identity):
  """Residue classes of a stride: T rows become `stride` classes of T / stride.

  A query's class is its slot modulo the stride; keys are shifted by `lead`
  empty slots so that theirs agree.
  """

  def __init__(self, num_queries, num_keys, kv_heads, group, stride, offsets):
    super().__init__(num_queries, num_keys, kv_heads, group, offsets)
    self.stride = stride
    self._lead, room = -self.shift % stride, num_keys
    if not isinstance(self._lead, int):
      room = num_keys + stride - 1
    self.shift = (self.shift + self._lead) // stride
    self._slots = num_queries
    self._room = -(-room // stride) * stride
    self.num_rows = -(-num_queries // stride)
    self.num_columns = self._room // stride

  def queries(self, x):
    heads = (self.kv_heads, self.group)
    return self._split(self._pad_queries(x, 0), self.stride, heads)

  def keys(self, x):
    return self._split(self._pad_keys(x, 0), self.stride, (x.shape[2],))

  def restore(self, y, fill):
    return super().restore(y, fill)[:, : self._slots]

  def query_values(self, x, fill):
    x = self._pad_queries(x, fill)[:, :, None, None]
    return self._split(x, self.stride, (1, 1))[..., 0]

  def key_values(self, x, fill):
    x = self._pad_keys(x, fill)[:, :, None, None]
    return self._split(x, self.stride, (1, 1))[..., 0]

  def first_row(self, slot):
    return (slot + self._lead) // self.stride

  last_row = first_row

  def _pad_queries(self, x, fill):
    missing = self.num_rows * self.stride - x.shape[1]
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, missing)
    return jnp.pad(x, widths, constant_values=fill)

  def _pad_keys(self, x, fill):
    if isinstance(self._lead, int):
      widths = [(0, 0)] * x.ndim
      widths[1] = (self._lead, self._room - self._lead - x.shape[1])
      return jnp.pad(x, widths, constant_values=fill)
    room = jnp.full((x.shape[0], self._room, *x.shape[2:]), fill, x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, x, self._lead, 1)


@jax.custom_vjp
def take_rows(x, index, inverse):
  """x[:, h, index[h]] with zeros where the index is -1.

  Args:
    x: [B, H, T, ...].
    index: [H or 1, M] rows of x, each at most once, or -1.
    inverse: [H or 1, T] where in `index` each row of x is, or -1.

  The gradient is the same operation with index and inverse exchanged, so that
  there is no scatter.
  """
  return _take(x, index)


def _take(x, index, fill=0):
  extra = (1,) * (x.ndim - 3)
  index = index.reshape(1, *index.shape, *extra)
  # Index axes of size 1 broadcast: a row of x is moved as a whole.
  y = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=2)
  return jnp.where(index < 0, jnp.asarray(fill, x.dtype), y)


def _take_forward(x, index, inverse):
  return _take(x, index), (index, inverse)


def _take_backward(residuals, dy):
  index, inverse = residuals
  return _take(dy, inverse), None, None


take_rows.defvjp(_take_forward, _take_backward)


class Taken(Identity):
  """Rows taken by index, per head; keys and queries each have their own.

  Subclasses set the [H or 1, M] and [H or 1, T] arrays; None means all rows.
  """

  query_index: Int[Array, 'H M'] | None = None
  query_inverse: Int[Array, 'H T'] | None = None
  key_index: Int[Array, 'H M']
  key_inverse: Int[Array, 'H S']

  def queries(self, x):
    if self.query_index is None:
      return super().queries(x)
    x = take_rows(x.swapaxes(1, 2), self.query_index, self.query_inverse)
    return x.reshape(len(x), 1, self.kv_heads, self.group, *x.shape[2:])

  def keys(self, x):
    x = take_rows(x.swapaxes(1, 2), self.key_index, self.key_inverse)
    return x[:, None]

  def restore(self, y, fill):
    if self.query_index is None:
      return super().restore(y, fill)
    y = y.reshape(len(y), self.kv_heads * self.group, *y.shape[4:])
    return _take(y, self.query_inverse, fill).swapaxes(1, 2)

  def kept(self):
    if self.query_index is None:
      return None
    return (self.query_inverse >= 0).T[None]

  def query_values(self, x, fill):
    if self.query_index is None:
      return super().query_values(x, fill)
    return self._values(x, self.query_index, fill)

  def key_values(self, x, fill):
    return self._values(x, self.key_index, fill)

  def _values(self, x, index, fill):
    x = jnp.broadcast_to(x[:, None], (x.shape[0], len(index), x.shape[1]))
    return _take(x, index, fill)[:, None, :, None]


class Thinned(Taken):
  """LongNet's rows: of each segment those with (u mod ratio) == offset[head].

  Rows are numbered by segment, ceil(segment / ratio) in each whatever the
  head; a head whose offset leaves it one fewer has an empty row at the end.
  Each query head has kv rows of its own.
  """

  def __init__(
    self, num_queries, num_keys, segment, ratio, head_offsets, offsets
  ):
    self._segment, self._ratio = segment, ratio
    self._per_segment = -(-segment // ratio)
    q_offset, k_offset = (0 if o is None else o for o in offsets)
    head = np.asarray(head_offsets, np.int32)[:, None]
    self.query_index, self.query_inverse = self._index(
      q_offset, num_queries, head
    )
    self.key_index, self.key_inverse = self._index(k_offset, num_keys, head)
    self._k_offset = k_offset
    super().__init__(
      self.query_index.shape[1],
      self.key_index.shape[1],
      len(head_offsets),
      1,
    )
    self.shift = self._number(q_offset) - self._number(k_offset)

  def first_row(self, slot):
    first = self._number(self._k_offset)
    return self._number(self._k_offset + slot) - first

  last_row = first_row

  def _number(self, position):
    """The row that holds `position` in the head that keeps it."""
    within = position % self._segment // self._ratio
    return position // self._segment * self._per_segment + within

  def _index(self, offset, length, head):
    if isinstance(offset, int):
      count = self._number(offset + length - 1) - self._number(offset) + 1
    else:
      # Whatever the offset: one row more for every segment border.
      count = (length - 1) // self._ratio + (length - 1) // self._segment + 3
    # Computed by the program: constants as long as the sequence would take
    # memory for themselves, and long to compile.
    number = self._number(offset) + jnp.arange(count, dtype=jnp.int32)
    within = number % self._per_segment * self._ratio + head
    slot = number // self._per_segment * self._segment + within - offset
    valid = (within < self._segment) & (slot >= 0) & (slot < length)
    index = jnp.where(valid, slot, -1)
    position = offset + jnp.arange(length, dtype=jnp.int32)
    kept = position % self._segment % self._ratio == head
    inverse = jnp.where(kept, self._number(position) - self._number(offset), -1)
    return index, inverse


class Sliced(Identity):
  """`Thinned` for queries and keys that both start at position 0: no indices.

  Rows are cut into groups of `ratio`, one of which is a head's own. It is
  picked by a sum with one term and put back by a choice, which compilers join
  with what is computed before and after.
  """

  def __init__(self, num_queries, num_keys, segment, ratio, head_offsets):
    # A single segment is no longer than what it holds.
    self._segment = min(segment, max(num_queries, num_keys))
    self._ratio, self._offsets = ratio, np.asarray(head_offsets)
    self._per_segment = -(-self._segment // ratio)
    self._num_queries = num_queries
    super().__init__(
      self._segments(num_queries) * self._per_segment,
      self._segments(num_keys) * self._per_segment,
      len(head_offsets),
      1,
    )

  def queries(self, x):
    return super().queries(self._pick(x))

  def keys(self, x):
    return super().keys(self._pick(x))

  def restore(self, y, fill):
    y = super().restore(y, fill)[:, :, None]
    y = _choose(self._own(self._ratio, y.ndim), y, fill)
    batch, _, _, *rest = y.shape
    y = y.reshape(batch, -1, self._per_segment * self._ratio, *rest)
    y = y[:, :, : self._segment].reshape(batch, -1, *rest)
    return y[:, : self._num_queries]

  def kept(self):
    slot = jnp.arange(self._num_queries, dtype=jnp.int32)
    residue = slot % self._segment % self._ratio
    return (residue[:, None] == self._offsets)[None]

  def query_values(self, x, fill):
    x = self._groups(x, fill)[:, :, self._offsets]
    return x.swapaxes(1, 2)[:, None, :, None]

  key_values = query_values

  def first_row(self, slot):
    within = slot % self._segment // self._ratio
    return slot // self._segment * self._per_segment + within

  last_row = first_row

  def _segments(self, length):
    return -(-length // self._segment)

  def _groups(self, x, fill):
    """[B, length, ...] -> [B, rows, those of `ratio` that any head keeps]."""

    def pad(x, axis, size):
      widths = [(0, 0)] * x.ndim
      widths[axis] = (0, size - x.shape[axis])
      return jnp.pad(x, widths, constant_values=fill)

    batch, length, *rest = x.shape
    count = self._segments(length)
    x = pad(x, 1, count * self._segment)
    x = x.reshape(batch, count, self._segment, *rest)
    x = pad(x, 2, self._per_segment * self._ratio)
    x = x.reshape(batch, count * self._per_segment, self._ratio, *rest)
    return x[:, :, : self._offsets.max() + 1]

  def _own(self, count, ndim):
    """[count, heads, ...]: whether a row of its group is a head's own."""
    own = np.arange(count)[:, None] == self._offsets
    return own.reshape(*own.shape, *(1,) * (ndim - 4))

  def _pick(self, x):
    x = self._groups(x, 0)
    own = self._own(x.shape[2], x.ndim)
    return _choose(own, x, 0).sum(2, dtype=x.dtype)


class Columns(Taken):
  """All queries, and of each segment `width` keys from the head's column on.

  Key rows are numbered by segment, `width` in each. Each query head has key
  rows of its own.
  """

  affine = False

  def __init__(self, num_queries, num_keys, segment, columns, width, offsets):
    self._segment, self._width = segment, width
    self._first = np.asarray(columns, np.int32)[:, None]
    offset = 0 if offsets[1] is None else offsets[1]
    self._offset, self._base = offset, offset // segment * width
    if isinstance(offset, int):
      segments = (offset + num_keys - 1) // segment - offset // segment + 1
    else:
      segments = (num_keys - 1) // segment + 2  # wherever the first one begins
    row = self._base + jnp.arange(segments * width)
    slot = row // width * segment + self._first + row % width - offset
    self.key_index = jnp.where((slot >= 0) & (slot < num_keys), slot, -1)
    position = offset + jnp.arange(num_keys)
    within = position % segment - self._first
    row = position // segment * width + within - self._base
    self.key_inverse = jnp.where((within >= 0) & (within < width), row, -1)
    super().__init__(num_queries, segments * width, len(columns), 1)

  def first_row(self, slot):
    position = self._offset + slot
    # [K, 1, 1]: first columns, against slots [b, c, k, r, rows].
    within = position % self._segment - self._first[..., None]
    row = position // self._segment * self._width - self._base
    return row + jnp.clip(within, 0, self._width)

  def last_row(self, slot):
    return self.first_row(slot + 1) - 1


class Compact(Taken):
  """The selected rows, moved together in order: for packed documents.

  How many there are depends on the data, so there is room for all of them;
  the walk over blocks visits only those that there are.
  """

  affine = False

  def __init__(self, queries, keys, num_queries, kv_heads, group):
    """`queries` [H, T] (or None for all) and `keys` [H or 1, S] are masks."""
    self.key_index, self.key_inverse = self._index(keys)
    if queries is not None:
      self.query_index, self.query_inverse = self._index(queries)
    counts = jnp.cumsum(keys, axis=1)
    # before[h, s]: how many selected keys lie before slot s.
    self._before = jnp.pad(counts, ((0, 0), (1, 0)))
    super().__init__(num_queries, keys.shape[1], kv_heads, group)

  def first_row(self, slot):
    before = self._before[None, None, :, None]
    shape = jnp.broadcast_shapes(before.shape[:-1], slot.shape[:-1])
    slot = jnp.broadcast_to(slot, (*shape, slot.shape[-1]))
    before = jnp.broadcast_to(before, (*shape, before.shape[-1]))
    return jnp.take_along_axis(before, slot, axis=-1)

  def last_row(self, slot):
    return self.first_row(slot + 1) - 1

  @staticmethod
  def _index(selected):
    order = jnp.argsort(~selected, axis=1, stable=True)
    count = selected.sum(axis=1, keepdims=True)
    index = jnp.where(jnp.arange(selected.shape[1]) < count, order, -1)
    inverse = jnp.where(selected, jnp.cumsum(selected, axis=1) - 1, -1)
    return index.astype(jnp.int32), inverse.astype(jnp.int32)
