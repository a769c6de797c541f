"""xPos where queries of one block lie far apart.

Its damping is computed around one query of a block: unless blocks are kept
short, the factors of the others leave float32, silently.
"""

import jax.numpy as jnp
import pytest

import longjax
from longjax import Dilated, SlidingWindow, XPos
from tests.ops.helpers import check_against_reference, qkv

FAR = jnp.concatenate([jnp.arange(40) + 60_000, jnp.arange(60)])[None]
PACKED = jnp.asarray([[0] * 40 + [1] * 60])
GAP = jnp.asarray([[0] * 130 + [-1] * 110 + [1] * 60])

CASES = {
  'strong damping': (SlidingWindow(5), 1.0, 300, {}),
  'a wide dilation, soft cap': (
    SlidingWindow(5, dilation=64),
    8.0,
    300,
    dict(logit_soft_cap=3.0),
  ),
  'a wide ratio': (Dilated((300,), (64,)), 8.0, 300, {}),
  'positions one by one': (
    longjax.Full(),
    512.0,
    100,
    dict(q_positions=FAR, kv_positions=FAR, segment_ids=PACKED),
  ),
  'rows moved together over a gap': (
    Dilated((50,), (4,)),
    4.0,
    300,
    dict(segment_ids=GAP),
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_far_apart(name):
  pattern, scale_base, length, options = CASES[name]
  check_against_reference(
    qkv(0, 1, length, 2),
    pattern,
    position=XPos(scale_base=scale_base),
    **options,
  )
