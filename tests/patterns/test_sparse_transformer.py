"""FixedSparse: the paper's sets written out, heads, cost, errors."""

import numpy as np
import pytest

from longjax import BlockwiseCausal, Dilated, FixedSparse, Full, SlidingWindow
from longjax.models.longnet import schedule


def test_definition_row_by_row():
  """A1 and A2 of section 4.3, for heads that take distinct sub-blocks."""
  pattern, length = FixedSparse(8, 3), 29
  i = np.arange(length)
  for head in range(5):
    # Two sub-blocks of 3 fit into 8; the third head begins anew.
    last = 8 - 3 * (head % 2)
    got = pattern.multiplicity(i[:, None], i, head, 5)
    for q in range(length):
      own = {k for k in range(q + 1) if k // 8 == q // 8}
      column = {k for k in range(q + 1) if last - 3 <= k % 8 < last}
      column = {k for k in column if k // 8 < q // 8}
      np.testing.assert_array_equal(
        np.flatnonzero(got[q]), sorted(own | column)
      )
  assert got.max() == 1


def test_drawn_as_defined():
  plt = pytest.importorskip('matplotlib.pyplot')
  pattern = BlockwiseCausal(8, FixedSparse(4, 1))
  ax = pattern.draw(24, num_heads=4, head=2)
  i = np.arange(24)
  np.testing.assert_array_equal(
    ax.images[0].get_array(), pattern.multiplicity(i[:, None], i, 2, 4)
  )
  # A block and the last, the keys of one sub-block of what is not its own.
  assert ax.images[0].get_array().max() == 1
  plt.close(ax.figure)


def test_heads_take_distinct_sub_blocks():
  columns = FixedSparse(2048, 139).columns(12)
  assert len(set(columns)) == 12
  assert max(columns) + 139 == 2048 and min(columns) >= 0


@pytest.mark.parametrize(
  ('length', 'keys', 'summary'),
  [(8192, 3584, 384), (16384, 4039.1, 249), (32768, 4266.7, 139)],
)
def test_costs_what_longnet_does(length, keys, summary):
  """The sums of w / r^2 of the fact sheet (A6)."""
  pattern = FixedSparse.matching(schedule(length), length)
  assert pattern == FixedSparse(2048, summary)
  np.testing.assert_allclose(2048 + length / 2048 * summary, keys, rtol=2e-3)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((0, 1), 'block must be a whole number >= 1, got 0'),
    ((8, 0), 'summary must be a whole number >= 1, got 0'),
    ((8, 2.0), 'summary must be .* got 2.0'),
    ((8, 9), 'summary 9 is above its block 8'),
  ],
)
def test_bad_fixed_patterns(arguments, message):
  with pytest.raises(ValueError, match=message):
    FixedSparse(*arguments)


def test_a_cost_that_cannot_be_met():
  with pytest.raises(ValueError, match='2048 keys a query .* summary of 0,'):
    FixedSparse.matching(schedule(2048), 32768)


def test_bad_blocks():
  with pytest.raises(ValueError, match='block must be .* got 0'):
    BlockwiseCausal(0)
  for pattern in (Full(causal=False), SlidingWindow(1, 1), 'full'):
    with pytest.raises(ValueError, match='is for causal patterns, got'):
      BlockwiseCausal(4, pattern)
  both_ways = Dilated((4,), (1,), causal=False)
  with pytest.raises(ValueError, match='is for causal patterns, got Dilated'):
    BlockwiseCausal(4, both_ways)
