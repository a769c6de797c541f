"""Where each query and key is: absolute positions, documents, positions in
documents. Computed once per call, from the arguments, for every backend."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Coordinates(NamedTuple):
  """Int32 arrays; b is 1 where all batch rows agree.

  Attributes:
    q_abs, k_abs: [b, T], [b, S] absolute positions: what dropout hashes and
      global tokens name.
    q_pos, k_pos: [b, T], [b, S] positions in the token's own document, -1 for
      tokens that neither see nor are seen: what patterns and position schemes
      are told.
    q_doc, k_doc: [B, T], [B, S] documents, or None where there is only one.
    q_offset, k_offset: the absolute position of the first query and key, where
      positions are contiguous: None for a plain 0, else a scalar or [B].
  """

  q_abs: Int[Array, 'b T']
  k_abs: Int[Array, 'b S']
  q_pos: Int[Array, 'b T']
  k_pos: Int[Array, 'b S']
  q_doc: Int[Array, 'B T'] | None
  k_doc: Int[Array, 'B S'] | None
  q_offset: Int[Array, ''] | Int[Array, 'B'] | None
  k_offset: Int[Array, ''] | Int[Array, 'B'] | None


def _first_of_document(doc, position):
  """The smallest position in each token's document, one batch row."""
  order = jnp.lexsort((position, doc))
  doc, position = doc[order], position[order]
  starts = jnp.concatenate([jnp.ones(1, bool), doc[1:] != doc[:-1]])
  run = jax.lax.cummax(jnp.where(starts, jnp.arange(len(doc)), 0))
  first = position[run]
  return jnp.zeros_like(first).at[order].set(first)


def _absolute(positions, length):
  """(absolute positions [b, length], offset or None); see Coordinates."""
  if isinstance(positions, int | np.integer) and positions == 0:
    return jnp.arange(length, dtype=jnp.int32)[None], None
  positions = jnp.asarray(positions, jnp.int32)
  if positions.ndim == 2:
    return positions, None
  steps = jnp.arange(length, dtype=jnp.int32)
  return jnp.atleast_1d(positions)[:, None] + steps, positions


def locate(
  num_queries: int, num_keys: int, q_positions, kv_positions, segment_ids
) -> Coordinates:
  """Coordinates from the (already checked) arguments of `attention`."""
  q_abs, q_offset = _absolute(q_positions, num_queries)
  k_abs, k_offset = _absolute(kv_positions, num_keys)
  q_pos, k_pos, q_doc, k_doc = q_abs, k_abs, None, None
  if segment_ids is not None:
    q_doc, k_doc = (jnp.asarray(x, jnp.int32) for x in segment_ids)
    batch = q_doc.shape[0]
    if np.ndim(q_positions) < 2:
      # Positions restart in each document, at the first of its keys (or
      # queries, which may start before the first key that is given).
      docs = jnp.concatenate([k_doc, q_doc], axis=1)
      both = [jnp.broadcast_to(x, (batch, x.shape[1])) for x in (k_abs, q_abs)]
      first = jax.vmap(_first_of_document)(docs, jnp.concatenate(both, axis=1))
      k_pos = k_abs - first[:, :num_keys]
      q_pos = q_abs - first[:, num_keys:]
    q_pos = jnp.where((q_doc >= 0) & (q_abs >= 0), q_pos, -1)
    k_pos = jnp.where((k_doc >= 0) & (k_abs >= 0), k_pos, -1)
  return Coordinates(
    q_abs,
    k_abs,
    jnp.maximum(q_pos, -1),
    jnp.maximum(k_pos, -1),
    q_doc,
    k_doc,
    q_offset,
    k_offset,
  )
