"""Who sees whom: attention patterns as sums of branches (see `base`)."""

from longjax.patterns.base import (
  TRUE_DISTANCE,
  Branch,
  CacheDistance,
  CappedDistance,
  GroupedDistance,
  Pattern,
  StridedDistance,
  TrueDistance,
)
from longjax.patterns.lm_infinite import (
  AttentionSinks,
  DistanceCeiling,
  Lambda,
  SelfExtend,
)
from longjax.patterns.longformer import Full, SlidingWindow
from longjax.patterns.longnet import BlockwiseCausal, Dilated
from longjax.patterns.sparse_transformer import FixedSparse

__all__ = [
  'TRUE_DISTANCE',
  'AttentionSinks',
  'BlockwiseCausal',
  'Branch',
  'CacheDistance',
  'CappedDistance',
  'Dilated',
  'DistanceCeiling',
  'FixedSparse',
  'Full',
  'GroupedDistance',
  'Lambda',
  'Pattern',
  'SelfExtend',
  'SlidingWindow',
  'StridedDistance',
  'TrueDistance',
]
