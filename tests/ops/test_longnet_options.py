"""LongNet's dilated attention with every option at once, and over the borders
of the segments of real schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Dilated
from longjax.models.longnet import gigapath_schedule, schedule
from tests.ops.helpers import check_against_reference, forward, qkv

PACKED = jnp.asarray(
  [[3] * 20 + [-1] * 4 + [3] * 6 + [8] * 30, [-1] * 9 + [0] * 41 + [-1] * 10]
)
# (pattern, arguments of `qkv`, options of `attention`).
OPTIONS = {
  'causal': (
    Dilated((7, 16, 45), (3, 6, 1), offsets='torchscale', detach_weights=True),
    dict(kv_heads=2),
    dict(
      segment_ids=PACKED,
      position=longjax.RoPE(),
      dropout_rate=0.3,
      dropout_key=jax.random.key(0),
      global_tokens=jnp.asarray([[2, 40], [30, -1]]),
    ),
  ),
  'both ways': (
    Dilated((10, 33), (4, 5), causal=False),
    dict(kv_heads=1),
    dict(
      segment_ids=PACKED,
      position=longjax.XPos(),
      dropout_rate=0.2,
      dropout_key=jax.random.key(0),
      logit_soft_cap=3.0,
    ),
  ),
  'over a border of segments of 185,363': (
    gigapath_schedule(),
    dict(heads=16, size=4, batch=1),
    dict(
      q_positions=jnp.int32(185_363 - 23), kv_positions=jnp.int32(185_363 - 31)
    ),
  ),
  # 16384 mod 6 is 4 and 32768 mod 12 is 8.
  'over a border of the paper': (
    schedule(32_768),
    dict(heads=12, size=4, batch=1),
    dict(
      q_positions=32_768 - 23, kv_positions=32_768 - 31, position=longjax.XPos()
    ),
  ),
}


# Of these, gradients are in the full grid.
LONG = ('over a border of segments of 185,363', 'over a border of the paper')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.full) if name in LONG else name
    for name in OPTIONS
  ],
)
def test_all_options_at_once(name):
  pattern, sizes, options = OPTIONS[name]
  inputs = qkv(21, **(dict(length=60) | sizes))
  check_against_reference(inputs, pattern, **options)


def test_over_a_border_of_segments_of_185_363():
  pattern, sizes, options = OPTIONS['over a border of segments of 185,363']
  inputs = qkv(21, length=60, **sizes)
  (out, lse), (wanted, wanted_lse) = (
    forward(implementation, inputs, pattern, **options)
    for implementation in ('xla', 'reference')
  )
  np.testing.assert_allclose(out, wanted, atol=2e-5)
  np.testing.assert_allclose(lse, wanted_lse, atol=2e-5)
