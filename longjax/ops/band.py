"""Blocked attention over a view of the sequence: (out, lse) and its gradients.

The primitive that every branch of every pattern is computed with on the XLA
path. Queries are walked block by block; for each block only the keys in
[first, last) are visited, in chunks, with a running softmax. Memory is linear
in the number of rows and nothing of size queries x keys is kept. The axes are
those of `tile`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longjax.ops import tile as tiles
from longjax.ops.stored import Stored, Transposed, flat, unflat
from longjax.ops.tile import Columns, Config, KeyMajor, RowMajor, Rows, Walk
from longjax.ops.varying import full_like


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


def forward(
  config: Config, x: Operands, rows: Rows, columns: Columns, walk: Walk
) -> tuple[Float[Array, 'B C K R T E'], Float[Array, 'B C K R T']]:
  """(out, lse) in float32; rows that see nothing get 0 and -inf."""
  num_rows = x.q.shape[4]
  x, rows = _pad(config, x, rows)
  arrays, full = _store(x), full_like(x, rows, columns, walk)

  def one_block(_, i):
    queries = _query_block(config, arrays, rows, i)

    def visit(state, chunk):
      tile = tiles.Tile(
        queries.q, queries.relative_q, chunk.k, chunk.table, chunk.slopes
      )
      s = tiles.logits(config, RowMajor, tile, queries, chunk)
      seen = tiles.seen(config, RowMajor, queries, chunk)
      s = jnp.where(seen, s, -jnp.inf)
      largest = s.max(axis=-1)
      if state is not None:
        largest = jnp.maximum(largest, state[0])
      # Nothing seen yet: any finite number serves.
      finite = jnp.where(largest == -jnp.inf, 0.0, largest)
      p = jnp.exp(s - finite[..., None])
      total = p.sum(axis=-1)
      p = tiles.drop(config, RowMajor, p, queries, chunk)
      out = tiles.einsum('bckrts,bckse->bckrte', p, chunk.v)
      if state is not None:
        old = jnp.exp(state[0] - finite)
        total = total + state[1] * old
        out = out + state[2] * old[..., None]
      return largest, total, out

    def nothing_seen():
      accumulator = _accumulator(x.q)
      shape = queries.q.shape[:-1]
      return (
        full(shape, -jnp.inf, accumulator),
        full(shape, 0, accumulator),
        full((*shape, x.v.shape[-1]), 0, accumulator),
      )

    largest, total, out = _walk_chunks(
      config,
      arrays,
      columns,
      walk,
      i,
      visit,
      None if config.single else nothing_seen(),
    )
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
    return None, (flat(out / total[..., None], 4), lse)

  _, (out, lse) = _each_block(one_block, None, len(walk.first))
  *leading, _, _ = x.q.shape
  shape = (*leading, num_rows, x.v.shape[-1])
  return unflat(_join(out, 1, num_rows), shape, 4), _join(lse, 4, num_rows)


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
  """Cotangents of the operands: of queries in their dtype, else in float32.

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
  full = full_like(x, rows, columns, walk, lse, delta, dout)
  arrays, dout = _store(x), Stored(dout, 4)
  if x.table is not None:
    num_table = x.table.shape[2] - 2 * _table_margin(config)

  def zeros(y):
    return None if y is None else full(y.shape, 0, dtype)

  def one_block(sums, i):
    queries = _query_block(config, arrays, rows, i)
    block_lse, block_delta = (_rows_of(config, y, i, 4) for y in (lse, delta))
    block_dout = dout.rows(i * config.block, config.block)

    def visit(state, chunk):
      dq, drelative, sums = state
      differentiable = tiles.Tile(
        queries.q, queries.relative_q, chunk.k, chunk.table, x.slopes
      )
      s, pull = jax.vjp(
        lambda tile: tiles.logits(config, KeyMajor, tile, queries, chunk),
        differentiable,
      )
      seen = tiles.seen(config, KeyMajor, queries, chunk)
      p = jnp.where(seen, jnp.exp(s - KeyMajor.of_queries(block_lse)), 0.0)
      drop = functools.partial(
        tiles.drop, config, KeyMajor, queries=queries, chunk=chunk
      )
      dv = tiles.einsum('bcksrt,bckrte->bckse', drop(p), block_dout)
      dp = tiles.einsum('bckse,bckrte->bcksrt', chunk.v, block_dout)
      ds = p * (drop(dp) - KeyMajor.of_queries(block_delta))
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
      config, arrays, columns, walk, i, visit, state
    )
    if drelative is not None:
      drelative = flat(drelative, 4).astype(x.q.dtype)
    return sums, (flat(dq, 4).astype(x.q.dtype), drelative)

  sums = _Sums(zeros(x.k), zeros(x.v), zeros(x.table), zeros(x.slopes))
  sums, (dq, drelative) = _each_block(one_block, sums, len(walk.first))
  dtable = sums.table
  if dtable is not None and config.skewed:
    margin = _table_margin(config)
    dtable = dtable[:, :, margin : margin + num_table]

  def join(blocks):
    *leading, _, size = x.q.shape
    return unflat(_join(blocks, 1, num_rows), (*leading, num_rows, size), 4)

  return Operands(
    join(dq),
    sums.k,
    sums.v,
    None if drelative is None else join(drelative),
    dtable,
    sums.slopes,
  )


class _Sums(NamedTuple):
  k: Array
  v: Array
  table: Array | None
  slopes: Array | None


def _accumulator(q):
  return jnp.promote_types(q.dtype, jnp.float32)


class _Arrays(NamedTuple):
  """Operands, as they are kept while walked over."""

  q: Stored
  k: Stored
  k_transposed: Transposed
  v: Stored
  relative_q: Stored | None
  table: Array | None
  slopes: Array | None


def _store(x):
  return _Arrays(
    Stored(x.q, 4),
    Stored(x.k, 3),
    Transposed(x.k),
    Stored(x.v, 3),
    None if x.relative_q is None else Stored(x.relative_q, 4),
    x.table,
    x.slopes,
  )


def _query_block(config, x, rows, i):
  start = i * config.block
  return tiles.QueryBlock(
    x.q.rows(start, config.block),
    None if x.relative_q is None else x.relative_q.rows(start, config.block),
    jax.tree.map(lambda y: _rows_of(config, y, i, 4), rows),
    start,
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
  num_keys = x.k.num_rows
  first, last = walk.first[i], walk.last[i]

  def visit_chunk(c, state):
    new = first + c * config.chunk
    start = jnp.clip(new, 0, num_keys - config.chunk)
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
    chunk = tiles.Chunk(
      x.k.rows(start, config.chunk),
      x.k_transposed.rows(start, config.chunk),
      x.v.rows(start, config.chunk),
      jax.tree.map(
        lambda y: jax.lax.dynamic_slice_in_dim(y, start, config.chunk, 4),
        columns,
      ),
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


def _join(blocks, axis, num_rows):
  """[blocks, ..., block, ...] -> [..., rows, ...], rows on `axis`."""
  y = jnp.moveaxis(blocks, 0, axis)
  y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
  return jax.lax.slice_in_dim(y, 0, num_rows, axis=axis)


def _add_at(total, part, start, axis):
  size = part.shape[axis]
  old = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
