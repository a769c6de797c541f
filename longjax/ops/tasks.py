"""What the XLA path computes one after the other: branches and global keys.

A task plans one call of `band` from the integers of a call (which rows, in
which view, visiting which keys), shows it the queries and keys as its distance
tells the position scheme, and brings results and cotangents back.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longjax.ops import band, tile, views
from longjax.ops.coordinates import Coordinates
from longjax.ops.encode import (
  Auxiliary,
  Encoded,
  table_and_slopes,
  take_heads,
  told,
)
from longjax.ops.merge import merge
from longjax.ops.varying import alike
from longjax.patterns import Branch
from longjax.patterns.base import FURTHEST
from longjax.positions import ALiBi, TransformerXL, XPos

# Queries in a block, keys visited at a time, and how many keys a block may see
# for them to be visited all at once. Measured on CPU; see the benchmarks.
BLOCK = 64
CHUNK = 512
SINGLE = 1024


def tasks_of(static, x, auxiliary):
  num_heads = x.q.shape[2]
  tasks = [
    BranchTask(static, x, branch, auxiliary.where)
    for branch in static.pattern.branches(num_heads)
  ]
  if auxiliary.global_tokens is not None:
    tasks.append(GlobalTask(static, x))
  return tasks


class _Plan(NamedTuple):
  view: Any
  config: tile.Config
  rows: tile.Rows
  columns: tile.Columns
  walk: tile.Walk


class _Task:
  """One call of `band`: how it is planned, run and differentiated."""

  heads: tuple[int, ...] | None = None
  stride = 1
  # Whether each batch row has a view of its own, which depends on the data.
  by_row = False

  def __init__(self, static, x):
    self.static = static
    _, self.num_queries, self.num_heads, _ = x.q.shape
    self.num_keys, self.kv_heads = x.k.shape[1:3]
    self.position = x.position

  def forward(self, encoded, position, auxiliary, merged=()):
    """(out [B, T, H, E], lse [B, T, H]) of the task's heads.

    Merged with such results, if given; only the rows that take part are.
    """

    def run(encoded, auxiliary, *merged):
      plan = self.plan(auxiliary)
      x = self.operands(plan, auxiliary, encoded, position)
      out, lse = band.forward(
        plan.config, x, plan.rows, plan.columns, plan.walk
      )
      if not merged:
        return plan.view.restore(out, 0), plan.view.restore(lse, -jnp.inf)
      mine = tuple(map(plan.view.queries, merged))
      return tuple(
        plan.view.put(y, new)
        for y, new in zip(merged, merge([mine, (out, lse)]), strict=True)
      )

    return self._each(run, encoded, auxiliary, *merged)

  def backward(self, encoded, position, auxiliary, lse, delta, dout):
    """Cotangents of `encoded` and `position`."""
    heads = self.heads
    if heads is not None:
      lse, delta, dout = (take_heads(y, heads, 2) for y in (lse, delta, dout))

    def run(encoded, auxiliary, lse, delta, dout):
      plan = self.plan(auxiliary)

      def operands(encoded, position):
        x = self.operands(plan, auxiliary, encoded, position)
        return alike(x, plan.rows, plan.columns, plan.walk, lse, delta, dout)

      x, pull = jax.vjp(operands, encoded, position)
      d = band.backward(
        plan.config,
        x,
        plan.rows,
        plan.columns,
        plan.walk,
        *(plan.view.queries(y) for y in (lse, delta, dout)),
      )
      return pull(jax.tree.map(lambda d, y: d.astype(y.dtype), d, x))

    d, dposition = self._each(run, encoded, auxiliary, lse, delta, dout)
    if self.by_row:
      dposition = jax.tree.map(lambda y: y.sum(0), dposition)
    return d, dposition

  def _each(self, run, encoded, auxiliary, *more):
    """Runs on the whole batch, or row by row where rows have own views."""
    if not self.by_row:
      return run(encoded, auxiliary, *more)
    batch = encoded.q.shape[0]

    def one(encoded, auxiliary, *more):
      grow = functools.partial(jax.tree.map, lambda y: y[None])
      where = auxiliary.where
      where = grow(where)._replace(
        # An offset is a scalar for one row.
        q_offset=where.q_offset,
        k_offset=where.k_offset,
      )
      auxiliary = auxiliary._replace(
        where=where,
        batch_row=auxiliary.batch_row[None],
      )
      result = run(grow(encoded), auxiliary, *grow(more))
      if isinstance(result[0], Encoded):
        return jax.tree.map(lambda y: y[0], result[0]), result[1]
      return jax.tree.map(lambda y: y[0], result)

    where = auxiliary.where
    # Offsets lose their last axis to vmap, the others keep theirs.
    where = jax.tree.map(
      lambda y: jnp.broadcast_to(y, (batch, *y.shape[1:])), where
    )
    auxiliary = auxiliary._replace(where=where, global_tokens=None)
    axes = Auxiliary(where=0, global_tokens=None, seed=None, batch_row=0)
    return jax.vmap(one, in_axes=(0, axes, *(0 for _ in more)))(
      encoded, auxiliary, *more
    )

  def config(self, view, span, **more):
    """Block sizes, where a query sees `span` neighbouring keys at most."""
    static = self.static
    xpos = self.position if isinstance(self.position, XPos) else None
    largest = BLOCK
    if xpos is not None:
      # Its damping is computed around one query of a block, so that a block
      # must not span more positions than may lie between a query and a key
      # ahead of it. A segment's border may double the stride.
      scattered = not static.contiguous or isinstance(view, views.Compact)
      step = 2 * self.stride * self.distance.step
      span_limit = 1 if scattered else xpos.furthest_ahead() // step
      largest = max(1, min(largest, span_limit))
    # Blocks of one size, so that little of the last one is padding.
    count = -(-view.num_rows // largest)
    block = -(-view.num_rows // count)
    # The block and what its first and last query see beyond it.
    visited = min(span + block - 1, view.num_columns)
    single = visited <= SINGLE
    chunk = int(visited) if single else min(CHUNK, view.num_columns)
    heads = self.heads or tuple(range(self.num_heads))
    return tile.Config(
      block=block,
      chunk=chunk,
      single=single,
      scale=static.scale,
      soft_cap=static.soft_cap,
      dropout_rate=static.dropout_rate,
      heads=heads,
      xpos=xpos,
      **more,
    )

  def rows_and_columns(self, view, where, lo, hi, k_pos, **more):
    """Rows and Columns of a view, without what nobody asks for."""
    q_told = k_told = q_abs = k_abs = None
    if isinstance(self.position, ALiBi | TransformerXL | XPos):
      q_told, k_told = told(self.static, where, self.distance)
    if self.static.dropout_rate:
      q_abs, k_abs = where.q_abs, where.k_abs
    queries = functools.partial(self._values, view.query_values)
    keys = functools.partial(self._values, view.key_values)
    rows = tile.Rows(
      lo=queries(lo, 1),
      hi=queries(hi, 0),
      doc=queries(where.q_doc, -1),
      absolute=queries(q_abs, 0),
      told=queries(q_told, -1),
      **more,
    )
    columns = tile.Columns(
      pos=keys(k_pos, tile.NOWHERE),
      doc=keys(where.k_doc, -2),
      absolute=keys(k_abs, 0),
      told=keys(k_told, 0),
    )
    return rows, columns

  @staticmethod
  def _values(transform, x, fill):
    return None if x is None else transform(x, fill)


def _intervals(where, lo, hi):
  """Bounds that tokens outside of all documents have: none."""
  nobody = where.q_pos < 0
  lo, hi = jnp.where(nobody, 1, lo), jnp.where(nobody, 0, hi)
  return lo, hi, jnp.where(where.k_pos < 0, tile.NOWHERE, where.k_pos)


class BranchTask(_Task):
  """A branch of the pattern."""

  def __init__(self, static, x, branch: Branch, where: Coordinates):
    super().__init__(static, x)
    self.branch = branch
    self.heads, self.distance = branch.heads, branch.distance
    self.stride = branch.stride
    # In packed documents, start keys and selected rows are where the data says.
    self.packed = (
      static.contiguous
      and where.q_doc is not None
      and (self._selects or branch.start != math.inf)
    )
    own_offsets = any(
      y is not None and y.ndim for y in (where.q_offset, where.k_offset)
    )
    self.by_row = self.packed or own_offsets

  def plan(self, auxiliary):
    branch, where = self.branch, auxiliary.where
    lo, hi = branch.bounds(where.q_pos)
    lo, hi, k_pos = _intervals(where, lo, hi)
    if not self.static.contiguous:
      return self._plan_anywhere(auxiliary, lo, hi, k_pos)
    view, span = self._view(where)
    rows, columns = self.rows_and_columns(view, where, lo, hi, k_pos)
    skewed = view.affine and self.distance.affine and self._table_covers(where)
    config = self.config(
      view, span, skewed=skewed, table_start=self._table_start(skewed)
    )
    first, last = self._visited(view, config.block, where, lo, hi)
    walk = tile.Walk(
      first, last, view.shift, auxiliary.seed, auxiliary.batch_row
    )
    return _Plan(view, config, rows, columns, walk)

  def operands(self, plan, auxiliary, encoded, position):
    del auxiliary
    view, config = plan.view, plan.config
    q, k, v, relative_q = encoded
    if self.heads is not None:
      q = take_heads(q, self.heads, 2)
      relative_q = (
        None if relative_q is None else take_heads(relative_q, self.heads, 2)
      )
    if self._own_kv_heads:
      k, v = (take_heads(y, self._kv_heads_of(), 2) for y in (k, v))
    return band.Operands(
      view.queries(q),
      view.keys(k),
      view.keys(v),
      None if relative_q is None else view.queries(relative_q),
      *table_and_slopes(
        position, config, self.num_heads, self._layout, self.stride
      ),
    )

  @property
  def _selects(self) -> bool:
    """Whether each head has keys of its own."""
    return self.branch.offsets is not None or self.branch.columns is not None

  # How kv heads are laid out: as they are, or one for each query head.

  @property
  def _own_kv_heads(self) -> bool:
    selected = self._selects and self.static.contiguous
    return self.heads is not None or selected

  def _kv_heads_of(self):
    repeats = self.num_heads // self.kv_heads
    return np.asarray(self.heads or range(self.num_heads)) // repeats

  @property
  def _layout(self):
    if self._own_kv_heads:
      return len(self.heads or range(self.num_heads)), 1
    return self.kv_heads, self.num_heads // self.kv_heads

  def _view(self, where):
    """The branch's view and how many keys a query may see in it."""
    branch, stride = self.branch, self.stride
    offsets = where.q_offset, where.k_offset
    sizes = self.num_queries, self.num_keys
    if self.packed:
      return self._compact_view(where.q_pos[0], where.k_pos[0]), math.inf
    if branch.offsets is not None:
      per_segment = -(-branch.segment // stride)
      span = per_segment if branch.right == 0 else 2 * per_segment
      thinning = *sizes, branch.segment, stride, branch.offsets
      if offsets == (None, None):
        return views.Sliced(*thinning), span
      return views.Thinned(*thinning, offsets), span
    left, right = branch.steps()
    if branch.columns is not None:
      return views.Columns(
        *sizes, branch.segment, branch.columns, branch.width, offsets
      ), left
    span = left + max(right, 0) + 1
    if branch.start != math.inf:
      span = min(span, -(-branch.start // stride) + 1)
    if stride == 1:
      return views.Identity(*sizes, *self._layout, offsets), span
    return views.Classes(*sizes, *self._layout, stride, offsets), span

  def _compact_view(self, q_pos, k_pos):
    branch, queries = self.branch, None
    if branch.columns is not None:
      columns = np.asarray(branch.columns)[:, None]
      keys = (k_pos >= 0) & branch.in_columns(k_pos, columns)
    elif branch.offsets is None:
      keys = ((k_pos >= 0) & (k_pos < branch.start))[None]
    else:
      offset = np.asarray(branch.offsets)[:, None]
      queries, keys = (
        (y >= 0) & (branch.residue(y) == offset) for y in (q_pos, k_pos)
      )
    return views.Compact(queries, keys, self.num_queries, *self._layout)

  def _visited(self, view, block, where, lo, hi):
    """Rows [first, last) of keys that each block of queries visits."""
    # Keys are contiguous, so positions in a document are slots but for a shift.
    shift = where.q_abs - where.q_pos
    if where.k_offset is not None:
      shift = shift - where.k_offset.reshape(-1, 1)
    sees = lo <= hi
    far = np.int32(2**30)
    lo = jnp.where(sees, jnp.minimum(lo, far) + shift, far)
    hi = jnp.where(sees, jnp.minimum(hi, far) + shift, -far)
    lo = view.query_values(jnp.clip(lo, 0, self.num_keys), self.num_keys)
    hi = view.query_values(jnp.clip(hi, -1, self.num_keys - 1), -1)
    return _block_range(
      view.first_row(lo), view.last_row(hi), block, view.num_columns
    )

  def _plan_anywhere(self, auxiliary, lo, hi, k_pos):
    """Positions in any order: all keys are visited and masked one by one."""
    branch, where = self.branch, auxiliary.where
    view = views.Identity(self.num_queries, self.num_keys, *self._layout)
    rows, columns = self.rows_and_columns(view, where, lo, hi, k_pos)
    if branch.offsets is not None:
      # Which rows take part differs by head.
      offset = np.asarray(branch.offsets).reshape(*self._layout, 1)
      q_kept, k_kept = (
        branch.residue(y)[:, None, None, None] == offset
        for y in (where.q_pos, where.k_pos)
      )
      rows = rows._replace(lo=jnp.where(q_kept, rows.lo, FURTHEST))
      columns = columns._replace(
        pos=jnp.where(k_kept, columns.pos, tile.NOWHERE)
      )
    elif branch.columns is not None:
      column = np.asarray(branch.columns).reshape(*self._layout, 1)
      kept = branch.in_columns(where.k_pos[:, None, None, None], column)
      columns = columns._replace(pos=jnp.where(kept, columns.pos, tile.NOWHERE))
    elif branch.stride > 1:
      rows = rows._replace(
        residue=view.query_values(branch.residue(where.q_pos), 0)
      )
      columns = columns._replace(
        residue=view.key_values(branch.residue(where.k_pos), 0)
      )
    config = self.config(
      view, math.inf, table_start=self._table_start(skewed=False)
    )
    return _Plan(
      view, config, rows, columns, _visit_all(view, config, auxiliary)
    )

  # Transformer-XL's table.

  def _table_start(self, skewed):
    """The distance of the first table row used (in strides, if skewed)."""
    if not isinstance(self.position, TransformerXL):
      return 0
    start = self.position.min_distance
    return -(-start // self.stride) if skewed else start

  def _table_covers(self, where):
    """Whether the table is known to hold all distances that are visible."""
    if not isinstance(self.position, TransformerXL):
      return False
    first = self.position.min_distance
    last = first + self.position.r.shape[0] - 1
    left, right = (
      min(side * self.stride, self.branch.segment - 1)
      for side in (self.branch.left, self.branch.right)
    )
    if where.q_offset is None and where.k_offset is None:
      left = min(left, self.num_queries - 1)
      right = min(right, self.num_keys - 1)
      if not (first <= -right and left <= last):
        raise ValueError(
          f'TransformerXL r holds the distances {first} to {last}, but the '
          f'pattern shows distances {-right} to {left}'
        )
    return first <= -right and left <= last


class GlobalTask(_Task):
  """The keys that every query may see, but for those that it sees anyway."""

  def __init__(self, static, x):
    super().__init__(static, x)
    self.distance = static.pattern.far_distance

  def _slots(self, auxiliary):
    """[B, G] slots of the tokens, and which of them are keys to be used."""
    where, tokens = auxiliary.where, auxiliary.global_tokens
    if self.static.contiguous:
      first = 0 if where.k_offset is None else where.k_offset.reshape(-1, 1)
      slots = tokens - first
      valid = (slots >= 0) & (slots < self.num_keys)
    else:
      same = where.k_abs[:, None] == tokens[..., None]
      slots, valid = same.argmax(-1), same.any(-1)
    count = tokens.shape[1]
    earlier = np.tri(count, k=-1, dtype=bool)
    repeated = (tokens[:, :, None] == tokens[:, None]) & earlier
    valid = valid & (tokens >= 0) & ~repeated.any(-1)
    return jnp.clip(slots, 0, self.num_keys - 1), valid

  def plan(self, auxiliary):
    static, where = self.static, auxiliary.where
    slots, valid = self._slots(auxiliary)
    batch = slots.shape[0]

    def gather(y):
      if y is None:
        return None
      y = jnp.broadcast_to(y, (batch, y.shape[1]))
      return jnp.take_along_axis(y, slots, axis=1)

    k_pos = jnp.where(valid, gather(where.k_pos), -1)
    where = where._replace(
      k_pos=k_pos, k_abs=gather(where.k_abs), k_doc=gather(where.k_doc)
    )
    lo = jnp.zeros_like(where.q_pos)
    hi = where.q_pos if static.pattern.causal else lo + FURTHEST
    lo, hi, k_pos = _intervals(where, lo, hi)
    view = views.Identity(
      self.num_queries,
      slots.shape[1],
      self.kv_heads,
      self.num_heads // self.kv_heads,
    )
    rows, columns = self.rows_and_columns(
      view, where, lo, hi, k_pos, pos=view.query_values(where.q_pos, 0)
    )
    table_start = 0
    if isinstance(self.position, TransformerXL):
      table_start = self.position.min_distance
    config = self.config(
      view,
      math.inf,
      table_start=table_start,
      exclude=(static.pattern, self.num_heads),
    )
    return _Plan(
      view, config, rows, columns, _visit_all(view, config, auxiliary)
    )

  def operands(self, plan, auxiliary, encoded, position):
    view, config = plan.view, plan.config
    slots, _ = self._slots(auxiliary)

    def gather(y):
      return view.keys(jnp.take_along_axis(y, slots[:, :, None, None], axis=1))

    q, k, v, relative_q = encoded
    return band.Operands(
      view.queries(q),
      gather(k),
      gather(v),
      None if relative_q is None else view.queries(relative_q),
      *table_and_slopes(
        position, config, self.num_heads, (view.kv_heads, view.group), 1
      ),
    )


def _visit_all(view, config, auxiliary):
  blocks = -(-view.num_rows // config.block)
  return tile.Walk(
    jnp.zeros(blocks, jnp.int32),
    jnp.full(blocks, view.num_columns, jnp.int32),
    0,
    auxiliary.seed,
    auxiliary.batch_row,
  )


def _block_range(first, last, block, num_columns):
  """First and last + 1 over each block of the last axis and all others."""
  missing = -first.shape[-1] % block
  widths = [(0, 0)] * (first.ndim - 1) + [(0, missing)]
  first = jnp.pad(first, widths, constant_values=num_columns)
  last = jnp.pad(last, widths, constant_values=-1)
  blocks = first.shape[-1] // block
  axes = (*range(first.ndim - 1), -1)
  shape = (*first.shape[:-1], blocks, block)
  first = first.reshape(shape).min(axis=axes)
  last = last.reshape(shape).max(axis=axes) + 1
  first = jnp.clip(first, 0, num_columns)
  return first, jnp.clip(last, first, num_columns)
