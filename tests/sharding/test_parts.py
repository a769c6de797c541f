"""Parts of patterns are patterns: their branches sum to what they say."""

import numpy as np
import pytest

import longjax
from longjax.sharding.parts import Branches, SomeHeads, share_of_heads

LENGTH, HEADS = 40, 4
PATTERNS = [
  longjax.SlidingWindow(5, 3, (1, 2, 1, 3)),
  longjax.Dilated((8, 16, 40), (1, 2, 4)),
  longjax.Dilated((8, 16), (1, 3), causal=False, offsets='torchscale'),
  longjax.Lambda(7, 3),
  longjax.SelfExtend(6, 2),
  longjax.FixedSparse(8, 2),
]


def multiplicity(pattern, heads=HEADS):
  positions = np.arange(LENGTH)
  return pattern.multiplicity(
    positions[:, None],
    positions,
    np.arange(heads)[:, None, None],
    heads,
  )


@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
def test_branches_of_a_pattern_sum_to_it(pattern):
  parts = [Branches((b,), pattern) for b in pattern.branches(HEADS)]
  together = Branches(pattern.branches(HEADS), pattern)
  wanted = multiplicity(pattern)
  np.testing.assert_array_equal(sum(map(multiplicity, parts)), wanted)
  np.testing.assert_array_equal(multiplicity(together), wanted)
  positions = np.arange(LENGTH)
  told, truth = (
    p.distance(positions[:, None], positions) for p in (together, pattern)
  )
  seen = wanted.any(0)
  np.testing.assert_array_equal(told[seen], truth[seen])


@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
def test_some_heads(pattern):
  heads = (1, 3)
  some = SomeHeads(pattern, heads, HEADS)
  wanted = multiplicity(pattern)[list(heads)]
  np.testing.assert_array_equal(multiplicity(some, 2), wanted)
  branches = Branches(some.branches(2), some)
  np.testing.assert_array_equal(multiplicity(branches, 2), wanted)


def test_shares():
  pattern = longjax.Dilated((8, 16), (1, 2))
  share = share_of_heads(pattern, HEADS, 2)
  np.testing.assert_array_equal(
    multiplicity(share, 2), multiplicity(pattern)[2:]
  )
  with pytest.raises(NotImplementedError, match='differs between heads'):
    share_of_heads(pattern, HEADS, 4)
  with pytest.raises(ValueError, match='4 heads cannot be split over 3'):
    share_of_heads(pattern, HEADS, 3)
