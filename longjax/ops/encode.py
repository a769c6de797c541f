"""Queries and keys as a branch's distance has the position scheme show them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.ops.call import Call
from longjax.ops.coordinates import Coordinates
from longjax.patterns import TRUE_DISTANCE, Pattern
from longjax.positions import ALiBi, Position, TransformerXL


class Differentiable(NamedTuple):
  q: Float[Array, 'B T H D']
  k: Float[Array, 'B S K D']
  v: Float[Array, 'B S K E']
  position: Position | None


class Auxiliary(NamedTuple):
  where: Coordinates
  global_tokens: Int[Array, 'B G'] | None
  seed: Array | None
  batch_row: Int[Array, 'B']


@dataclasses.dataclass(frozen=True)
class Static:
  pattern: Pattern
  scale: float
  soft_cap: float | None
  dropout_rate: float
  contiguous: bool


def take_apart(call: Call) -> tuple[Static, Differentiable, Auxiliary]:
  """A call's static part, what has gradients, and the rest."""
  static = Static(
    call.pattern,
    call.scale,
    call.logit_soft_cap,
    call.dropout_rate,
    call.contiguous,
  )
  x = Differentiable(call.q, call.k, call.v, call.position)
  rows = call.first_row + jnp.arange(call.q.shape[0], dtype=jnp.int32)
  auxiliary = Auxiliary(call.where, call.global_tokens, call.dropout_seed, rows)
  return static, x, auxiliary


class Encoded(NamedTuple):
  """Rotated as a branch's distance tells."""

  q: Float[Array, 'B T H D']
  k: Float[Array, 'B S K D']
  v: Float[Array, 'B S K E']
  relative_q: Float[Array, 'B T H D'] | None


def told(static, where, distance):
  """Positions [b, T], [b, S] that the scheme is told."""
  if distance == TRUE_DISTANCE and static.contiguous:
    # Differences are the same as in a document, and neighbours stay close.
    return where.q_abs, where.k_abs
  return distance.queries(where.q_pos), distance.keys(where.k_pos)


def encode(static, x, auxiliary, distance):
  q, k, v, relative_q = x.q, x.k, x.v, None
  if isinstance(x.position, TransformerXL):
    u, w = (y.astype(q.dtype) for y in (x.position.u, x.position.v))
    q, relative_q = q + u, q + w
  elif x.position is not None:
    q_told, k_told = told(static, auxiliary.where, distance)
    q = x.position.rotate(q, q_told[:, :, None])
    k = x.position.rotate(k, k_told[:, :, None])
  return Encoded(q, k, v, relative_q)


def _runs(heads):
  """Runs of neighbours, which are moved as slices: no gather is needed."""
  return np.split(heads, np.flatnonzero(np.diff(heads) != 1) + 1)


def take_heads(x, heads, axis):
  """x at the numbered heads of an axis, in the order given."""
  parts = [
    jax.lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1, axis=axis)
    for run in _runs(heads)
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def put_heads(x, part, heads, axis):
  """x with `part` in the place of its numbered heads."""
  done = 0
  for run in _runs(heads):
    piece = jax.lax.slice_in_dim(part, done, done + len(run), axis=axis)
    x = jax.lax.dynamic_update_slice_in_dim(x, piece, int(run[0]), axis)
    done += len(run)
  return x


def table_and_slopes(position, config, num_heads, layout, stride):
  """Transformer-XL's table [K, R, N, D] and ALiBi's slopes [K, R], or None."""
  if isinstance(position, TransformerXL):
    table = position.r
    if config.skewed:
      # Rows for the multiples of the stride, from the first that there is.
      table = table[-position.min_distance % stride :: stride]
    table = take_heads(table, config.heads, 1).swapaxes(0, 1)
    return table.reshape(*layout, *table.shape[1:]), None
  if isinstance(position, ALiBi):
    slopes = take_heads(position.head_slopes(num_heads), config.heads, 0)
    return None, slopes.reshape(layout)
  return None, None
