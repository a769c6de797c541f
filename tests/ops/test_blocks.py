"""The loop over many blocks and chunks, which short texts do not enter.

Block sizes are made small, so that every feature goes through the loop, its
backward pass and the edges of blocks; and results must not depend on them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax.ops import tasks
from tests.ops import cases
from tests.ops.helpers import (
  assert_close,
  check_against_reference,
  qkv,
  run,
  transformer_xl,
)


def set_sizes(monkeypatch, block, chunk, single):
  monkeypatch.setattr(tasks, 'BLOCK', block)
  monkeypatch.setattr(tasks, 'CHUNK', chunk)
  monkeypatch.setattr(tasks, 'SINGLE', single)
  # What was compiled before knows the other sizes.
  jax.clear_caches()


@pytest.fixture(scope='module', autouse=True)
def small_blocks():
  """Blocks of 16 queries, which visit 8 keys at a time."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    set_sizes(monkeypatch, block=16, chunk=8, single=0)
    yield
  jax.clear_caches()


def test_the_loop_over_chunks_is_really_entered():
  q, k, v = qkv(length=40)
  jaxpr = jax.make_jaxpr(
    lambda q: longjax.attention(
      q, k, v, longjax.SlidingWindow(9), implementation='xla'
    )
  )(q)
  assert ' while[' in str(jaxpr)


SEGMENTS = jnp.asarray(
  [[3] * 20 + [1] * 31 + [-1] * 4 + [2] * 22, [-1] * 9 + [0] * 60 + [5] * 8]
)
TOKENS = jnp.asarray([[0, 40, 40, -1], [70, 12, 3, 5]])
XL = transformer_xl(0, 4, 8, -80, 80)
FEATURES = {
  'skewed table, dilation per head': (
    longjax.SlidingWindow(11, 3, dilation=(1, 2, 1, 3)),
    dict(position=XL),
  ),
  'skewed table, traced offsets': (
    longjax.SlidingWindow(11, dilation=2),
    dict(
      position=transformer_xl(1, 4, 8, -1, 24),
      q_positions=np.int32(25),
      kv_positions=np.int32(18),
    ),
  ),
  'skewed table, LongNet': (
    longjax.Dilated((20, 77), (2, 5)),
    dict(position=XL, segment_ids=None),
  ),
  'looked-up table, Lambda in packed documents': (
    longjax.Lambda(9, 5),
    dict(position=XL, segment_ids=SEGMENTS),
  ),
  'global keys and a soft cap': (
    longjax.SlidingWindow(9, 6),
    dict(position=longjax.ALiBi(), global_tokens=TOKENS, logit_soft_cap=3.0),
  ),
  'dropout, LongNet in packed documents': (
    longjax.Dilated((8, 32), (1, 3), offsets='torchscale'),
    dict(
      dropout_rate=0.3,
      dropout_key=jax.random.key(3),
      segment_ids=SEGMENTS,
      position=longjax.RoPE(),
    ),
  ),
  'detached weights and global keys': (
    longjax.Dilated((16, 64), (2, 4), causal=False, detach_weights=True),
    dict(global_tokens=TOKENS),
  ),
  'xPos over many blocks': (
    longjax.Lambda(30, 3),
    dict(position=longjax.XPos(scale_base=20.0)),
  ),
  'everything, each row at its own place': (
    longjax.SelfExtend(12, 3),
    dict(
      position=longjax.RoPE(),
      q_positions=jnp.asarray([9, 2]),
      kv_positions=jnp.asarray([4, 0]),
    ),
  ),
  'ring buffer': (
    longjax.Lambda(20, 6),
    dict(
      position=longjax.RoPE(),
      q_positions=jnp.arange(77)[None] + jnp.asarray([[0], [3]]),
      kv_positions=jnp.stack(
        [jnp.roll(jnp.arange(77), 30), jnp.arange(77)[::-1] - 5]
      ),
    ),
  ),
}


@pytest.mark.parametrize('name', FEATURES)
def test_feature(name):
  pattern, options = FEATURES[name]
  options = {k: v for k, v in options.items() if v is not None}
  inputs = qkv(7, 2, 77, 4, 2, 8, value_size=6)
  check_against_reference(inputs, pattern, **options)


@pytest.mark.full
@pytest.mark.parametrize('number', range(400, 500))
def test_more_cases(number):
  inputs, pattern, options = cases.draw(number, length=90 + number % 40)
  narrow = inputs[0].dtype != jnp.float32
  check_against_reference(inputs, pattern, narrow=narrow, **options)


def test_results_do_not_depend_on_the_block_sizes(monkeypatch):
  """The same entries are dropped, too."""
  inputs = qkv(8, 1, 150, 2)
  pattern = longjax.SlidingWindow(40, 20)
  options = dict(
    position=longjax.RoPE(), dropout_rate=0.4, dropout_key=jax.random.key(1)
  )
  results = []
  for block, chunk, single in ((16, 8, 0), (128, 512, 1024), (50, 33, 0)):
    set_sizes(monkeypatch, block, chunk, single)
    results.append(run('xla', inputs, pattern, **options))
  jax.clear_caches()
  assert_close(results[1], results[0], forward=2e-6, gradient=5e-6)
  assert_close(results[2], results[0], forward=2e-6, gradient=5e-6)
