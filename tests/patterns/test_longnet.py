"""Dilated: offsets, counts, errors."""

import numpy as np
import pytest

from longjax import Dilated


def counts(pattern, length, head, num_heads):
  i = np.arange(length)
  return pattern.multiplicity(i[:, None], i, head, num_heads)


def test_offsets_of_the_paper_interleave_heads():
  assert Dilated((8,), (4,)).head_offsets(4, 6) == (0, 1, 2, 3, 0, 1)


def test_offsets_of_torchscale_are_contiguous_groups():
  pattern = Dilated((8,), (4,), offsets='torchscale')
  assert pattern.head_offsets(4, 6) == (0, 0, 1, 1, 2, 2)
  # More residues than heads: the last ones are nobody's.
  assert pattern.head_offsets(4, 3) == (0, 1, 2)
  assert pattern.head_offsets(1, 3) == (0, 0, 0)


@pytest.mark.parametrize('offsets', ['paper', 'torchscale'])
def test_definition_row_by_row(offsets):
  """The mask of equations 3-5 and 13-15, written as loops."""
  pattern = Dilated((4, 10), (2, 3), offsets=offsets)
  heads, length = 5, 23
  for head in range(heads):
    got = counts(pattern, length, head, heads)
    for i in range(length):
      for j in range(length):
        wanted = 0
        for w, r in ((4, 2), (10, 3)):
          s = head % r if offsets == 'paper' else head // -(-heads // r)
          segment = range(i // w * w, (i // w + 1) * w)
          rows = [u for u in segment if (u % w) % r == s]
          wanted += i in rows and j in rows and j <= i
        assert got[i, j] == wanted


def test_a_key_seen_by_several_parts_counts_as_often():
  c = counts(Dilated((4, 8, 16), (1, 1, 1), causal=False), 16, 0, 1)
  assert c[0, 3] == 3 and c[0, 4] == 2 and c[0, 8] == 1


def test_lists_are_tuples():
  pattern = Dilated([4, 8], [1, 2])
  assert pattern == Dilated((4, 8), (1, 2))
  hash(pattern)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (((4, 8), (1,)), r'2 segment lengths \(4, 8\) and 1 ratios \(1,\)'),
    (((4,), (1, 2)), r'1 segment lengths \(4,\) and 2 ratios \(1, 2\)'),
    (((), ()), 'at least one; got 0 segment lengths'),
    (((4,), (5,)), 'ratio 5 is above its segment length 4'),
    (((4, 8), (4, 9)), 'ratio 9 is above its segment length 8'),
    (((0,), (1,)), 'segment length must be a whole number >= 1, got 0'),
    (((-4,), (1,)), 'segment length must be .* got -4'),
    (((4.0,), (1,)), 'segment length must be .* got 4.0'),
    (((True,), (1,)), 'segment length must be .* got True'),
    (((4,), (0,)), 'ratio must be a whole number >= 1, got 0'),
    (((4,), (-1,)), 'ratio must be .* got -1'),
    (((4,), (1.5,)), 'ratio must be .* got 1.5'),
    (((4,), (True,)), 'ratio must be .* got True'),
    (((float('inf'),), (1,)), 'segment length must be .* got inf'),
  ],
)
def test_bad_segments_and_ratios_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Dilated(*arguments)


def test_unknown_offsets_are_refused():
  with pytest.raises(ValueError, match="'papers' is not one of .*torchscale"):
    Dilated((4,), (1,), offsets='papers')


@pytest.mark.parametrize('rule', ['paper', 'torchscale'])
@pytest.mark.parametrize('causal', [True, False])
def test_a13_18_how_many_pairs_are_seen(causal, rule):
  heads, length = 4, 29
  for w, r in ((8, 2), (16, 6), (10, 3)):
    for j in range(heads):
      pattern = Dilated((w,), (r,), causal, offsets=rule)
      s = j % r if rule == 'paper' else j // -(-heads // r)
      seen = counts(pattern, length, j, heads)
      total = 0
      for start in range(0, length, w):
        rows = min(w, length - start)
        n = max(-(-(rows - s) // r), 0)
        total += n * (n + 1) // 2 if causal else n * n
      assert seen.sum() == total


@pytest.mark.parametrize('rule', ['paper', 'torchscale'])
def test_a13_19_masks_of_the_papers_figure_2(rule):
  """(4, 1), (8, 2), (16, 4) over 16 positions, head offset 0."""
  pattern = Dilated((4, 8, 16), (1, 2, 4), offsets=rule)
  seen = counts(pattern, 16, 0, 1) > 0
  wanted = np.kron(np.eye(4, dtype=bool), np.tri(4, dtype=bool))
  for rows, columns in (
    ((4, 6), (0, 2)),
    ((8, 12), (0, 4)),
    ((12, 14), (8, 10)),
  ):
    for row in rows:
      wanted[row, list(columns)] = True
  # (12, 8) is in both of the wider patterns.
  np.testing.assert_array_equal(seen, wanted)
