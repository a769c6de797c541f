"""A tile of attention: some queries against some keys.

Its logits with every bias, who sees whom in it, and what dropout leaves of it;
`band` walks over tiles. Axes: B batch, C classes (a view may split the sequence
into several), K kv heads, R query heads per kv head, T query rows, S key rows.
Integer arrays have the same leading axes, each of full size or 1.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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


class QueryBlock(NamedTuple):
  q: Array
  relative_q: Array | None
  rows: Rows
  start: Array  # the first row's number


class Chunk(NamedTuple):
  k: Array
  k_transposed: Array  # equal to k; how it is stored differs
  v: Array
  columns: Columns
  start: Array  # the first key row's number
  new: Array  # key rows before this one were visited already
  table: Array | None
  table_start: Array | int
  slopes: Array | None
  walk: Walk


class RowMajor:
  """Tiles [B, C, K, R, queries, keys]: what the forward pass wants."""

  @staticmethod
  def scores(q, k, k_transposed):
    del k
    return einsum('bckrtd,bcksd->bckrts', q, k_transposed)

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


class KeyMajor:
  """Tiles [B, C, K, keys, R, queries]: no transposed copy for dK and dV."""

  @staticmethod
  def scores(q, k, k_transposed):
    return _key_major_scores(q, k, k_transposed)

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


class Tile(NamedTuple):
  """What the logits of a tile are differentiated in."""

  q: Array
  relative_q: Array | None
  k: Array
  table: Array | None
  slopes: Array | None


def einsum(equation, a, b):
  """Products in the narrower operand's dtype, sums in float32 at least."""
  dtype = min((a.dtype, b.dtype), key=lambda d: d.itemsize)
  return jnp.einsum(
    equation,
    a.astype(dtype),
    b.astype(dtype),
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


@jax.custom_vjp
def _key_major_scores(q, k, k_transposed):
  del k_transposed
  return einsum('bckrtd,bcksd->bcksrt', q, k)


def _key_major_forward(q, k, k_transposed):
  return _key_major_scores(q, k, k_transposed), (q, k_transposed)


def _key_major_backward(residuals, ds):
  q, k = residuals
  # With k on the left, and so stored, nothing as large as ds is transposed.
  dq = einsum('bcksd,bcksrt->bckdrt', k, ds)
  dq = jnp.moveaxis(dq, 3, 5).astype(q.dtype)
  dk = einsum('bcksrt,bckrtd->bcksd', ds, q).astype(k.dtype)
  return dq, dk, None


_key_major_scores.defvjp(_key_major_forward, _key_major_backward)


def seen(config, axes, queries, chunk):
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


def logits(config, axes, tile, queries, chunk):
  """Scaled, biased and capped logits of a tile."""
  q, k, k_transposed = tile.q, tile.k, chunk.k_transposed
  rows, columns = queries.rows, chunk.columns
  if config.xpos is not None:
    # The furthest row: rows that see nothing are told less than any other.
    centre = rows.told.max(axis=-1, keepdims=True)
    q = config.xpos.damp(q, rows.told - centre)
    # Columns have a heads-per-kv-head axis of 1 here.
    ahead = (centre - columns.told)[:, :, :, 0]
    k, k_transposed = (config.xpos.damp(y, ahead) for y in (k, k_transposed))
  s = axes.scores(q, k, k_transposed)
  if tile.table is not None:
    products = einsum('bckrtd,krnd->bckrtn', tile.relative_q, tile.table)
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


def drop(config, axes, p, queries, chunk):
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
