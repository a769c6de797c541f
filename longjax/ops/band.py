"""Blocked attention over a view of the sequence: (out, lse) and its gradients.

The primitive that every branch of every pattern is computed with on the XLA
path. Queries are walked block by block; for each block only the keys in
[first, last) are visited, in chunks, with a running softmax. Memory is linear
in the number of rows and nothing of size queries x keys is kept.

Axes: B batch, C classes (a view may split the sequence into several), K kv
heads, R queries heads per kv head, T query rows, S key rows. Integer arrays
have the same leading axes, each of full size or 1.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.ops.dropout import keep_mask
from longjax.patterns import Pattern
from longjax.positions import XPos

# A position that lies in no interval: what keys that nobody sees are given.
NOWHERE = np.int32(2**31 - 1)


class Rows(NamedTuple):
  """What is known of each query row, [B, C, K, R, T] (axes full or 1).

  lo, hi: inclusive bounds of the key positions that it sees. The others are
  None where not needed: doc, residue: must equal the key's; absolute: what
  dropout hashes; told: what the position scheme is told; pos: position.
  """

  lo: Int[Array, '...']
  hi: Int[Array, '...']
  doc: Int[Array, '...'] | None = None
  residue: Int[Array, '...'] | None = None
  absolute: Int[Array, '...'] | None = None
  told: Int[Array, '...'] | None = None
  pos: Int[Array, '...'] | None = None


class Columns(NamedTuple):
  """What is known of each key row, [B, C, K, R, S] (axes full or 1)."""

  pos: Int[Array, '...']
  doc: Int[Array, '...'] | None = None
  residue: Int[Array, '...'] | None = None
  absolute: Int[Array, '...'] | None = None
  told: Int[Array, '...'] | None = None


class Operands(NamedTuple):
  """The differentiable inputs.

  relative_q and table belong to Transformer-XL positions: the queries that
  meet the table of projected distances; slopes [K, R] to ALiBi.
  """

  q: Float[Array, 'B C K R T D']
  k: Float[Array, 'B C K S D']
  v: Float[Array, 'B C K S E']
  relative_q: Float[Array, 'B C K R T D'] | None = None
  table: Float[Array, 'K R N D'] | None = None
  slopes: Float[Array, 'K R'] | None = None


class Walk(NamedTuple):
  """Which keys each block of queries visits, and what else is traced.

  shift: the told distance of query row a and key row b is (shift + a - b)
  times the stride, where the table is skewed. seed, batch_row: for dropout.
  """

  first: Int[Array, 'blocks']
  last: Int[Array, 'blocks']
  shift: Int[Array, ''] | int = 0
  seed: Array | None = None
  batch_row: Int[Array, 'B'] | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  """The static part.

  Attributes:
    block: queries in a block.
    chunk: keys visited at a time.
    single: one chunk always holds all the keys that a block visits.
    scale, soft_cap, dropout_rate: as in `attention`.
    heads: the global numbers of the K * R heads.
    table_start: the first row of the table is for this distance.
    skewed: the told distances change by one stride from row to row, so that
      the products with the table need only be shifted into place.
    xpos: the scheme, where its damping is to be applied.
    exclude: (pattern, number of heads): pairs that this pattern shows are left
      out here.
  """

  block: int
  chunk: int
  single: bool
  scale: float
  soft_cap: float | None
  dropout_rate: float
  heads: tuple[int, ...]
  table_start: int = 0
  skewed: bool = False
  xpos: XPos | None = None
  exclude: tuple[Pattern, int] | None = None


def forward(
  config: Config, x: Operands, rows: Rows, columns: Columns, walk: Walk
) -> tuple[Float[Array, 'B C K R T E'], Float[Array, 'B C K R T']]:
  """(out, lse) in float32; rows that see nothing get 0 and -inf."""
  num_rows = x.q.shape[4]
  x, rows = _pad(config, x, rows)
  accumulator = _accumulator(x.q)
  *leading, _, _ = x.q.shape

  def one_block(_, i):
    queries = _query_block(config, x, rows, i)

    def visit(state, chunk):
      tile = _Tile(
        queries.q, queries.relative_q, chunk.k, chunk.table, chunk.slopes
      )
      s = _logits(config, _RowMajor, tile, queries, chunk)
      seen = _seen(config, _RowMajor, queries, chunk)
      largest, total, out = state
      s = jnp.where(seen, s, -jnp.inf)
      new = jnp.maximum(largest, s.max(axis=-1))
      # Nothing seen yet: any finite number serves.
      finite = jnp.where(new == -jnp.inf, 0.0, new)
      p = jnp.exp(s - finite[..., None])
      old = jnp.exp(largest - finite)
      total = total * old + p.sum(axis=-1)
      p = _drop(config, _RowMajor, p, queries, chunk)
      out = out * old[..., None] + _einsum('bckrts,bckse->bckrte', p, chunk.v)
      return new, total, out

    shape = (*leading, config.block)
    state = (
      jnp.full(shape, -jnp.inf, accumulator),
      jnp.zeros(shape, accumulator),
      jnp.zeros((*shape, x.v.shape[-1]), accumulator),
    )
    largest, total, out = _walk_chunks(
      config, x, columns, walk, i, visit, state
    )
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
    return None, (out / total[..., None], lse)

  _, (out, lse) = _each_block(one_block, None, len(walk.first))
  return _join(out, num_rows), _join(lse, num_rows)


def backward(
  config: Config,
  x: Operands,
  rows: Rows,
  columns: Columns,
  walk: Walk,
  lse: Float[Array, 'B C K R T'],
  delta: Float[Array, 'B C K R T'],
  dout: Float[Array, 'B C K R T E'],
) -> Operands:
  """Cotangents of the operands, in float32.

  Args:
    lse: of the final result, into which this one may have been merged.
    delta: rowsum(dout * out) - dlse, of the final result.
    dout: cotangent of the final result.
  """
  num_rows, num_table = x.q.shape[4], None
  dtype = _accumulator(x.q)
  # A row that sees nothing has p = 0 through the mask, whatever its lse.
  lse = jnp.where(lse == -jnp.inf, 0.0, lse)
  lse, delta, dout = (_pad_rows(config, y, 4) for y in (lse, delta, dout))
  x, rows = _pad(config, x, rows)
  if x.table is not None:
    num_table = x.table.shape[2] - 2 * _table_margin(config)

  def zeros(y):
    return None if y is None else jnp.zeros(y.shape, dtype)

  def one_block(sums, i):
    queries = _query_block(config, x, rows, i)
    block_lse, block_delta, block_dout = (
      _rows_of(config, y, i, 4) for y in (lse, delta, dout)
    )

    def visit(state, chunk):
      dq, drelative, sums = state
      differentiable = _Tile(
        queries.q, queries.relative_q, chunk.k, chunk.table, x.slopes
      )
      s, pull = jax.vjp(
        lambda tile: _logits(config, _KeyMajor, tile, queries, chunk),
        differentiable,
      )
      seen = _seen(config, _KeyMajor, queries, chunk)
      p = jnp.where(seen, jnp.exp(s - _KeyMajor.of_queries(block_lse)), 0.0)
      drop = functools.partial(
        _drop, config, _KeyMajor, queries=queries, chunk=chunk
      )
      dv = _einsum('bcksrt,bckrte->bckse', drop(p), block_dout)
      dp = _einsum('bckse,bckrte->bcksrt', chunk.v, block_dout)
      ds = p * (drop(dp) - _KeyMajor.of_queries(block_delta))
      (d,) = pull(ds.astype(s.dtype))
      sums = _Sums(
        _add_at(sums.k, d.k, chunk.start, 3),
        _add_at(sums.v, dv, chunk.start, 3),
        None
        if x.table is None
        else _add_at(sums.table, d.table, chunk.table_start, 2)
        if config.skewed
        else sums.table + d.table,
        None if x.slopes is None else sums.slopes + d.slopes,
      )
      if drelative is not None:
        drelative = drelative + d.relative_q
      return dq + d.q, drelative, sums

    state = (zeros(queries.q), zeros(queries.relative_q), sums)
    dq, drelative, sums = _walk_chunks(
      config, x, columns, walk, i, visit, state
    )
    return sums, (dq, drelative)

  sums = _Sums(zeros(x.k), zeros(x.v), zeros(x.table), zeros(x.slopes))
  sums, (dq, drelative) = _each_block(one_block, sums, len(walk.first))
  dtable = sums.table
  if dtable is not None and config.skewed:
    margin = _table_margin(config)
    dtable = dtable[:, :, margin : margin + num_table]
  return Operands(
    _join(dq, num_rows),
    sums.k,
    sums.v,
    None if drelative is None else _join(drelative, num_rows),
    dtable,
    sums.slopes,
  )


# --- What one visit of a chunk sees -----------------------------------------


class _QueryBlock(NamedTuple):
  q: Array
  relative_q: Array | None
  rows: Rows
  start: Array  # the first row's number


class _Chunk(NamedTuple):
  k: Array
  v: Array
  columns: Columns
  start: Array  # the first key row's number
  new: Array  # key rows before this one were visited already
  table: Array | None
  table_start: Array | int
  slopes: Array | None
  walk: Walk


class _RowMajor:
  """Tiles [B, C, K, R, queries, keys]: what the forward pass wants."""

  scores = 'bckrtd,bcksd->bckrts'

  @staticmethod
  def of_queries(y):
    """[b, c, k, r, T] -> to go with tiles."""
    return y[..., :, None]

  @staticmethod
  def of_keys(y):
    return y[..., None, :]

  @staticmethod
  def of_heads(y):
    """[K, R] -> to go with tiles."""
    return y[..., None, None]

  @staticmethod
  def arrange(tile):
    """From [B, C, K, R, queries, keys]."""
    return tile


class _KeyMajor:
  """Tiles [B, C, K, keys, R, queries]: no transposed copy for dK and dV."""

  scores = 'bckrtd,bcksd->bcksrt'

  @staticmethod
  def of_queries(y):
    return y[:, :, :, None]

  @staticmethod
  def of_keys(y):
    return jnp.moveaxis(y, 4, 3)[..., None]

  @staticmethod
  def of_heads(y):
    return y[:, None, :, None]

  @staticmethod
  def arrange(tile):
    return jnp.moveaxis(tile, 5, 3)


class _Tile(NamedTuple):
  """What the logits of a tile are differentiated in."""

  q: Array
  relative_q: Array | None
  k: Array
  table: Array | None
  slopes: Array | None


class _Sums(NamedTuple):
  k: Array
  v: Array
  table: Array | None
  slopes: Array | None


def _accumulator(q):
  return jnp.promote_types(q.dtype, jnp.float32)


def _einsum(equation, a, b):
  """Products in the narrower operand's dtype, sums in float32 at least."""
  dtype = min((a.dtype, b.dtype), key=lambda d: d.itemsize)
  return jnp.einsum(
    equation,
    a.astype(dtype),
    b.astype(dtype),
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def _query_block(config, x, rows, i):
  take = functools.partial(_rows_of, config, i=i)
  return _QueryBlock(
    take(x.q, axis=4),
    None if x.relative_q is None else take(x.relative_q, axis=4),
    jax.tree.map(lambda y: take(y, axis=4), rows),
    i * config.block,
  )


def _each_block(one_block, carry, count):
  """A scan over the numbers of the blocks; a loop of one costs compile time."""
  if count == 1:
    carry, results = one_block(carry, 0)
    return carry, jax.tree.map(lambda y: y[None], results)
  return jax.lax.scan(one_block, carry, jnp.arange(count))


def _rows_of(config, y, i, axis):
  return jax.lax.dynamic_slice_in_dim(y, i * config.block, config.block, axis)


def _walk_chunks(config, x, columns, walk, i, visit, state):
  """Folds `visit` over the chunks of keys that block i visits."""
  num_keys = x.k.shape[3]
  first, last = walk.first[i], walk.last[i]

  def visit_chunk(c, state):
    new = first + c * config.chunk
    start = jnp.clip(new, 0, num_keys - config.chunk)
    take = functools.partial(
      jax.lax.dynamic_slice_in_dim,
      start_index=start,
      slice_size=config.chunk,
    )
    table, table_start = x.table, 0
    if config.skewed:
      # Rows for the distances of this tile, furthest ahead first.
      nearest = walk.shift + i * config.block - start - config.table_start
      size = config.block + config.chunk
      table_start = jnp.clip(
        nearest + config.block - size + _table_margin(config),
        0,
        x.table.shape[2] - size,
      )
      table = jax.lax.dynamic_slice_in_dim(x.table, table_start, size, 2)
    chunk = _Chunk(
      take(x.k, axis=3),
      take(x.v, axis=3),
      jax.tree.map(lambda y: take(y, axis=4), columns),
      start,
      new,
      table,
      table_start,
      x.slopes,
      walk,
    )
    return visit(state, chunk)

  if config.single:
    return visit_chunk(0, state)
  count = jnp.maximum(last - first + config.chunk - 1, 0) // config.chunk
  return jax.lax.fori_loop(0, count, visit_chunk, state)


def _seen(config, axes, queries, chunk):
  """Who sees whom in the tile."""
  rows, columns = queries.rows, chunk.columns
  q, k = axes.of_queries, axes.of_keys
  seen = (q(rows.lo) <= k(columns.pos)) & (k(columns.pos) <= q(rows.hi))
  if rows.doc is not None:
    seen = seen & (q(rows.doc) == k(columns.doc))
  if rows.residue is not None:
    seen = seen & (q(rows.residue) == k(columns.residue))
  if config.exclude is not None:
    pattern, num_heads = config.exclude
    heads = axes.of_heads(_head_numbers(config, queries))
    shown = pattern.multiplicity(q(rows.pos), k(columns.pos), heads, num_heads)
    seen = seen & (shown == 0)
  if not config.single:
    # The last chunk is moved back so as not to pass the end of the keys.
    number = chunk.start + jnp.arange(config.chunk)
    seen = seen & k((number >= chunk.new)[None, None, None, None])
  return seen


def _logits(config, axes, tile, queries, chunk):
  """Scaled, biased and capped logits of a tile."""
  q, k = tile.q, tile.k
  rows, columns = queries.rows, chunk.columns
  if config.xpos is not None:
    # The furthest row: rows that see nothing are told less than any other.
    centre = rows.told.max(axis=-1, keepdims=True)
    q = config.xpos.damp(q, rows.told - centre)
    # Columns have a heads-per-kv-head axis of 1 here.
    k = config.xpos.damp(k, (centre - columns.told)[:, :, :, 0])
  s = _einsum(axes.scores, q, k)
  if tile.table is not None:
    products = _einsum('bckrtd,krnd->bckrtn', tile.relative_q, tile.table)
    if config.skewed:
      s = s + axes.arrange(_skew(products, config.chunk))
    else:
      told = rows.told[..., :, None] - columns.told[..., None, :]
      rows_of_table, known = _look_up(products, told - config.table_start)
      s = s + axes.arrange(rows_of_table)
      # A select of the sum: past it no gradient of an unseen pair's NaN goes.
      s = jnp.where(axes.arrange(known), s, jnp.nan)
  s = s * config.scale
  if tile.slopes is not None:
    told = axes.of_queries(rows.told) - axes.of_keys(columns.told)
    s = s - axes.of_heads(tile.slopes) * jnp.abs(told).astype(s.dtype)
  if config.soft_cap is not None:
    s = config.soft_cap * jnp.tanh(s / config.soft_cap)
  return s


def _head_numbers(config, queries) -> np.ndarray:
  """[K, R] global numbers of the heads."""
  return np.asarray(config.heads).reshape(queries.q.shape[2:4])


def _skew(products, chunk):
  """Shifts row a so that column b holds distance a - b.

  products[..., a, n] belongs to the distance n - chunk (+ that of the tile's
  corner), for n in [0, block + chunk).
  """
  *leading, block, size = products.shape
  flat = products[..., ::-1].reshape(*leading, block * size)
  # Rows of size - 1 instead of size: each is shifted by one against the last.
  flat = flat[..., block - 1 : block - 1 + block * (size - 1)]
  return flat.reshape(*leading, block, size - 1)[..., :chunk]


def _look_up(products, index):
  """products[..., a, index[a, b]], and whether the table has such a row."""
  size = products.shape[-1]
  shape = (*products.shape[:-1], index.shape[-1])
  index = jnp.broadcast_to(index, shape)
  rows = jnp.take_along_axis(products, jnp.clip(index, 0, size - 1), axis=-1)
  return rows, (index >= 0) & (index < size)


def _drop(config, axes, p, queries, chunk):
  if not config.dropout_rate:
    return p
  walk = chunk.walk
  keep = keep_mask(
    walk.seed,
    config.dropout_rate,
    walk.batch_row[:, None, None, None, None, None],
    axes.of_heads(_head_numbers(config, queries)),
    axes.of_queries(queries.rows.absolute),
    axes.of_keys(chunk.columns.absolute),
  )
  return jnp.where(keep, p / (1 - config.dropout_rate), 0.0)


# --- Padding to whole blocks -------------------------------------------------


def _table_margin(config):
  """Zero rows on either side, for distances of which no pair is visible."""
  return config.block + config.chunk


def _pad_rows(config, y, axis, value=0):
  missing = -y.shape[axis] % config.block
  if not missing:
    return y
  widths = [(0, 0)] * y.ndim
  widths[axis] = (0, missing)
  return jnp.pad(y, widths, constant_values=value)


def _pad(config, x, rows):
  """Whole blocks of queries (padding sees nothing); margins for the table."""
  pad = functools.partial(_pad_rows, config, axis=4)
  table = x.table
  if config.skewed:
    margin = _table_margin(config)
    table = jnp.pad(table, ((0, 0), (0, 0), (margin, margin), (0, 0)))
  x = x._replace(
    q=pad(x.q),
    relative_q=None if x.relative_q is None else pad(x.relative_q),
    table=table,
  )
  padded = jax.tree.map(pad, rows)
  return x, padded._replace(lo=pad(rows.lo, value=1))


def _join(blocks, num_rows):
  """[blocks, B, C, K, R, block, ...] -> [B, C, K, R, rows, ...]."""
  y = jnp.moveaxis(blocks, 0, 4)
  y = y.reshape(*y.shape[:4], y.shape[4] * y.shape[5], *y.shape[6:])
  return y[:, :, :, :, :num_rows]


def _add_at(total, part, start, axis):
  size = part.shape[axis]
  old = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
