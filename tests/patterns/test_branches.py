"""Every pattern is the sum of its branches, and its reach is true."""

import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest

import longjax
from longjax.patterns import TRUE_DISTANCE, Branch
from longjax.patterns.base import FURTHEST

pytest.importorskip('hypothesis')
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.patterns.strategies import patterns

EXAMPLES = [
  longjax.SlidingWindow(3, 2),
  longjax.SlidingWindow(3, dilation=(1, 2, 2, 5)),
  longjax.Dilated((8, 16), (2, 4)),
  longjax.Dilated((8, 16), (1, 6), offsets='torchscale', detach_weights=True),
  longjax.Lambda(8, 3),
  longjax.Lambda(8, 3, ceiling=False),
  longjax.DistanceCeiling(8),
  longjax.AttentionSinks(8, 3),
  longjax.SelfExtend(8, 3),
  longjax.Full(causal=False),
  longjax.FixedSparse(8, 3),
  longjax.BlockwiseCausal(5),
  longjax.BlockwiseCausal(6, longjax.Dilated((8, 16), (2, 4))),
]


def sum_of_branches(pattern, q_pos, k_pos, num_heads):
  """[H, T, S] int counts, and the told distance of the pairs seen."""
  total = np.zeros((num_heads, len(q_pos), len(k_pos)), int)
  told = np.full(total.shape, 2**40)
  for branch in pattern.branches(num_heads):
    heads = range(num_heads) if branch.heads is None else branch.heads
    assert branch.offsets is None or len(branch.offsets) == len(heads)
    for number, head in enumerate(heads):
      own = branch.offsets or branch.columns
      own = own[number] if own else None
      seen = branch.sees(q_pos[:, None], k_pos, own)
      total[head] += seen
      d = branch.distance
      far = d.queries(q_pos)[:, None] - d.keys(k_pos)
      told[head] = np.where(seen, far, told[head])
  return total, told


@settings(max_examples=400)
@given(st.data())
def test_branches_sum_to_multiplicity(data):
  num_heads = data.draw(st.integers(1, 7))
  pattern = data.draw(patterns(num_heads))
  first = data.draw(st.integers(0, 300))
  ahead = data.draw(st.integers(-60, 60))
  q_pos = first + np.arange(data.draw(st.integers(1, 70)), dtype=np.int32)
  k_pos = np.arange(data.draw(st.integers(1, 70)), dtype=np.int32)
  k_pos += max(first + ahead, 0)

  total, told = sum_of_branches(pattern, q_pos, k_pos, num_heads)
  wanted = pattern.multiplicity(
    q_pos[:, None], k_pos, np.arange(num_heads)[:, None, None], num_heads
  )
  np.testing.assert_array_equal(total, np.broadcast_to(wanted, total.shape))
  for head in range(num_heads):
    np.testing.assert_array_equal(
      pattern.multiplicity(q_pos[:, None], k_pos, head, num_heads), total[head]
    )
  distance = np.broadcast_to(
    pattern.distance(q_pos[:, None], k_pos), told.shape
  )
  np.testing.assert_array_equal(told[total > 0], distance[total > 0])


@settings(max_examples=200)
@given(st.data())
def test_reach_and_causal_bound_what_is_seen(data):
  num_heads = data.draw(st.integers(1, 5))
  pattern = data.draw(patterns(num_heads))
  # Far from position 0, where start keys would look like a long reach.
  q_pos = 5000 + np.arange(120, dtype=np.int32)
  k_pos = 4000 + np.arange(2000, dtype=np.int32)
  seen = pattern.multiplicity(
    q_pos[:, None], k_pos, np.arange(num_heads)[:, None, None], num_heads
  )
  difference = np.broadcast_to(q_pos[:, None] - k_pos, seen.shape)[seen > 0]
  left, right = pattern.reach()
  assert left >= 0 and right >= 0
  if difference.size:
    assert difference.max() <= left
    assert -difference.min() <= right
  if pattern.causal:
    assert right == 0
    assert (difference >= 0).all()
  else:
    assert right > 0 or isinstance(pattern, longjax.Dilated)


@settings(max_examples=200)
@given(st.data())
def test_bounds_of_a_branch_never_go_back(data):
  num_heads = data.draw(st.integers(1, 5))
  q_pos = np.arange(400, dtype=np.int32)
  for branch in data.draw(patterns(num_heads)).branches(num_heads):
    lo, hi = branch.bounds(q_pos)
    assert (np.diff(lo) >= 0).all()
    assert (np.diff(hi) >= 0).all()


@pytest.mark.parametrize(
  ('pattern', 'reach'),
  [
    (longjax.SlidingWindow(5), (5, 0)),
    (longjax.SlidingWindow(5, 2, dilation=3), (15, 6)),
    (longjax.SlidingWindow(5, 2, dilation=(1, 4)), (20, 8)),
    (longjax.SlidingWindow(np.inf, 0, dilation=2), (np.inf, 0)),
    (longjax.SlidingWindow(0, np.inf), (0, np.inf)),
    (longjax.Dilated((4, 32, 8), (1, 4, 2)), (31, 0)),
    (longjax.Dilated((4, 32), (1, 4), causal=False), (31, 31)),
    (longjax.Lambda(10, start=1000), (9, 0)),
    (longjax.SelfExtend(10, 4), (np.inf, 0)),
    (longjax.Full(), (np.inf, 0)),
    (longjax.Full(causal=False), (np.inf, np.inf)),
    (longjax.FixedSparse(8, 3), (np.inf, 0)),
    (longjax.BlockwiseCausal(6), (11, 0)),
    (longjax.BlockwiseCausal(6, longjax.SlidingWindow(4)), (4, 0)),
  ],
)
def test_reach(pattern, reach):
  assert pattern.reach() == reach


@pytest.mark.parametrize('pattern', EXAMPLES, ids=repr)
def test_frozen_hashable_and_static_under_jit(pattern):
  field = dataclasses.fields(pattern)[0].name
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(pattern, field, 1)
  again = pickle.loads(pickle.dumps(copy.deepcopy(pattern)))
  assert again == pattern and hash(again) == hash(pattern)
  assert len({pattern, again, *EXAMPLES}) == len(EXAMPLES)

  traces = []

  def count(x, pattern):
    traces.append(pattern)
    return x + sum(pattern.multiplicity(5, np.arange(6), 0, 4))

  jitted = jax.jit(count, static_argnums=1)
  assert jitted(0, pattern) == jitted(0, again)
  assert len(traces) == 1


def test_positions_may_be_jax_arrays():
  q_pos = np.arange(30, dtype=np.int32)
  for pattern in EXAMPLES:
    wanted = pattern.multiplicity(q_pos[:, None], q_pos, 1, 4)
    got = jax.jit(lambda i, p=pattern: p.multiplicity(i[:, None], i, 1, 4))
    np.testing.assert_array_equal(got(q_pos), wanted)
    distance = jax.jit(lambda i, p=pattern: p.distance(i[:, None], i))
    np.testing.assert_array_equal(
      distance(q_pos), pattern.distance(q_pos[:, None], q_pos)
    )


@pytest.mark.parametrize('left', [0, 7, 2**30, np.inf])
def test_bounds_do_not_overflow_at_the_largest_positions(left):
  q_pos = np.array([0, 2**30], np.int32)
  lo, hi = Branch(left=left, right=left, stride=1000).bounds(q_pos)
  assert lo.dtype == hi.dtype == np.int32
  assert (lo >= 0).all() and (lo <= q_pos).all()
  assert (hi >= q_pos).all() and (hi <= FURTHEST).all()


def test_true_distance_tells_positions_as_they_are():
  assert TRUE_DISTANCE.queries(7) == TRUE_DISTANCE.keys(7) == 7
