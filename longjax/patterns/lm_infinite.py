"""Patterns that let a pretrained model run beyond its training length.

`Lambda` is LM-Infinite (arXiv 2308.16137, section 3), `SelfExtend` its rival
(arXiv 2401.01325). Both change which distance the position scheme is told.
"""

import dataclasses
import math

import numpy as np

from longjax.patterns.base import (
  Branch,
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
  """

  window: int
  start: int

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
    return numpy_of(difference).minimum(difference, self.window)

  @property
  def far_distance(self):
    return CappedDistance(self.window)

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
