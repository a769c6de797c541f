"""Lambda, its halves and its rivals: keys, told distances, errors."""

import numpy as np
import pytest

from longjax import AttentionSinks, DistanceCeiling, Lambda, SelfExtend

I = np.arange(50)


def test_lambda_sees_the_window_and_the_start():
  seen = Lambda(6, 3).multiplicity(I[:, None], I, 0, 1)
  assert list(np.flatnonzero(seen[20])) == [0, 1, 2, *range(15, 21)]
  assert list(np.flatnonzero(seen[7])) == [0, 1, *range(2, 8)]
  assert list(np.flatnonzero(seen[5])) == [*range(6)]
  assert seen.max() == 1


def test_lambda_of_the_papers_figure_2():
  """Window 2 and 2 start keys."""
  seen = Lambda(2, 2).multiplicity(I[:6, None], I[:6], 0, 1)
  wanted = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 0, 1, 1, 0],
    [1, 1, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(seen, wanted)


def test_lambda_tells_no_distance_above_the_window():
  distance = Lambda(6, 3).distance(I[:, None], I)
  np.testing.assert_array_equal(distance, np.minimum(I[:, None] - I, 6))


def test_lambda_without_start_keys_is_one_branch():
  assert len(Lambda(6, 0).branches(4)) == 1
  assert len(Lambda(6, 1).branches(4)) == 2


def test_the_mask_alone_tells_true_distances():
  pattern = Lambda(6, 3, ceiling=False)
  np.testing.assert_array_equal(
    pattern.multiplicity(I[:, None], I, 0, 1),
    Lambda(6, 3).multiplicity(I[:, None], I, 0, 1),
  )
  distance = pattern.distance(I[:, None], I)
  np.testing.assert_array_equal(distance, I[:, None] - I)


def test_the_ceiling_alone_sees_everything_before():
  pattern = DistanceCeiling(6)
  seen = pattern.multiplicity(I[:, None], I, 0, 1)
  np.testing.assert_array_equal(seen, np.tri(50))
  distance = pattern.distance(I[:, None], I)
  np.testing.assert_array_equal(distance, np.minimum(I[:, None] - I, 6))


def test_attention_sinks_tell_positions_in_the_cache():
  """Token by token, as StreamingLLM's cache does it."""
  window, start = 6, 3
  pattern = AttentionSinks(window, start)
  cache = []  # positions of the keys it holds
  for query in range(50):
    cache.append(query)
    if len(cache) > start + window:
      del cache[start]
    seen = pattern.multiplicity(query, I, 0, 1)
    np.testing.assert_array_equal(np.flatnonzero(seen), cache)
    wanted = len(cache) - 1 - np.arange(len(cache))
    told = pattern.distance(query, np.asarray(cache))
    np.testing.assert_array_equal(told, wanted)


def test_self_extend_sees_everything_before():
  seen = SelfExtend(8, 4).multiplicity(I[:, None], I, 0, 1)
  np.testing.assert_array_equal(seen, np.tri(50))


def test_self_extend_groups_far_positions_and_goes_on_from_the_window():
  window, group = 8, 4
  told = SelfExtend(window, group).distance(I[:, None], I)
  true = I[:, None] - I
  np.testing.assert_array_equal(told[true < window], true[true < window])
  far = true >= window
  grouped = I[:, None] // group - I // group + window - window // group
  np.testing.assert_array_equal(told[far], grouped[far])
  # No distance of the far keys is told that the window has, but for rounding,
  # and no jump at its end.
  edge = told[true == window]
  assert set(edge) <= {window, window + 1}
  # The furthest is told about 1 / group of its distance.
  assert told[49, 0] == 49 // group + window - window // group


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Lambda(0, 1), 'window must be a whole number >= 1, got 0'),
    (lambda: Lambda(-3, 1), 'window must be .* got -3'),
    (lambda: Lambda(2.0, 1), 'window must be .* got 2.0'),
    (lambda: Lambda(True, 1), 'window must be .* got True'),
    (lambda: Lambda(float('inf'), 1), 'window must be .* got inf'),
    (lambda: Lambda(4, -1), 'start must be a whole number >= 0, got -1'),
    (lambda: Lambda(4, 1.5), 'start must be .* got 1.5'),
    (lambda: Lambda(4, False), 'start must be .* got False'),
    (lambda: DistanceCeiling(0), 'window must be .* >= 1, got 0'),
    (lambda: AttentionSinks(0), 'window must be .* >= 1, got 0'),
    (lambda: AttentionSinks(4, -1), 'start must be .* >= 0, got -1'),
    (lambda: SelfExtend(0, 1), 'window must be .* got 0'),
    (lambda: SelfExtend(4, 0), 'group must be a whole number >= 1, got 0'),
    (lambda: SelfExtend(4, -2), 'group must be .* got -2'),
    (lambda: SelfExtend(4, 2.0), 'group must be .* got 2.0'),
    (lambda: SelfExtend(4, True), 'group must be .* got True'),
  ],
)
def test_bad_sizes_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
