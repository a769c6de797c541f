"""Stages: patterns per layer, learning rates, mistakes."""

import numpy as np
import pytest

from longjax import patterns
from longjax.training import stages as stages_lib
from longjax.training.stages import Stage, make_stages

BASE = dict(length=64, batch_size=2, steps=10, learning_rate=1e-3)


def test_layer_patterns():
  stage = Stage(**BASE, windows=(4, 8), dilations=(1, (1, 2)))
  assert stage.layer_patterns('sliding_window', 2) == (
    patterns.SlidingWindow(4),
    patterns.SlidingWindow(8, dilation=(1, 2)),
  )
  stage = Stage(**BASE, windows=16)
  assert stage.layer_patterns('sliding_window', 2) == (
    patterns.SlidingWindow(16),
    patterns.SlidingWindow(16),
  )
  stage = Stage(**BASE, windows=16, start=3)
  assert stage.layer_patterns('lambda', 1) == (patterns.Lambda(16, 3),)
  stage = Stage(**BASE, segment_lengths=(8, 16), ratios=(1, 2))
  assert stage.layer_patterns('dilated', 3) == (
    (patterns.Dilated((8, 16), (1, 2)),) * 3
  )
  assert Stage(**BASE).layer_patterns('full', 1) == (patterns.Full(),)


def test_learning_rate_by_hand():
  stages = make_stages(
    [
      BASE | dict(steps=4, learning_rate=1.0, warmup_steps=2),
      BASE | dict(steps=4, learning_rate=0.5, schedule='linear'),
      BASE | dict(steps=4, learning_rate=2.0, schedule='cosine'),
      BASE | dict(steps=2, learning_rate=1.0, schedule='cubic'),
    ]
  )
  schedule = stages_lib.learning_rate_schedule(stages)
  cosine = [1 + np.cos(np.pi * x) for x in (0, 0.25, 0.5, 0.75)]
  np.testing.assert_allclose(
    [float(schedule(step)) for step in range(14)],
    [0.5, 1, 1, 1, 0.5, 0.375, 0.25, 0.125, *cosine, 1, 0.125],
    rtol=1e-6,
  )


def test_stage_of_each_step():
  stages = make_stages([BASE | dict(steps=3), BASE | dict(steps=2)])
  assert stages_lib.first_steps(stages) == (0, 3, 5)
  assert [stages_lib.stage_of(stages, s) for s in range(6)] == [
    0,
    0,
    0,
    1,
    1,
    2,
  ]


def test_a_window_may_exceed_the_length():
  assert Stage(**BASE, windows=(8, 65)).window_beyond_length() == 65
  assert Stage(**BASE, windows=64).window_beyond_length() is None
  stage = Stage(**BASE, segment_lengths=(128,), ratios=(1,))
  assert stage.window_beyond_length() == 128
  assert Stage(**BASE).window_beyond_length() is None


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(lenght=8), "'lenght' in stage 1: did you mean 'length'"),
    (dict(window=8), "'window' in stage 1: did you mean 'windows'"),
    (dict(length=0), 'length must be an int >= 1, got 0'),
    (dict(batch_size=1.5), 'batch_size must be an int >= 1, got 1.5'),
    (dict(warmup_steps=11), r'warmup_steps must lie in 0..10 .* got 11'),
    (dict(learning_rate=-1.0), 'learning_rate must be >= 0, got -1.0'),
    (dict(learning_rate=float('nan')), 'got nan'),
    (dict(schedule='step'), "'step' is not one of"),
  ],
)
def test_bad_stage(change, message):
  with pytest.raises(ValueError, match=message):
    make_stages([BASE, BASE | change])


def test_missing_key_and_no_stages():
  with pytest.raises(ValueError, match="stage 0 lacks the key 'steps'"):
    make_stages([dict(length=8, batch_size=1, learning_rate=1.0)])
  with pytest.raises(ValueError, match='stages is empty'):
    make_stages(())


@pytest.mark.parametrize(
  ('pattern', 'keys', 'message'),
  [
    ('banded', {}, "'banded' is not one of"),
    ('sliding_window', {}, "needs stage key 'windows'"),
    ('lambda', dict(windows=4), "needs stage key 'start'"),
    ('full', dict(windows=4), "'windows' is not used by pattern 'full'"),
    ('sliding_window', dict(windows=(1, 2, 3)), '3 entries for 2 layers'),
    ('sliding_window', dict(windows=-1), '-1'),
    (
      'dilated',
      dict(segment_lengths=(8,), ratios=(1, 2)),
      '1 segment lengths',
    ),
  ],
)
def test_bad_patterns(pattern, keys, message):
  with pytest.raises(ValueError, match=message):
    Stage(**BASE, **keys).layer_patterns(pattern, 2)


def test_encoders_see_two_sides():
  stage = Stage(**BASE, windows=(2, 3), dilations=2)
  assert stage.layer_patterns('sliding_window', 2, causal=False) == (
    patterns.SlidingWindow(2, 2, 2),
    patterns.SlidingWindow(3, 3, 2),
  )
  full = Stage(**BASE).layer_patterns('full', 2, causal=False)
  assert full == (patterns.Full(causal=False),) * 2
  stage = Stage(**BASE, segment_lengths=(8,), ratios=(1,))
  (dilated,) = stage.layer_patterns('dilated', 1, causal=False)
  assert dilated == patterns.Dilated((8,), (1,), causal=False)
  with pytest.raises(
    ValueError, match="'lambda' is causal: an encoder has one"
  ):
    Stage(**BASE, windows=4, start=1).layer_patterns('lambda', 2, causal=False)
