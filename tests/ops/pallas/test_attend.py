"""Attention as kernel calls: views, prefixes, splits, merging and gradients.

The kernels here are the contract's dense definition, so that all that is not a
kernel is tested in float32 over the whole grid of options.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax.ops import dispatch
from longjax.ops.coordinates import locate
from longjax.ops.encode import Auxiliary, Differentiable, Static
from longjax.ops.pallas import contract, parts
from longjax.ops.pallas.attend import Kernels
from tests.ops.helpers import assert_close, qkv, run
from tests.ops.pallas import dense_backend, grid


@pytest.fixture(autouse=True)
def dense(monkeypatch):
  monkeypatch.setitem(dispatch._MODULES, 'dense', dense_backend.__name__)


def check(inputs, pattern, **options):
  got = run('dense', inputs, pattern, **options)
  wanted = run('reference', inputs, pattern, **options)
  if inputs[0].dtype == jnp.float32:
    assert_close(got, wanted)
  else:
    assert_close(got, wanted, forward=2e-2, gradient=4e-2)


def _check_case(number):
  inputs, pattern, options = grid.case(number)
  reason = grid.refusal(pattern, options)
  if reason is None:
    check(inputs, pattern, **options)
    return
  with pytest.raises(NotImplementedError, match=reason):
    run('dense', inputs, pattern, **options)


# 294: fewer keys than start keys, the first of them not at position 0.
@pytest.mark.parametrize('number', [*range(30), 294])
def test_case(number):
  _check_case(number)


@pytest.mark.full
@pytest.mark.parametrize('number', range(30, 400))
def test_more_cases(number):
  _check_case(number)


def test_most_cases_are_served():
  reasons = collections.Counter(
    grid.refusal(*grid.case(n)[1:]) for n in range(30)
  )
  assert reasons[None] >= 15, reasons


# --- What the kernels are asked to do ----------------------------------------


@pytest.fixture
def asked(monkeypatch):
  """The (spec, operands) that the forward pass calls kernels with."""
  calls = []
  real = dense_backend.check

  def spy(spec, x):
    calls.append((spec, x))
    real(spec, x)

  monkeypatch.setattr(dense_backend, 'check', spy)
  jax.clear_caches()
  yield calls
  jax.clear_caches()


def attend(pattern, inputs=None, **options):
  return longjax.attention(
    *(inputs or qkv()), pattern, implementation='dense', **options
  )


TOKENS = np.array([[3, -1, 3], [38, 0, 7]])


@pytest.mark.parametrize(
  ('pattern', 'options'),
  [
    (longjax.SlidingWindow(5), {}),
    (longjax.SlidingWindow(5, 2), dict(global_tokens=TOKENS)),
    (longjax.SlidingWindow(5, 2, dilation=4), {}),
    (longjax.Lambda(8, 3), dict(position=longjax.RoPE())),
    (longjax.Lambda(8, 3), dict(global_tokens=TOKENS, kv_positions=2)),
    (longjax.Lambda(8, 3, ceiling=False), dict(position=longjax.RoPE())),
    (longjax.AttentionSinks(8, 3), dict(position=longjax.RoPE())),
    (longjax.Dilated((16,), (4,)), {}),
    (longjax.Full(), {}),
  ],
)
def test_one_kernel_call(asked, pattern, options):
  attend(pattern, **options)
  assert len(asked) == 1


def test_a_prefix_holds_start_keys_and_global_keys_once(asked):
  attend(longjax.Lambda(8, 3), global_tokens=TOKENS, kv_positions=2)
  ((_, x),) = asked
  assert x.prefix.row.shape == (2, 3 + 3)
  assert x.prefix.q is None  # nothing is rotated
  attend(longjax.Lambda(8, 3), position=longjax.RoPE())
  assert asked[-1][1].prefix.q.shape == asked[-1][1].q.shape


@pytest.mark.parametrize(
  'pattern',
  [
    longjax.Lambda(8, 3, ceiling=False),
    longjax.AttentionSinks(8, 3),
    longjax.DistanceCeiling(8),
  ],
)
def test_distances_of_rivals(pattern):
  check(
    qkv(length=30),
    pattern,
    position=longjax.RoPE(),
    q_positions=np.int32(4),
    kv_positions=np.int32(1),
    global_tokens=np.array([[20, 2], [7, 7]]),
  )


def test_heads_of_a_dilation_are_slices(asked):
  attend(
    longjax.SlidingWindow(3, dilation=(1, 1, 2, 2, 1, 2)),
    qkv(heads=6, kv_heads=2),
  )
  calls = [(x.q.shape[2:4], x.k.shape[2:4]) for _, x in asked]
  # (residues, heads) of queries and of keys. Heads 0-2 share a key head, and
  # so do 3-5: runs of one dilation are cut where the key head changes.
  assert sorted(calls) == sorted(
    [
      ((1, 2), (1, 1)),
      ((1, 1), (1, 1)),
      ((2, 1), (2, 1)),
      ((2, 1), (2, 1)),
      ((2, 1), (2, 1)),
    ]
  )


@pytest.mark.parametrize(
  ('heads', 'group', 'wanted'),
  [
    (None, 2, [range(6)]),
    ((0, 1, 2, 3, 4, 5), 4, [range(6)]),
    ((0, 2), 1, [range(1), range(2, 3)]),
    ((1, 2, 3, 4, 5), 2, [range(1, 2), range(2, 6)]),
    ((0, 1, 2), 2, [range(2), range(2, 3)]),
    ((1, 2, 3), 6, [range(1, 4)]),
    ((3, 4), 6, [range(3, 5)]),
    ((2, 3, 4), 3, [range(2, 3), range(3, 5)]),
  ],
)
def test_runs_of_heads(heads, group, wanted):
  assert parts._runs(heads, 6, group) == wanted


def test_thinning_is_addressing(asked):
  pattern = longjax.Dilated((16, 40), (2, 4))
  attend(pattern, qkv(length=40))
  (near, x), (far, y) = asked
  assert x.q.shape == (2 * 3, 8, 2, 4, 8)  # the last segment is padded
  assert y.q.shape == (2, 10, 4, 4, 8)  # one segment: nothing is
  assert near.residues == (0, 1, 0, 1) and far.residues == (0, 1, 2, 3)


def test_ids_only_where_intervals_do_not_tell(asked):
  def ids(pattern, **sizes):
    attend(pattern, qkv(**sizes))
    return asked[-1][1].k_ids is not None

  causal, both = (longjax.SlidingWindow(3, r, dilation=4) for r in (0, 3))
  assert not ids(causal, length=42)
  assert not ids(both, length=40)
  assert ids(both, length=42)  # padding in the last row could be seen
  assert ids(causal, length=44, kv_length=42)
  assert not ids(longjax.SlidingWindow(3, 3), length=42)
  assert not ids(longjax.Dilated((16,), (4,)), length=42)
  assert ids(longjax.Dilated((16,), (4,), causal=False), length=42)
  assert not ids(longjax.Dilated((16,), (4,), causal=False), length=44)
  assert ids(longjax.Dilated((18,), (4,), causal=False), length=44)


@pytest.mark.parametrize(
  ('length', 'kv_length', 'heads', 'pieces'),
  [(1, 256, 4, 4), (1, 300, 2, 4), (40, 63, 2, 1), (300, 300, 16, 1)],
)
def test_few_queries_split_the_keys(asked, length, kv_length, heads, pieces):
  inputs = qkv(batch=1, length=length, kv_length=kv_length, heads=heads)
  attend(longjax.Full(causal=False), inputs)
  assert asked[-1][1].q.shape[0] == pieces
  attend(longjax.SlidingWindow(7), inputs)
  assert asked[-1][1].q.shape[0] == 1
  check(inputs, longjax.Full(causal=False), segment_ids=None)
  ids = (np.zeros((1, length), int), np.arange(kv_length)[None] % 3)
  check(
    inputs,
    longjax.Full(),
    q_positions=np.int32(kv_length - 5),
    segment_ids=ids,
    dropout_rate=0.3,
    dropout_key=jax.random.key(0),
  )


def test_no_gather_scatter_or_loop_around_the_kernels(monkeypatch):
  """Views are addressing: what is moved is moved by reshapes and selects."""

  def forward(spec, x, **_):
    classes = x.q.shape[2] if spec.residues is None else 1
    out = x.q[:, :, :classes] + x.k.sum() + x.v.sum()
    return out, out[..., 0].transpose(0, 2, 3, 1).astype(jnp.float32)

  monkeypatch.setattr(dense_backend, 'forward', forward)
  x = qkv(length=48)
  for pattern in (
    longjax.SlidingWindow(5, 2),
    longjax.SlidingWindow(5, dilation=4),
    longjax.Dilated((16, 40), (2, 4)),
  ):
    lowered = jax.jit(
      lambda *x, pattern=pattern: longjax.attention(
        *x, pattern, position=longjax.RoPE(), implementation='dense'
      )
    ).lower(*x)
    jax.clear_caches()
    text = lowered.as_text()
    for operation in ('gather', 'scatter', 'while', 'dynamic'):
      assert f'stablehlo.{operation}' not in text, (pattern, operation)
  # What the check above would find.
  text = jax.jit(lambda y, i: y[i]).lower(x[0], np.array([1, 0])).as_text()
  assert 'stablehlo.gather' in text


@pytest.mark.parametrize(
  ('pattern', 'options', 'reason'),
  [
    (longjax.SlidingWindow(3), dict(position=longjax.ALiBi()), 'ALiBi changes'),
    (longjax.SlidingWindow(3), dict(position=longjax.XPos()), 'XPos changes'),
    (
      longjax.SlidingWindow(3),
      dict(q_positions=np.arange(80).reshape(2, 40)),
      'keys in any order',
    ),
    (
      longjax.Lambda(5, 2),
      dict(segment_ids=np.zeros((2, 40), int)),
      'start keys lie in each document',
    ),
    (longjax.Dilated((16,), (2,)), dict(q_positions=1), 'for a plain 0'),
    (
      longjax.SlidingWindow(3, dilation=2),
      dict(kv_positions=np.array([1, 2])),
      'dilation 2',
    ),
  ],
)
def test_refusals(pattern, options, reason):
  with pytest.raises(NotImplementedError, match=reason):
    attend(pattern, **options)


def test_another_value_size_is_refused():
  with pytest.raises(NotImplementedError, match='value size 5 .* head size 8'):
    attend(longjax.Full(), qkv(value_size=5))


def test_queries_and_keys_before_position_0_do_not_exist():
  """As in a halo: shards on the left of the first one."""
  x = qkv(length=20)
  for pattern in (
    longjax.SlidingWindow(3, 4),
    longjax.SlidingWindow(3, 4, dilation=3),
    longjax.SlidingWindow(3),
  ):
    check(x, pattern, q_positions=np.int32(-4), kv_positions=np.int32(-6))


def test_where_follows_the_offsets():
  """One row of `where` for each sequence, from traced positions."""
  q, k, v = qkv(length=10, kv_length=12)
  static = Static(longjax.SlidingWindow(4, 1), 1.0, None, 0.0, True)
  x = Differentiable(q, k, v, None)
  where = locate(10, 12, np.array([30, 5]), np.array([20, -3]), None)
  auxiliary = Auxiliary(where, None, None, jnp.array([7, 8]))
  kernels = Kernels(dense_backend)
  (part,), _ = parts.parts_of(kernels, static, x, auxiliary)
  shown = parts.Shown(static, x, where)
  rows = part.operands(shown, auxiliary).where
  np.testing.assert_array_equal(
    rows,
    contract.where_rows(
      2,
      left=4,
      right=1,
      shift=jnp.array([10, 8]),
      begin=jnp.array([0, 3]),
      end=12,
      q_position=jnp.array([30, 5]),
      k_position=jnp.array([20, -3]),
      batch_row=jnp.array([7, 8]),
    ),
  )
