"""Schemes that add to the logit: ALiBi and Transformer-XL."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longjax.positions.base import Position, inner, inner_pairs


def alibi_slopes(num_heads: int) -> np.ndarray:
  """ALiBi's slopes (arXiv 2108.12409): a geometric sequence from 2^(-8/H).

  Where H is no power of two, the slopes of the next lower power are followed
  by every other slope of the next higher one, as the paper's authors do.
  """
  power = 2 ** math.floor(math.log2(num_heads))
  slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
  more = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
  slopes = np.concatenate([slopes, more[: num_heads - power]])
  return slopes.astype(np.float32)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('slopes',), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class ALiBi(Position):
  """Adds -slope * |distance| to the logits of each head.

  Attributes:
    slopes: Float[H], or None for `alibi_slopes(H)`.
  """

  slopes: Float[Array, 'H'] | None = None

  def check(self, num_heads, head_dim):
    if self.slopes is not None and self.slopes.shape != (num_heads,):
      raise ValueError(
        f'ALiBi slopes have shape {self.slopes.shape}, but ({num_heads},) is '
        f'needed: one per head'
      )

  def head_slopes(self, num_heads: int) -> Float[Array, 'H']:
    if self.slopes is None:
      return jnp.asarray(alibi_slopes(num_heads))
    return jnp.asarray(self.slopes, jnp.float32)

  def of_heads(self, heads, num_heads):
    return ALiBi(self.head_slopes(num_heads)[heads])

  def logits(self, q, k, distance, scale):
    slopes = self.head_slopes(q.shape[1])[None, :, None]
    return scale * inner(q, k) - slopes * jnp.abs(distance)[:, None]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('u', 'v', 'r'),
  meta_fields=('min_distance',),
)
@dataclasses.dataclass(frozen=True)
class TransformerXL(Position):
  """Transformer-XL's relative positions (arXiv 1901.02860, section 3.3).

  logit = scale * [(q + u) . k + (q + v) . r_distance]

  Attributes:
    u, v: Float[H, D], the content and the position bias (r_w_bias and r_r_bias
      of the paper's code).
    r: Float[N, H, D], projected embeddings of the distances min_distance, ...,
      min_distance + N - 1. A visible pair outside of them is an error where it
      is known beforehand, and NaN where it depends on traced positions.
    min_distance: the distance of r's first row; negative for keys ahead.
  """

  u: Float[Array, 'H D']
  v: Float[Array, 'H D']
  r: Float[Array, 'N H D']
  min_distance: int = 0

  def check(self, num_heads, head_dim):
    heads = (num_heads, head_dim)
    for name in ('u', 'v', 'r'):
      shape = getattr(self, name).shape
      if shape[-2:] != heads or len(shape) != (3 if name == 'r' else 2):
        raise ValueError(
          f'TransformerXL {name} has shape {shape}, but it must end in {heads} '
          f'(heads, head size), after the number of distances for r'
        )

  def of_heads(self, heads, num_heads):
    del num_heads
    u, v, r = self.u[heads], self.v[heads], self.r[:, heads]
    return TransformerXL(u, v, r, self.min_distance)

  def logits(self, q, k, distance, scale):
    u, v, r = (jnp.asarray(x, q.dtype) for x in (self.u, self.v, self.r))
    index = distance - self.min_distance
    rows = jnp.take(r, jnp.clip(index, 0, len(r) - 1), axis=0)
    shape = jnp.broadcast_shapes(rows.shape, k.shape)
    position = inner_pairs(
      jnp.broadcast_to((q + v)[:, None], shape), jnp.broadcast_to(rows, shape)
    )
    outside = (index < 0) | (index >= len(r))
    logits = scale * (inner(q + u, k) + position)
    return jnp.where(outside[:, None], jnp.nan, logits)
