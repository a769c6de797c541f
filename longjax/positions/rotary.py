"""Rotary position embeddings (RoPE, arXiv 2104.09864; xPos, 2212.10554)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.positions.base import Position, inner_pairs
from longjax.positions.rope_scaling import RoPEScaling


def turns(inverse_frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Angular frequencies as fixed-point fractions of a turn per position.

  Returns:
    (high, low): `high / 2**32 + low` turns, high uint32, low float32. The
    product high * position, reduced modulo 2**32 by the wrap-around of
    integers, is the exact fraction of a turn, so that an angle at position
    2**30 is as good as one at position 1; float32 alone would be off by a
    radian at 2**24 + 1.
  """
  fraction = np.asarray(inverse_frequency, np.float64) / (2 * math.pi)
  scaled = (fraction % 1.0) * 2.0**32
  high = np.floor(scaled)
  low = (scaled - high) * 2.0**-32
  return high.astype(np.uint32), low.astype(np.float32)


def angles(
  positions: Int[Array, '...'], inverse_frequency: np.ndarray
) -> Float[Array, '... F']:
  """positions * inverse_frequency in radians, reduced to about [-pi, pi].

  Within 1e-5 of float64 for |positions| up to 2**30.
  """
  high, low = turns(inverse_frequency)
  positions = jnp.asarray(positions)[..., None]
  whole = positions.astype(jnp.uint32) * high
  whole = jax.lax.bitcast_convert_type(whole, jnp.int32).astype(jnp.float32)
  part = whole * np.float32(2.0**-32) + positions.astype(jnp.float32) * low
  return np.float32(2 * math.pi) * part


def rotate_pairs(x, angle, *, interleaved: bool, amplitude: float = 1.0):
  """Rotates the leading 2 * F features of x by F angles, in float32, and
  multiplies them by `amplitude`."""
  width = 2 * angle.shape[-1]
  y = x[..., :width].astype(jnp.promote_types(x.dtype, jnp.float32))
  if interleaved:
    y = y.reshape(*y.shape[:-1], width // 2, 2)
    a, b = y[..., 0], y[..., 1]
  else:
    a, b = y[..., : width // 2], y[..., width // 2 :]
  cos, sin = jnp.cos(angle).astype(y.dtype), jnp.sin(angle).astype(y.dtype)
  if amplitude != 1:
    cos, sin = amplitude * cos, amplitude * sin
  a, b = a * cos - b * sin, a * sin + b * cos
  if interleaved:
    rotated = jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], width)
  else:
    rotated = jnp.concatenate([a, b], axis=-1)
  rotated = rotated.astype(x.dtype)
  if width == x.shape[-1]:
    return rotated
  rest = jnp.broadcast_to(
    x[..., width:], (*rotated.shape[:-1], x.shape[-1] - width)
  )
  return jnp.concatenate([rotated, rest], axis=-1)


class _Rotary(Position):
  interleaved: bool
  amplitude = 1.0

  def inverse_frequency(self, head_dim: int) -> np.ndarray:
    raise NotImplementedError

  def rotate(self, x, positions):
    angle = angles(positions, self.inverse_frequency(x.shape[-1]))
    return rotate_pairs(
      x, angle, interleaved=self.interleaved, amplitude=self.amplitude
    )

  def logits(self, q, k, distance, scale):
    # Rotating q by the distance alone: only the difference matters. Features
    # that are rotated count `amplitude` twice, once for the key.
    rotated = self.rotate(q[:, None], distance[:, :, None])
    return scale * inner_pairs(
      rotated, self.rotate(k, 0 * distance[:, :, None])
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(),
  meta_fields=('base', 'fraction', 'interleaved', 'scaling'),
)
@dataclasses.dataclass(frozen=True)
class RoPE(_Rotary):
  """Rotary position embedding.

  Attributes:
    base: wavelengths grow from 2 pi to 2 pi * base.
    fraction: which leading share of the head's features is rotated (GPT-J and
      GPT-NeoX rotate a part).
    interleaved: pairs are features (2i, 2i + 1) as in the paper and GPT-J;
      otherwise (i, i + half) as in LLaMA.
    scaling: how a pretrained model stretched the wavelengths; see
      `rope_scaling`.
  """

  base: float = 10000.0
  fraction: float = 1.0
  interleaved: bool = False
  scaling: RoPEScaling | None = None

  def __post_init__(self):
    if not self.base > 0:
      raise ValueError(f'RoPE base must be > 0, got {self.base}')
    if not 0 < self.fraction <= 1:
      raise ValueError(f'RoPE fraction must be in (0, 1], got {self.fraction}')

  def rotated_width(self, head_dim: int) -> int:
    return round(head_dim * self.fraction)

  def check(self, num_heads, head_dim):
    width = self.rotated_width(head_dim)
    if width % 2 or not width:
      raise ValueError(
        f'RoPE rotates pairs of features, but {self.fraction} of head size '
        f'{head_dim} is {width}: an even number > 0 is needed'
      )

  def inverse_frequency(self, head_dim):
    width = self.rotated_width(head_dim)
    inverse = self.base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return inverse if self.scaling is None else self.scaling(inverse, self.base)

  @property
  def amplitude(self):
    return 1.0 if self.scaling is None else self.scaling.amplitude


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(),
  meta_fields=('base', 'scale_base'),
)
@dataclasses.dataclass(frozen=True)
class XPos(_Rotary):
  """xPos: RoPE whose i-th pair is damped by zeta_i ** (distance / scale_base).

  zeta_i = (2 i + 0.4 D) / (1.4 D). The damping is computed in float32 around
  a query of each tile of queries, so it never overflows for keys that a query
  has behind it; keys ahead grow by 1 / zeta and are refused where the
  factor could overflow.
  """

  base: float = 10000.0
  scale_base: float = 512.0
  interleaved = True

  # Queries and keys are each scaled by exp(40) at most; exp(80) fits float32,
  # with room for their product.
  LARGEST_EXPONENT = 40.0

  def __post_init__(self):
    for name in ('base', 'scale_base'):
      if not getattr(self, name) > 0:
        raise ValueError(f'XPos {name} must be > 0, got {getattr(self, name)}')

  def check(self, num_heads, head_dim):
    if head_dim % 2:
      raise ValueError(f'XPos needs an even head size, got {head_dim}')

  def check_reach(self, ahead: float):
    """Raises ValueError if keys `ahead` positions ahead would overflow."""
    limit = self.furthest_ahead()
    if ahead > limit:
      raise ValueError(
        f'XPos would overflow float32 for keys {ahead} positions ahead of the '
        f'query (at most {limit}): use RoPE, or a pattern that reaches less '
        f'far to the right'
      )

  def furthest_ahead(self) -> int:
    return int(-self.LARGEST_EXPONENT * self.scale_base / np.log(0.4 / 1.4))

  def inverse_frequency(self, head_dim):
    return self.base ** (-np.arange(0, head_dim, 2) / head_dim)

  def damp(self, x, exponent_positions):
    """x times zeta ** (exponent_positions / scale_base), in float32."""
    head_dim = x.shape[-1]
    zeta = (np.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
    log_zeta = np.repeat(np.log(zeta), 2).astype(np.float32)
    steps = exponent_positions.astype(jnp.float32)[..., None] / self.scale_base
    # Only keys that are masked anyway lie further ahead than is allowed.
    exponent = jnp.minimum(steps * log_zeta, self.LARGEST_EXPONENT)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) * jnp.exp(exponent)

  def logits(self, q, k, distance, scale):
    rotated = self.rotate(q[:, None], distance[:, :, None])
    return scale * inner_pairs(self.damp(rotated, distance[:, :, None]), k)
