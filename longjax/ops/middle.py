"""LM-Infinite's optional third part: the middle keys that a query likes best.

Between the first keys and the last window of a Λ-shaped mask lie the middle
keys, which are not seen. Section 3 of arXiv 2308.16137 lets a query see, in
each head, the few of them whose logits would be largest if all lay at one
distance, half the window by default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longjax.patterns import Lambda
from longjax.patterns.base import check_integer
from longjax.positions import Position


@dataclasses.dataclass(frozen=True)
class MiddleKeys:
  """An option of a decoder's cache, which then holds every key.

  Attributes:
    count: k, how many middle keys a query sees in each head; the paper has 5.
    first_layer: the first layer (from 0) that has them; the paper's code has 4.
    distance: that they are told; None for half the pattern's window.
  """

  count: int = 5
  first_layer: int = 4
  distance: int | None = None

  def __post_init__(self):
    check_integer('MiddleKeys count', self.count, 0)
    check_integer('MiddleKeys first_layer', self.first_layer, 0)
    if self.distance is not None:
      check_integer('MiddleKeys distance', self.distance, 0)


def attend_middle(
  q: Float[Array, 'B 1 H D'],
  k: Float[Array, 'B S K D'],
  v: Float[Array, 'B S K E'],
  q_positions: Int[Array, 'B 1'],
  kv_positions: Int[Array, 'B S'],
  pattern: Lambda,
  middle: MiddleKeys,
  position: Position | None,
) -> tuple[Float[Array, 'B 1 H E'], Float[Array, 'B 1 H']]:
  """(out, lse) over the chosen middle keys of one query a row, in float32.

  To be merged with the pattern's own. Queries and keys arrive un-rotated;
  slots at negative positions are empty.
  """
  group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
  k, v = (jnp.repeat(y.astype(jnp.float32), group, axis=2) for y in (k, v))
  distance = middle.distance
  if distance is None:
    distance = pattern.window // 2
  told = jnp.full((1, k.shape[1]), distance, jnp.int32)
  scheme = Position() if position is None else position
  logits = scheme.logits(q[:, 0].astype(jnp.float32), k, told, scale)
  behind = q_positions - kv_positions
  lies_between = (kv_positions >= pattern.start) & (behind >= pattern.window)
  logits = jnp.where(lies_between[:, None], logits, -jnp.inf)
  count = min(middle.count, k.shape[1])
  chosen, slots = jax.lax.top_k(logits, count)
  lse = jax.nn.logsumexp(chosen, axis=-1)
  finite = jnp.where(lse == -jnp.inf, 0.0, lse)
  p = jnp.exp(chosen - finite[..., None])
  values = jnp.take_along_axis(v.swapaxes(1, 2), slots[..., None], axis=2)
  out = jnp.einsum('bhs,bhse->bhe', p, values)
  return out[:, None], lse[:, None]
