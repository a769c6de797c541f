"""Identities that LongNet's dilated attention must satisfy.

Numbered as in the project's fact sheet on the paper (A13); all but the sharded
one, forward and gradients, for both rules of head offsets, against float64
numpy or against calls that must agree. (18 and 19 are of patterns alone: see
tests/patterns/test_longnet.py.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Dilated
from longjax.ops import merge
from longjax.ops.views import Sliced, Thinned
from tests.ops import dense
from tests.ops.helpers import QUICK, assert_close, normal, qkv

HEADS, LENGTH = 4, 29
RULES = ('paper', 'torchscale')
both_rules = pytest.mark.parametrize('rule', RULES)


def arrays(seed, length=LENGTH, heads=HEADS):
  """(q, k, v) and cotangents of (out, lse)."""
  inputs = qkv(seed, 1, length, heads)
  dout = normal(seed + 1, 1, length, heads, 8)
  return inputs, (dout, normal(seed + 2, 1, length, heads))


INPUTS, COTANGENTS = arrays(11)
Q, K, V = (np.asarray(x[0]) for x in INPUTS)
OUR_COTANGENTS = tuple(x[0] for x in COTANGENTS)
CAUSAL = np.tri(LENGTH, dtype=int)


@functools.cache
def compiled(pattern, length, heads, position=None, padded=False):
  """Forward and backward, once for each pattern: most of the time is this."""

  def both(inputs, cotangents, first, ids):
    def attend(q, k, v):
      return longjax.attention(
        q,
        k,
        v,
        pattern,
        position=position,
        q_positions=first,
        kv_positions=first,
        segment_ids=ids,
        implementation='xla',
        return_lse=True,
      )

    (out, lse), pull = jax.vjp(attend, *inputs)
    dq, dk, dv = pull(cotangents)
    return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

  example = arrays(0, length, heads)
  # Positions are static unless a scheme is to be moved.
  first = 0 if position is None else jnp.int32(0)
  ids = jnp.zeros((1, length), jnp.int32) if padded else None
  if position is None:
    lowered = jax.jit(lambda x, y, ids: both(x, y, 0, ids)).lower(*example, ids)
    quick = lowered.compile(compiler_options=QUICK)
    return lambda x, y, first, ids: quick(x, y, ids)
  lowered = jax.jit(both).lower(*example, first, ids)
  return lowered.compile(compiler_options=QUICK)


def longnet(
  pattern,
  inputs=INPUTS,
  cotangents=COTANGENTS,
  *,
  position=None,
  first=0,
  ids=None,
):
  """Dict of out, lse, dq, dk, dv; numpy arrays [1, length, heads, ...]."""
  _, length, heads, _ = inputs[0].shape
  call = compiled(pattern, length, heads, position, ids is not None)
  return jax.tree.map(
    np.asarray, call(tuple(inputs), tuple(cotangents), jnp.int32(first), ids)
  )


def mixture(rule, **options):
  """Three parts, of which every row is in one at least."""
  return Dilated((4, 8, 16), (1, 2, 4), offsets=rule, **options)


def offset(rule, head, r, heads=HEADS):
  return head % r if rule == 'paper' else head // -(-heads // r)


def mask(length, w, r, offset, causal=True):
  """A2's mask of one head and one (w, r), in loops."""
  seen = np.zeros((length, length), int)
  for i in range(length):
    for j in range(i + 1 if causal else length):
      same = i // w == j // w
      seen[i, j] = same and i % w % r == offset and j % w % r == offset
  return seen


def counts(pattern, length=LENGTH, heads=HEADS):
  """[H, T, T], by the definition of A2 and A3."""
  total = np.zeros((heads, length, length), int)
  for w, r in zip(pattern.segment_lengths, pattern.ratios, strict=True):
    for j in range(heads):
      own = offset(pattern.offsets, j, r, heads)
      total[j] += mask(length, w, r, own, pattern.causal)
  return total


def check(pattern, inputs=INPUTS, cotangents=COTANGENTS):
  """Equals one dense softmax with A2's counts; returns what it is."""
  got = longnet(pattern, inputs, cotangents)
  _, length, heads, _ = inputs[0].shape
  c = counts(pattern, length, heads)
  rows = [x[0] for x in cotangents]
  dense.check(got, dense.attention(*(x[0] for x in inputs), c, rows))
  return got


# --- One part ----------------------------------------------------------------


def test_both_rules_are_one_where_no_ratio_is_above_1():
  """So that the next two identities need one rule only."""
  made = [Dilated((8, 64), (1, 1), offsets=rule).branches(4) for rule in RULES]
  assert made[0] == made[1]


@pytest.mark.parametrize('causal', [True, False])
def test_a13_01_one_segment_of_ratio_1_is_full_attention(causal):
  got = longnet(Dilated((64,), (1,), causal))
  c = CAUSAL if causal else np.ones_like(CAUSAL)
  dense.check(got, dense.attention(Q, K, V, c, OUR_COTANGENTS))


def test_a13_02_ratio_1_is_full_attention_on_each_segment():
  got = longnet(Dilated((8,), (1,)))
  for start in range(0, LENGTH, 8):  # the last one has 5 rows
    part = slice(start, start + 8)
    rows = [x[part] for x in (Q, K, V)]
    c = np.tri(len(rows[0]))
    wanted = dense.attention(*rows, c, [x[part] for x in OUR_COTANGENTS])
    dense.check({n: x[:, part] for n, x in got.items()}, wanted)


@both_rules
def test_a13_03_a_head_is_full_attention_on_its_rows_and_0_elsewhere(rule):
  got = longnet(Dilated((64,), (3,), offsets=rule))
  for head in range(HEADS):
    own = offset(rule, head, 3)
    rows = slice(own, None, 3)
    mine = [x[rows, head : head + 1] for x in (Q, K, V)]
    c = np.tri(len(mine[0]))
    cotangents = [x[rows, head : head + 1] for x in OUR_COTANGENTS]
    wanted = dense.attention(*mine, c, cotangents)
    dense.check(
      {n: x[:, rows, head : head + 1] for n, x in got.items()}, wanted
    )
    others = np.arange(LENGTH) % 3 != own
    for name, x in got.items():
      empty = -np.inf if name == 'lse' else 0
      np.testing.assert_array_equal(x[0, others, head], empty)


@both_rules
def test_a13_04_the_same_part_many_times_changes_nothing(rule):
  once = longnet(Dilated((8,), (2,), offsets=rule))
  twice = longnet(Dilated((8, 8), (2, 2), offsets=rule))
  np.testing.assert_allclose(twice['lse'], once['lse'] + np.log(2), atol=1e-5)
  twice['lse'] = once['lse']
  assert_close(twice, once)
  if rule == 'paper':
    # Also with detached weights.
    pattern = Dilated((8, 8), (2, 2), detach_weights=True)
    detached = longnet(pattern)
    detached['lse'] = once['lse']
    assert_close(detached, once)


# --- Mixtures ----------------------------------------------------------------


@pytest.mark.parametrize(
  'pattern',
  [
    mixture('paper'),
    mixture('torchscale'),
    mixture('torchscale', causal=False),
    # No power of two, 3 does not divide 10, and more residues than heads.
    Dilated((6, 10, 23), (2, 3, 5), causal=False),
  ],
  ids=repr,
)
def test_a13_05_the_mixture_is_one_softmax_with_bias_log_c(pattern):
  check(pattern)


@both_rules
def test_a13_06_weights_are_the_softmax_of_the_parts_lse(rule):
  """So merging the parts, differentiably, is the mixture."""
  pattern = mixture(rule)

  def parts(*inputs):
    return [
      longjax.attention(
        *inputs,
        Dilated((w,), (r,), offsets=rule),
        implementation='xla',
        return_lse=True,
      )
      for w, r in zip(pattern.segment_lengths, pattern.ratios, strict=True)
    ]

  def both(inputs, cotangents):
    found = parts(*inputs)
    (out, lse), pull = jax.vjp(lambda *x: merge(parts(*x)), *inputs)
    dq, dk, dv = pull(cotangents)
    return found, dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

  quick = jax.jit(both).lower(INPUTS, COTANGENTS)
  quick = quick.compile(compiler_options=QUICK)
  found, merged = jax.tree.map(np.asarray, quick(INPUTS, COTANGENTS))
  got = longnet(pattern)
  assert_close(got, merged)

  lses = np.stack([lse for _, lse in found]).astype(np.float64)
  alpha = np.exp(lses) / np.exp(lses).sum(0)
  assert (alpha >= 0).all()
  np.testing.assert_allclose(alpha.sum(0), 1)
  covered = np.isfinite(lses)
  assert (alpha[~covered] == 0).all() and not covered.all()
  mixed = sum(a[..., None] * o for a, (o, _) in zip(alpha, found, strict=True))
  np.testing.assert_allclose(got['out'], mixed, atol=2e-6)
  np.testing.assert_allclose(got['lse'], np.log(np.exp(lses).sum(0)), atol=2e-6)


@both_rules
def test_a13_07_constant_values_come_out_of_covered_rows(rule):
  pattern = Dilated((8, 16), (2, 4), offsets=rule)
  constant = np.arange(1.0, HEADS + 1, dtype=np.float32)
  values = jnp.broadcast_to(constant[:, None], INPUTS[2].shape)
  silent = COTANGENTS[0], 0 * COTANGENTS[1]
  got = longnet(pattern, (*INPUTS[:2], values), silent)
  covered = (counts(pattern).sum(-1) > 0).T
  assert covered.any() and not covered.all()
  wanted = np.where(covered, constant, 0)
  np.testing.assert_allclose(
    got['out'][0], np.repeat(wanted[..., None], 8, -1), rtol=1e-6
  )
  # Whatever the weights: so logits have no gradient.
  for name in ('dq', 'dk'):
    np.testing.assert_allclose(got[name], 0, atol=2e-5)
  # Covered rows pass theirs on, whole, to the values that they see.
  total = (COTANGENTS[0][0] * covered[..., None]).sum(0)
  np.testing.assert_allclose(got['dv'][0].sum(0), total, atol=2e-5)


@both_rules
def test_a13_08_causality_and_locality(rule):
  pattern = mixture(rule)
  base = longnet(pattern)
  for t in (0, 15, 16, 28):
    other = longnet(pattern, [x.at[:, t].add(3.0) for x in INPUTS])
    same = np.all(base['out'] == other['out'], axis=(0, 2, 3))
    assert same[:t].all(), f'rows before {t} changed'
    assert not same[t]
    # The other segment of the largest w sees nothing of it.
    segment = np.arange(LENGTH) // 16 == t // 16
    assert same[~segment].all()
    # Of its loss alone, only rows of its segment up to it have a gradient.
    only = np.arange(LENGTH) == t
    alone = longnet(
      pattern,
      cotangents=(
        COTANGENTS[0] * only[:, None, None],
        COTANGENTS[1] * only[:, None],
      ),
    )
    for name in ('dq', 'dk', 'dv'):
      felt = alone[name].any(axis=(0, 2, 3))
      assert not felt[~segment | (np.arange(LENGTH) > t)].any(), name
      assert felt[t] or name != 'dv'


@both_rules
def test_a13_09_permuting_segments_permutes_outputs(rule):
  pattern = Dilated((4, 8), (2, 4), offsets=rule)
  inputs, cotangents = arrays(12, 32)
  order = np.array([2, 0, 3, 1])

  def permute(x):
    return x.reshape(1, 4, 8, *x.shape[2:])[:, order].reshape(x.shape)

  base = longnet(pattern, inputs, cotangents)
  got = longnet(
    pattern, [permute(x) for x in inputs], [permute(x) for x in cotangents]
  )
  for name, x in base.items():
    np.testing.assert_array_equal(got[name], permute(x), name)


@both_rules
def test_a13_10_with_as_many_heads_as_r_every_row_is_kept_once(rule):
  pattern = Dilated((8,), (HEADS,), offsets=rule)
  i = np.arange(LENGTH)
  heads = np.arange(HEADS)[:, None]
  kept = pattern.multiplicity(i, i, heads, HEADS)
  np.testing.assert_array_equal(kept.sum(0), 1)
  # So is every loss felt once: by the head that keeps the row, no other.
  got = longnet(pattern)
  for name in ('dq', 'dv'):
    felt = got[name][0].any(-1)
    assert not felt[kept.T == 0].any(), name
  np.testing.assert_array_equal(np.isfinite(got['lse'][0]), kept.T == 1)


@pytest.mark.parametrize(
  'pattern',
  [
    Dilated((16,), (6,)),
    Dilated((16, 7), (6, 3), causal=False, offsets='torchscale'),
  ],
  ids=repr,
)
def test_a13_11_lengths_that_do_not_divide(pattern):
  """Of torchscale's second segment, rows move by what filled up the first."""
  inputs, cotangents = arrays(13, 32, 12)
  got = check(pattern, inputs, cotangents)
  # The same as padded on the right to whole segments, with padding masked.

  def pad(x, value):
    widths = [(0, 0), (0, 16), *((0, 0),) * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=value)

  ids = jnp.where(jnp.arange(48) < 32, 0, -1)[None]
  padded = longnet(
    pattern,
    [pad(x, 5.0) for x in inputs],
    [pad(x, 3.0) for x in cotangents],
    ids=ids,
  )
  for name, x in got.items():
    np.testing.assert_allclose(padded[name][:, :32], x, atol=1e-5, err_msg=name)
    empty = -np.inf if name == 'lse' else 0
    np.testing.assert_array_equal(padded[name][:, 32:], empty)


@both_rules
def test_a13_12_all_parts_in_one_segment_are_not_vanilla_attention(rule):
  got = check(Dilated((32, 64), (1, 2), offsets=rule))
  vanilla = dense.attention(Q, K, V, CAUSAL, OUR_COTANGENTS)
  for name in ('out', 'dq', 'dv'):
    assert np.abs(got[name][0] - vanilla[name]).max() > 0.05
  if rule == 'paper':  # without a ratio, there is one rule
    both = longnet(Dilated((32, 64), (1, 1)))
    dense.check(both | {'lse': both['lse'] - np.log(2)}, vanilla)


# --- Gradients of the weights ------------------------------------------------

PARTS = ((8, 2), (16, 1))


def two_parts(rule, **options):
  return Dilated(*zip(*PARTS, strict=True), offsets=rule, **options)


@both_rules
def test_a13_14_detached_and_exact_gradients(rule):
  """dO / dl = alpha p (v - O_i), or (v - O) exactly; dV is the same."""
  # Of the outputs alone, so that only they differ.
  cotangents = COTANGENTS[0], 0 * COTANGENTS[1]
  exact = longnet(two_parts(rule), cotangents=cotangents)
  detached = longnet(
    two_parts(rule, detach_weights=True), cotangents=cotangents
  )
  for name in ('out', 'lse', 'dv'):
    np.testing.assert_allclose(detached[name], exact[name], atol=1e-5)

  s = dense.logits(Q, K)
  whole, lse, _ = dense.softmax(s, counts(two_parts(rule)), V)
  dp = np.einsum('the,she->hts', OUR_COTANGENTS[0], V)
  for got, detach in ((exact, False), (detached, True)):
    dq, dk = np.zeros(Q.shape), np.zeros(K.shape)
    for w, r in PARTS:
      c = counts(Dilated((w,), (r,), offsets=rule))
      out, part_lse, p = dense.softmax(s, c, V)
      alpha = np.exp(part_lse - lse).T[..., None]
      minus = out if detach else whole
      minus = np.einsum('the,the->ht', OUR_COTANGENTS[0], minus)
      ds = alpha * p * (dp - minus[..., None]) / np.sqrt(8)
      dq += np.einsum('hts,shd->thd', ds, K)
      dk += np.einsum('hts,thd->shd', ds, Q)
    np.testing.assert_allclose(got['dq'][0], dq, atol=2e-5)
    np.testing.assert_allclose(got['dk'][0], dk, atol=2e-5)
  assert np.abs(detached['dq'] - exact['dq']).max() > 0.01

  if rule != 'paper':
    return
  one = [
    longnet(
      Dilated((8,), (2,), offsets=rule, detach_weights=detach),
      cotangents=cotangents,
    )
    for detach in (False, True)
  ]
  assert_close(one[1], one[0], forward=0, gradient=1e-6)


@both_rules
def test_a_log_sum_of_exactly_0_is_no_missing_row(rule):
  """torchscale takes a row for left out whose only key has the logit 0."""
  first = np.zeros((LENGTH, 1, 1))
  first[8] = 1
  inputs = (INPUTS[0] * (1 - first), *INPUTS[1:])
  exact = longnet(two_parts(rule), inputs)
  detached = longnet(two_parts(rule, detach_weights=True), inputs)
  alone = longnet(Dilated((8,), (2,), offsets=rule), inputs)
  for head in range(HEADS):
    kept = offset(rule, head, 2) == 0
    # Row 8 begins a segment of 8: in the part (8, 2) it sees itself alone.
    seen = V[:9, head].sum(0) + (V[8, head] if kept else 0)
    for got in (exact, detached):
      np.testing.assert_allclose(
        got['out'][0, 8, head], seen / (9 + kept), atol=2e-6
      )
      np.testing.assert_allclose(
        got['lse'][0, 8, head], np.log(9 + kept), rtol=1e-6
      )
    assert alone['lse'][0, 8, head] == (0 if kept else -np.inf)
    wanted = V[8, head] if kept else 0 * V[8, head]
    np.testing.assert_array_equal(alone['out'][0, 8, head], wanted)


# --- Views, positions, decoding ----------------------------------------------


@pytest.mark.parametrize(
  ('w', 'r', 'rule'), [(8, 2, 'paper'), (10, 3, 'torchscale')]
)
@pytest.mark.parametrize(
  'make_view',
  [Sliced, functools.partial(Thinned, offsets=(None, None))],
  ids=['sliced', 'thinned'],
)
def test_a13_15_thinning_and_putting_back_are_adjoint(w, r, rule, make_view):
  offsets = tuple(offset(rule, j, r) for j in range(HEADS))
  view = make_view(LENGTH, LENGTH, w, r, offsets)
  x = INPUTS[0]
  kept = np.array([[i % w % r == s for s in offsets] for i in range(LENGTH)])[
    None, :, :, None
  ]
  thin = view.queries(x)
  np.testing.assert_array_equal(view.restore(thin, 0), x * kept)
  y = normal(5, *thin.shape)
  back = view.restore(y, 0)
  np.testing.assert_allclose((thin * y).sum(), (x * back).sum(), rtol=1e-5)
  # The gradient of thinning is putting back.
  _, pull = jax.vjp(view.queries, x)
  np.testing.assert_array_equal(pull(y)[0], back)


POSITIONS = {'paper': longjax.RoPE(), 'torchscale': longjax.XPos()}


@both_rules
def test_a13_16_shifting_all_positions_changes_nothing(rule):
  """By whole segments, which is what the segments are counted by."""
  call = functools.partial(longnet, mixture(rule), position=POSITIONS[rule])
  base, moved = call(), call(first=16 * 1000)
  assert_close(moved, base)
  other = longnet(mixture(rule))
  assert np.abs(other['out'] - base['out']).max() > 0.05


@both_rules
def test_a13_17_decoding_step_by_step_is_prefill_row_by_row(rule):
  """Across segment borders: rows w - 1, w, w + 1 and all others."""
  pattern, position = mixture(rule), POSITIONS[rule]
  whole = longnet(pattern, position=position)
  q, k, v = INPUTS

  def step(t, q, k, v, cotangents):
    def attend(q, k, v):
      # Keys not yet written are at positions that no earlier query sees.
      return longjax.attention(
        q,
        k,
        v,
        pattern,
        position=position,
        q_positions=t,
        implementation='xla',
        return_lse=True,
      )

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return (out, lse, *pull(cotangents))

  def row(x, t):
    return x[:, t : t + 1]

  quick = jax.jit(step).lower(
    jnp.int32(0), row(q, 0), k, v, tuple(row(x, 0) for x in COTANGENTS)
  )
  quick = quick.compile(compiler_options=QUICK)
  dk, dv = 0, 0
  for t in range(LENGTH):
    out, lse, dq, more_dk, more_dv = quick(
      jnp.int32(t), row(q, t), k, v, tuple(row(x, t) for x in COTANGENTS)
    )
    for name, x in (('out', out), ('lse', lse), ('dq', dq)):
      np.testing.assert_allclose(x, row(whole[name], t), atol=1e-5)
    # Of keys after the query, nothing is felt.
    assert not np.asarray(more_dv)[:, t + 1 :].any()
    dk, dv = dk + more_dk, dv + more_dv
  np.testing.assert_allclose(dk, whole['dk'], atol=2e-5)
  np.testing.assert_allclose(dv, whole['dv'], atol=2e-5)
