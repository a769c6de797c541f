"""Who sees whom: attention patterns as sums of branches (see `base`)."""

from longjax.patterns.base import (
  TRUE_DISTANCE,
  Branch,
  CappedDistance,
  GroupedDistance,
  Pattern,
  TrueDistance,
)
from longjax.patterns.lm_infinite import Lambda, SelfExtend
from longjax.patterns.longformer import Full, SlidingWindow
from longjax.patterns.longnet import Dilated

__all__ = [
  'TRUE_DISTANCE',
  'Branch',
  'CappedDistance',
  'Dilated',
  'Full',
  'GroupedDistance',
  'Lambda',
  'Pattern',
  'SelfExtend',
  'SlidingWindow',
  'TrueDistance',
]
