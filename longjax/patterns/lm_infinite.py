"""Patterns that let a pretrained model run beyond its training length.

`Lambda` is LM-Infinite (arXiv 2308.16137, section 3). Its two halves alone, as
its ablation has them, are `Lambda(..., ceiling=False)`, the mask, and
`DistanceCeiling`. Rivals are `AttentionSinks` (StreamingLLM, arXiv 2309.17453)
and `SelfExtend` (arXiv 2401.01325). They differ in which keys are seen, and in
the distance that the position scheme is told.
"""

import dataclasses
import math

import numpy as np

from longjax.patterns.base import (
  TRUE_DISTANCE,
  Branch,
  CacheDistance,
  CappedDistance,
  GroupedDistance,
  Pattern,
  as_positions,
  check_integer,
  numpy_of,
)


@dataclasses.dataclass(frozen=True)
class Lambda(Pattern):
  """LM-Infinite's Λ-mask with its distance ceiling.

  A query sees the last `window` keys including itself at their true distance,
  and those of the first `start` keys that lie further back at the distance
  `window`. So a query sees at most window + start keys, and no distance is
  told that exceeds `window`.

  Attributes:
    window: L >= 1, the length that the model was trained at.
    start: G >= 0; the paper finds 5 to 100 equally good.
    ceiling: False tells start keys' true distances: the mask alone, which
      fails beyond the trained length.
  """

  window: int
  start: int
  ceiling: bool = True

  def __post_init__(self):
    check_integer('Lambda window', self.window, 1)
    check_integer('Lambda start', self.start, 0)

  @property
  def causal(self) -> bool:
    return True

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    k_pos = as_positions(k_pos)
    difference = as_positions(q_pos) - k_pos
    near = difference < self.window
    seen = (difference >= 0) & (near | (k_pos < self.start))
    return (seen & (np.asarray(head) >= 0)).astype(np.int32)

  def distance(self, q_pos, k_pos):
    difference = as_positions(q_pos) - as_positions(k_pos)
    if not self.ceiling:
      return difference
    return numpy_of(difference).minimum(difference, self.window)

  @property
  def far_distance(self):
    return CappedDistance(self.window) if self.ceiling else TRUE_DISTANCE

  def branches(self, num_heads):
    near = Branch(left=self.window - 1, right=0)
    if not self.start:
      return (near,)
    return (
      near,
      Branch(
        right=-self.window,
        start=self.start,
        distance=self.far_distance,
      ),
    )

  def reach(self):
    return (self.window - 1, 0)


@dataclasses.dataclass(frozen=True)
class DistanceCeiling(Pattern):
  """LM-Infinite's distance ceiling alone: every earlier key is seen, those
  `window` or more positions back at the distance `window`."""

  window: int

  def __post_init__(self):
    check_integer('DistanceCeiling window', self.window, 1)

  @property
  def causal(self) -> bool:
    return True

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    seen = as_positions(q_pos) - as_positions(k_pos) >= 0
    return (seen & (np.asarray(head) >= 0)).astype(np.int32)

  def distance(self, q_pos, k_pos):
    difference = as_positions(q_pos) - as_positions(k_pos)
    return numpy_of(difference).minimum(difference, self.window)

  def branches(self, num_heads):
    return (
      Branch(left=self.window - 1, right=0),
      Branch(right=-self.window, distance=CappedDistance(self.window)),
    )

  def reach(self):
    return (math.inf, 0)


@dataclasses.dataclass(frozen=True)
class AttentionSinks(Pattern):
  """StreamingLLM: the first `start` keys and the last `window`, with the
  positions that they have in a cache of window + start slots.

  Nothing changes until the cache is full; from then on the query has the last
  slot's position, and start key j lies window + start - 1 - j behind it.

  Attributes:
    window: R >= 1 recent keys, the query's own among them.
    start: G >= 0 sinks; the paper uses 4. It keeps window + start at most the
      trained length.
  """

  window: int
  start: int = 4

  def __post_init__(self):
    check_integer('AttentionSinks window', self.window, 1)
    check_integer('AttentionSinks start', self.start, 0)

  @property
  def causal(self) -> bool:
    return True

  @property
  def far_distance(self):
    return CacheDistance(self.window + self.start)

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    return Lambda(self.window, self.start).multiplicity(
      q_pos, k_pos, head, num_heads
    )

  def distance(self, q_pos, k_pos):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    far = self.far_distance.queries(q_pos) - k_pos
    true = q_pos - k_pos
    return numpy_of(true).where(true < self.window, true, far)

  def branches(self, num_heads):
    near = Branch(left=self.window - 1, right=0)
    if not self.start:
      return (near,)
    far = Branch(
      right=-self.window, start=self.start, distance=self.far_distance
    )
    return (near, far)

  def reach(self):
    return (self.window - 1, 0)


@dataclasses.dataclass(frozen=True)
class SelfExtend(Pattern):
  """Self-Extend: full causal attention with grouped far positions.

  Keys nearer than `window` are told their true distance; further ones the
  distance of positions floor-divided by `group`, shifted so that it goes on
  from `window`.
  """

  window: int
  group: int

  def __post_init__(self):
    check_integer('SelfExtend window', self.window, 1)
    check_integer('SelfExtend group', self.group, 1)

  @property
  def causal(self) -> bool:
    return True

  @property
  def _grouped(self):
    return GroupedDistance(self.group, self.window)

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    seen = as_positions(q_pos) - as_positions(k_pos) >= 0
    return (seen & (np.asarray(head) >= 0)).astype(np.int32)

  def distance(self, q_pos, k_pos):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    far = self._grouped.queries(q_pos) - self._grouped.keys(k_pos)
    true = q_pos - k_pos
    return numpy_of(true).where(true < self.window, true, far)

  def branches(self, num_heads):
    return (
      Branch(left=self.window - 1, right=0),
      Branch(right=-self.window, distance=self._grouped),
    )

  def reach(self):
    return (math.inf, 0)
