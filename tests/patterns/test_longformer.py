"""SlidingWindow and Full: conventions, converters, errors."""

import math

import numpy as np
import pytest

from longjax import Full, SlidingWindow

I = np.arange(40)


def seen(pattern, head=0, num_heads=1):
  return pattern.multiplicity(I[:, None], I, head, num_heads)


def test_window_counts_keys_strictly_left_and_right_of_self():
  counts = seen(SlidingWindow(3, 2)).sum(axis=1)
  assert (counts[3:-2] == 3 + 1 + 2).all()
  assert counts[0] == 1 + 2 and counts[-1] == 3 + 1
  np.testing.assert_array_equal(seen(SlidingWindow(0)), np.eye(40))


def test_dilation_takes_steps_of_d():
  row = seen(SlidingWindow(3, 1, dilation=4))[20]
  assert list(np.flatnonzero(row)) == [8, 12, 16, 20, 24]


def test_dilation_per_head():
  pattern = SlidingWindow(2, dilation=(1, 5))
  assert list(np.flatnonzero(seen(pattern, 0, 2)[20])) == [18, 19, 20]
  assert list(np.flatnonzero(seen(pattern, 1, 2)[20])) == [10, 15, 20]


def test_equal_dilations_share_a_branch():
  branches = SlidingWindow(2, dilation=(3, 1, 3, 1)).branches(4)
  assert [(b.stride, b.heads) for b in branches] == [(1, (1, 3)), (3, (0, 2))]


def test_a_list_of_dilations_is_a_tuple():
  assert SlidingWindow(2, dilation=[1, 2]) == SlidingWindow(2, dilation=(1, 2))


def test_from_hf_counts_both_sides():
  # Hugging Face's 512: 256 keys to each side and self, 513 in all.
  assert SlidingWindow.from_hf(512) == SlidingWindow(256, 256)
  assert SlidingWindow.from_hf(512, causal=True) == SlidingWindow(256)
  assert SlidingWindow.from_hf(8, dilation=(1, 2)) == SlidingWindow(
    4, 4, (1, 2)
  )
  assert (seen(SlidingWindow.from_hf(8)).sum(1)[4:-4] == 9).all()


def test_from_flash_has_minus_one_for_no_bound():
  assert SlidingWindow.from_flash((128, 0)) == SlidingWindow(128)
  assert SlidingWindow.from_flash((128, 64)) == SlidingWindow(128, 64)
  assert SlidingWindow.from_flash((-1, 0)) == SlidingWindow(math.inf)
  assert (seen(SlidingWindow.from_flash((-1, -1))) == 1).all()
  np.testing.assert_array_equal(
    seen(SlidingWindow.from_flash((-1, 0))), seen(Full())
  )


def test_full():
  np.testing.assert_array_equal(seen(Full()), np.tri(40))
  np.testing.assert_array_equal(seen(Full(causal=False)), np.ones((40, 40)))


def test_causal_is_having_nothing_to_the_right():
  assert SlidingWindow(5).causal and Full().causal
  assert not SlidingWindow(5, 1).causal and not Full(causal=False).causal


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((-1,), 'left must be a whole number >= 0 or math.inf, got -1'),
    ((4, -2), 'right must be a whole number >= 0 or math.inf, got -2'),
    ((2.5,), 'left must be .* got 2.5'),
    ((True,), 'left must be .* got True'),
    ((4, False), 'right must be .* got False'),
    (('4',), "left must be .* got '4'"),
    ((None,), 'left must be .* got None'),
    ((-math.inf,), 'left must be .* got -inf'),
    ((math.nan,), 'left must be .* got nan'),
    ((4, 0, 0), 'dilation must be a whole number >= 1, got 0'),
    ((4, 0, -3), 'dilation must be a whole number >= 1, got -3'),
    ((4, 0, 1.0), 'dilation must be .* got 1.0'),
    ((4, 0, True), 'dilation must be .* got True'),
    ((4, 0, math.inf), 'dilation must be .* got inf'),
    ((4, 0, (1, 0)), 'dilation must be .* got 0'),
    ((4, 0, (1, 'a')), "dilation must be .* got 'a'"),
    ((4, 0, ()), 'dilation'),
  ],
)
def test_bad_windows_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    SlidingWindow(*arguments)


def test_dilations_that_do_not_match_the_heads_are_refused():
  pattern = SlidingWindow(4, dilation=(1, 2, 3))
  for use in (
    pattern.check_heads,
    pattern.branches,
    lambda heads: pattern.multiplicity(3, 2, 0, heads),
  ):
    with pytest.raises(
      ValueError, match=r'3 dilations \(1, 2, 3\) for 4 heads'
    ):
      use(4)
  pattern.check_heads(3)


@pytest.mark.parametrize(
  ('window', 'message'),
  [
    (7, 'must be even, got 7'),
    (0, 'must be a whole number >= 2, got 0'),
    (-8, 'must be a whole number >= 2, got -8'),
    (8.0, 'must be a whole number >= 2, got 8.0'),
  ],
)
def test_bad_hugging_face_windows_are_refused(window, message):
  with pytest.raises(ValueError, match=message):
    SlidingWindow.from_hf(window)


def test_bad_flash_windows_are_refused():
  with pytest.raises(ValueError, match='got -2'):
    SlidingWindow.from_flash((-2, 0))
