"""One checked call of attention, as backends receive it."""

import dataclasses

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from longjax.ops.coordinates import Coordinates
from longjax.patterns import Pattern
from longjax.positions import Position

# What `jax.checkpoint` may keep of attention, by these names.
SAVED = ('attention_out', 'attention_lse')


def named(out, lse):
  """(out, lse) under their names."""
  return tuple(map(checkpoint_name, (out, lse), SAVED))


@dataclasses.dataclass(frozen=True)
class Call:
  """Arguments of `longjax.attention`, checked and located."""

  q: Float[Array, 'B T H D']
  k: Float[Array, 'B S K D']
  v: Float[Array, 'B S K E']
  pattern: Pattern
  position: Position | None
  where: Coordinates
  contiguous: bool  # positions are offset + 0, 1, 2, ... for queries and keys
  global_tokens: Int[Array, 'B G'] | None
  dropout_rate: float
  dropout_seed: UInt32[Array, '2'] | None
  first_row: int | Int[Array, '']  # what dropout calls batch row 0
  scale: float
  logit_soft_cap: float | None
  return_lse: bool
