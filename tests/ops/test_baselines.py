"""What LongNet is compared with, and evaluated with beyond its trained length:
the Sparse Transformer's fixed pattern and blockwise causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import BlockwiseCausal, Dilated, FixedSparse
from longjax.ops import dispatch
from tests.ops.helpers import (
  assert_close,
  check_against_reference,
  forward,
  qkv,
  run,
  transformer_xl,
)
from tests.ops.pallas import dense_backend

PACKED = jnp.asarray([[-1] * 3 + [5] * 30 + [2] * 27, [1] * 40 + [-1] * 20])
SLOTS = jnp.asarray(np.random.default_rng(0).permutation(60))[None].repeat(2, 0)
QUERIES = jnp.asarray([5, 31, 32, 59, -1])[None].repeat(2, 0)

# (pattern, arguments of `qkv`, options of `attention`).
CASES = {
  'sparse': (FixedSparse(16, 3), dict(heads=6, kv_heads=2), {}),
  'sparse, every option': (
    FixedSparse(7, 2),
    dict(heads=4, kv_heads=2),
    dict(
      position=longjax.RoPE(),
      dropout_rate=0.3,
      dropout_key=jax.random.key(1),
      logit_soft_cap=2.0,
      global_tokens=jnp.asarray([[2, 50, -1], [40, 40, 7]]),
    ),
  ),
  'sparse, from a position': (
    FixedSparse(16, 4),
    dict(length=23, kv_length=60),
    dict(q_positions=jnp.int32(45), kv_positions=jnp.int32(9)),
  ),
  'sparse, from a known position': (
    FixedSparse(16, 16),
    dict(length=23, kv_length=60),
    dict(q_positions=45, kv_positions=9, position=longjax.XPos()),
  ),
  'sparse, positions of each row': (
    FixedSparse(8, 3),
    dict(length=23, kv_length=60),
    dict(q_positions=jnp.asarray([40, 21]), kv_positions=jnp.asarray([3, 8])),
  ),
  'sparse, packed': (
    FixedSparse(8, 3),
    dict(kv_heads=2),
    dict(segment_ids=PACKED, position=longjax.ALiBi()),
  ),
  'sparse, slots': (
    FixedSparse(8, 3),
    dict(length=5, kv_length=60, kv_heads=1),
    dict(
      q_positions=QUERIES,
      kv_positions=SLOTS,
      position=transformer_xl(0, 4, 8, 0, 60),
    ),
  ),
  'sparse in blocks': (BlockwiseCausal(16, FixedSparse(8, 3)), {}, {}),
  'blocks': (BlockwiseCausal(13), dict(kv_heads=2), dict(scale=0.9)),
  'blocks, packed': (
    BlockwiseCausal(9),
    {},
    dict(segment_ids=PACKED, position=longjax.XPos()),
  ),
  'blocks, from a position': (
    BlockwiseCausal(9),
    dict(length=23, kv_length=60),
    dict(q_positions=jnp.int32(30)),
  ),
  'blocks of a dilated mixture': (
    BlockwiseCausal(12, Dilated((8, 24, 40), (1, 2, 3), detach_weights=True)),
    {},
    dict(position=longjax.XPos()),
  ),
}


# Most of a case's time is compiling; the others are in the full grid.
QUICK_CASES = (
  'sparse, every option',
  'sparse, packed',
  'blocks of a dilated mixture',
)


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK_CASES else pytest.param(name, marks=pytest.mark.full)
    for name in CASES
  ],
)
def test_xla_is_the_definition(name):
  pattern, sizes, options = CASES[name]
  inputs = qkv(3, **(dict(length=60) | sizes))
  check_against_reference(inputs, pattern, **options)


@pytest.mark.parametrize(
  ('pattern', 'sizes', 'options'),
  [
    (
      BlockwiseCausal(20),
      {},
      dict(
        global_tokens=jnp.asarray([[2, 50], [40, -1]]),
        dropout_rate=0.3,
        dropout_key=jax.random.key(1),
      ),
    ),
    *(
      pytest.param(*case, marks=pytest.mark.full)
      for case in (
        (BlockwiseCausal(13), dict(kv_heads=2), {}),
        (BlockwiseCausal(20), dict(length=17, kv_length=70), {}),
        (BlockwiseCausal(20), dict(length=70, kv_length=17), {}),
        (BlockwiseCausal(100), {}, dict(position=longjax.RoPE())),
      )
    ),
  ],
)
def test_blocks_are_one_kernel_call(pattern, sizes, options, monkeypatch):
  """The kernels' contract in place of a kernel."""
  monkeypatch.setitem(dispatch._MODULES, 'dense', dense_backend.__name__)
  calls = []
  monkeypatch.setattr(
    dense_backend, 'check', lambda spec, x: calls.append(x.k.shape)
  )
  inputs = qkv(3, **(dict(length=60) | sizes))
  got = run('dense', inputs, pattern, **options)
  assert_close(got, run('reference', inputs, pattern, **options))
  assert len(set(calls)) == 1


@pytest.mark.parametrize(
  ('pattern', 'options', 'reason'),
  [
    (FixedSparse(8, 2), {}, 'no band around it'),
    (BlockwiseCausal(8), dict(segment_ids=PACKED), 'segment_ids with Block'),
    (BlockwiseCausal(8), dict(q_positions=3), 'only for a plain 0'),
    (
      BlockwiseCausal(8, longjax.SlidingWindow(4, dilation=2)),
      {},
      'blocks of a dilated',
    ),
    (BlockwiseCausal(8, longjax.Lambda(4, 2)), {}, 'start keys of a dilated'),
  ],
)
def test_what_kernels_refuse(pattern, options, reason, monkeypatch):
  monkeypatch.setitem(dispatch._MODULES, 'dense', dense_backend.__name__)
  with pytest.raises(NotImplementedError, match=reason):
    longjax.attention(
      *qkv(length=60), pattern, implementation='dense', **options
    )


@pytest.mark.parametrize('pattern', [FixedSparse(8, 2), BlockwiseCausal(8)])
def test_cudnn_refuses(pattern):
  with pytest.raises(NotImplementedError, match='no causal window'):
    longjax.attention(
      *qkv(length=60, dtype=jnp.bfloat16), pattern, implementation='cudnn'
    )


def test_work_is_what_is_seen():
  """Key rows of the sparse pattern: a block, and c of each earlier one."""
  from longjax.ops.views import Columns

  view = Columns(64, 64, 16, (13, 10), 3, (None, None))
  assert view.num_columns == 4 * 3
  np.testing.assert_array_equal(
    view.key_index[1], [10, 11, 12, 26, 27, 28, 42, 43, 44, 58, 59, 60]
  )


def test_distances_never_reach_the_trained_length():
  """Blocks of l / 2: XPos and RoPE are told nothing that training was not."""
  i = np.arange(200)
  trained = 32
  seen = BlockwiseCausal(trained // 2).multiplicity(i[:, None], i, 0, 1) > 0
  distance = (i[:, None] - i)[seen]
  assert (distance.min(), distance.max()) == (0, trained - 1)
  # The first block of l, and with it all of a text of l / 2, is as in training.
  np.testing.assert_array_equal(seen[:trained, :trained], np.tri(trained))
  # Longer texts see as much in every block.
  np.testing.assert_array_equal(seen[48:64, 32:64], seen[16:32, :32])


def test_longnet_with_segments_up_to_the_trained_length_needs_no_blocks():
  longnet = Dilated((8, 16, 32), (1, 2, 4))
  inputs = qkv(5, 1, 100, 4)
  blocks = forward('xla', inputs, BlockwiseCausal(16, longnet))
  np.testing.assert_array_equal(blocks[0], forward('xla', inputs, longnet)[0])
