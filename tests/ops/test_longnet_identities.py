"""Identities that LongNet's dilated attention must satisfy.

Numbered as in the project's fact sheet on the paper (A13); each is checked
against float64 numpy, with gradients where they say more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Dilated
from longjax.ops import merge
from longjax.ops.views import Thinned
from tests.ops import dense
from tests.ops.helpers import assert_close, forward, normal, qkv, run

HEADS, LENGTH = 4, 29
INPUTS = qkv(11, 1, LENGTH, HEADS)
Q, K, V = (np.asarray(x[0]) for x in INPUTS)
COTANGENTS = normal(1, 1, LENGTH, HEADS, 8), normal(2, 1, LENGTH, HEADS)
OUR_COTANGENTS = tuple(x[0] for x in COTANGENTS)
CAUSAL = np.tri(LENGTH, dtype=int)


def longnet(pattern, inputs=INPUTS, cotangents=COTANGENTS, **options):
  return run('xla', inputs, pattern, cotangents=cotangents, **options)


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
      offset = j % r if pattern.offsets == 'paper' else j // -(-heads // r)
      total[j] += mask(length, w, r, offset, pattern.causal)
  return total


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
    dense.check({n: x[:, part] for n, x in got.items() if len(x)}, wanted)


def test_a13_03_a_head_is_full_attention_on_its_rows_and_0_elsewhere():
  got = longnet(Dilated((64,), (3,)))
  assert not got.pop('dposition')
  for head in range(HEADS):
    rows = slice(head % 3, None, 3)
    mine = [x[rows, head : head + 1] for x in (Q, K, V)]
    c = np.tri(len(mine[0]))
    cotangents = [x[rows, head : head + 1] for x in OUR_COTANGENTS]
    wanted = dense.attention(*mine, c, cotangents)
    dense.check(
      {n: x[:, rows, head : head + 1] for n, x in got.items()}, wanted
    )
    others = np.arange(LENGTH) % 3 != head % 3
    for name, x in got.items():
      empty = -np.inf if name == 'lse' else 0
      np.testing.assert_array_equal(x[0, others, head], empty)


def test_a13_04_the_same_part_many_times_changes_nothing():
  once = longnet(Dilated((8,), (2,)))
  thrice = longnet(Dilated((8, 8, 8), (2, 2, 2)))
  np.testing.assert_allclose(thrice['lse'], once['lse'] + np.log(3), atol=1e-5)
  thrice['lse'] = once['lse']
  assert_close(thrice, once)
  # Also with detached weights.
  detached = longnet(Dilated((8, 8), (2, 2), detach_weights=True))
  detached['lse'] = once['lse']
  assert_close(detached, once)


MIXTURES = [
  Dilated((4, 8, 16), (1, 2, 4)),
  Dilated((4, 8, 16), (1, 2, 4), causal=False, offsets='torchscale'),
  Dilated((6, 10), (2, 3)),
]


@pytest.mark.parametrize('pattern', MIXTURES, ids=repr)
def test_a13_05_the_mixture_is_one_softmax_with_bias_log_c(pattern):
  got = longnet(pattern)
  wanted = dense.attention(Q, K, V, counts(pattern), OUR_COTANGENTS)
  dense.check(got, wanted)


def test_a13_06_weights_are_the_softmax_of_the_parts_lse():
  pattern = Dilated((4, 8, 16), (2, 1, 4))
  parts = [
    forward('xla', INPUTS, Dilated((w,), (r,)))
    for w, r in zip(pattern.segment_lengths, pattern.ratios, strict=True)
  ]
  lses = np.stack([lse for _, lse in parts]).astype(np.float64)
  alpha = np.exp(lses) / np.exp(lses).sum(0)
  assert (alpha >= 0).all()
  np.testing.assert_allclose(alpha.sum(0), 1)
  covered = np.isfinite(lses)
  assert (alpha[~covered] == 0).all() and not covered.all()
  out, lse = forward('xla', INPUTS, pattern)
  mixed = sum(a[..., None] * o for a, (o, _) in zip(alpha, parts, strict=True))
  np.testing.assert_allclose(out, mixed, atol=2e-6)
  np.testing.assert_allclose(lse, np.log(np.exp(lses).sum(0)), atol=2e-6)
  merged = merge([(jnp.asarray(o), jnp.asarray(l)) for o, l in parts])
  np.testing.assert_allclose(merged[0], out, atol=2e-6)


def test_a13_07_constant_values_come_out_of_covered_rows():
  pattern = Dilated((8, 16), (2, 4))
  values = jnp.broadcast_to(
    jnp.arange(1.0, HEADS + 1)[:, None], INPUTS[2].shape
  )
  out, _ = forward('xla', (*INPUTS[:2], values), pattern)
  covered = (counts(pattern).sum(-1) > 0).T
  assert covered.any() and not covered.all()
  wanted = np.where(covered, np.arange(1.0, HEADS + 1), 0)
  np.testing.assert_allclose(
    out[0], np.repeat(wanted[..., None], 8, -1), rtol=1e-6
  )


def test_a13_08_causality_and_locality():
  pattern = Dilated((4, 16), (1, 2))
  attend = jax.jit(lambda q, k, v: longjax.attention(q, k, v, pattern))
  base = attend(*INPUTS)
  for t in (0, 3, 15, 16, 28):
    other = attend(*(x.at[:, t].add(3.0) for x in INPUTS))
    same = np.all(base == other, axis=(0, 2, 3))
    assert same[:t].all(), f'rows before {t} changed'
    assert not same[t]
    # The other segment of the largest w sees nothing of it.
    segment = np.arange(LENGTH) // 16 == t // 16
    assert same[~segment].all()


def test_a13_09_permuting_segments_permutes_outputs():
  pattern = Dilated((4, 8), (2, 4))
  inputs = qkv(12, 1, 32, HEADS)
  order = np.array([2, 0, 3, 1])

  def permute(x):
    return x.reshape(1, 4, 8, *x.shape[2:])[:, order].reshape(x.shape)

  attend = jax.jit(lambda q, k, v: longjax.attention(q, k, v, pattern))
  np.testing.assert_array_equal(
    attend(*(permute(x) for x in inputs)), permute(attend(*inputs))
  )


def test_a13_10_with_as_many_heads_as_r_every_row_is_kept_once():
  pattern = Dilated((8,), (HEADS,))
  i = np.arange(LENGTH)
  heads = np.arange(HEADS)[:, None]
  kept = pattern.multiplicity(i, i, heads, HEADS)
  np.testing.assert_array_equal(kept.sum(0), 1)


@pytest.mark.parametrize(
  ('pattern', 'length', 'heads'),
  [
    (Dilated((16,), (6,)), 32, 12),
    (Dilated((16, 7), (6, 3), causal=False), 27, 12),
    (Dilated((16,), (6,), offsets='torchscale'), 32, 12),
  ],
)
def test_a13_11_lengths_that_do_not_divide(pattern, length, heads):
  """Also the shift of torchscale's second segment must not happen."""
  inputs = qkv(13, 1, length, heads, size=4)
  got, _ = forward('xla', inputs, pattern)
  c = counts(pattern, length, heads)
  wanted = dense.attention(*(x[0] for x in inputs), c)
  np.testing.assert_allclose(got[0], wanted['out'], atol=2e-5)
  # The same as padded on the right to whole segments, with padding masked.
  more = [(0, 0), (0, 48 - length), (0, 0), (0, 0)]
  padded = [jnp.pad(x, more, constant_values=5.0) for x in inputs]
  ids = jnp.where(jnp.arange(48) < length, 0, -1)[None]
  out, _ = forward('xla', padded, pattern, segment_ids=ids)
  np.testing.assert_allclose(out[:, :length], got, atol=2e-6)
  np.testing.assert_array_equal(out[:, length:], 0)


def test_a13_12_all_parts_in_one_segment_are_not_vanilla_attention():
  pattern = Dilated((32, 64), (1, 2))
  got, _ = forward('xla', INPUTS, pattern)
  wanted = dense.attention(Q, K, V, counts(pattern))['out']
  np.testing.assert_allclose(got[0], wanted, atol=2e-5)
  vanilla = dense.attention(Q, K, V, CAUSAL)['out']
  assert np.abs(got[0] - vanilla).max() > 0.05
  both = forward('xla', INPUTS, Dilated((32, 64), (1, 1)))[0]
  np.testing.assert_allclose(both[0], vanilla, atol=2e-5)


def test_a13_14_detached_and_exact_gradients():
  """dO / dl = alpha p (v - O_i), or (v - O) exactly; dV is the same."""
  parts = ((8, 2), (16, 1))
  segment_lengths, ratios = zip(*parts, strict=True)
  make = functools.partial(Dilated, segment_lengths, ratios)
  # Of the outputs alone, so that only they differ.
  cotangents = COTANGENTS[0], jnp.zeros_like(COTANGENTS[1])
  exact = longnet(make(), cotangents=cotangents)
  detached = longnet(make(detach_weights=True), cotangents=cotangents)
  for name in ('out', 'lse', 'dv'):
    np.testing.assert_allclose(detached[name], exact[name], atol=1e-5)

  s = dense.logits(Q, K)
  whole, lse, _ = dense.softmax(s, counts(make()), V)
  dp = np.einsum('the,she->hts', OUR_COTANGENTS[0], V)
  for got, detach in ((exact, False), (detached, True)):
    dq, dk = np.zeros(Q.shape), np.zeros(K.shape)
    for w, r in parts:
      c = counts(Dilated((w,), (r,)))
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

  one = [
    longnet(Dilated((8,), (2,), detach_weights=d), cotangents=cotangents)
    for d in (False, True)
  ]
  assert_close(one[1], one[0], forward=0, gradient=1e-6)


@pytest.mark.parametrize(('w', 'r'), [(8, 2), (10, 3)])
def test_a13_15_thinning_and_putting_back_are_adjoint(w, r):
  offsets = tuple(j % r for j in range(HEADS))
  view = Thinned(LENGTH, LENGTH, w, r, offsets, (None, None))
  x = INPUTS[0]
  kept = np.array([[i % w % r == s for s in offsets] for i in range(LENGTH)])[
    None, :, :, None
  ]
  thin = view.queries(x)
  np.testing.assert_array_equal(view.restore(thin, 0), x * kept)
  y = normal(5, *thin.shape)
  back = view.restore(y, 0)
  np.testing.assert_allclose((thin * y).sum(), (x * back).sum(), rtol=1e-5)
  # The hand-written gradient of thinning is putting back.
  _, pull = jax.vjp(view.queries, x)
  np.testing.assert_array_equal(pull(y)[0], back)


@pytest.mark.parametrize('position', [longjax.RoPE(), longjax.XPos()])
def test_a13_16_shifting_all_positions_changes_nothing(position):
  """By whole segments, which is what the segments are counted by."""
  pattern = Dilated((4, 16), (1, 2))
  call = functools.partial(forward, 'xla', INPUTS, pattern, position=position)
  base, _ = call()
  shift = jnp.int32(16 * 1000)
  moved, _ = call(q_positions=shift, kv_positions=shift)
  np.testing.assert_allclose(moved, base, atol=2e-5)


def test_a13_17_decoding_step_by_step_is_prefill_row_by_row():
  """Across segment borders: rows w - 1, w, w + 1 and all others."""
  pattern = Dilated((4, 16), (1, 2))
  whole = longjax.attention(*INPUTS, pattern, position=longjax.RoPE())
  q, k, v = INPUTS

  @jax.jit
  def step(t):
    # Keys not yet written are at positions that no earlier query sees.
    return longjax.attention(
      jax.lax.dynamic_slice_in_dim(q, t, 1, 1),
      k,
      v,
      pattern,
      position=longjax.RoPE(),
      q_positions=t,
    )

  for t in range(LENGTH):
    np.testing.assert_allclose(step(t)[:, 0], whole[:, t], atol=2e-6)


@pytest.mark.parametrize('causal', [True, False])
def test_a13_18_how_many_pairs_are_seen(causal):
  for w, r in ((8, 2), (16, 6), (10, 3)):
    for j in range(HEADS):
      i = np.arange(LENGTH)
      seen = Dilated((w,), (r,), causal).multiplicity(i[:, None], i, j, HEADS)
      total = 0
      for start in range(0, LENGTH, w):
        length = min(w, LENGTH - start)
        n = max(-(-(length - j % r) // r), 0)
        total += n * (n + 1) // 2 if causal else n * n
      assert seen.sum() == total


def test_a13_19_masks_of_the_papers_figure_2():
  """(4, 1), (8, 2), (16, 4) over 16 positions, head offset 0."""
  i = np.arange(16)
  pattern = Dilated((4, 8, 16), (1, 2, 4))
  seen = pattern.multiplicity(i[:, None], i, 0, 1) > 0
  wanted = np.kron(np.eye(4, dtype=bool), np.tri(4, dtype=bool))
  for rows, columns in (
    ((4, 6), (0, 2)),
    ((8, 12), (0, 4)),
    ((12, 14), (8, 10)),
  ):
    for row in rows:
      wanted[row, list(columns)] = True
  # (12, 8) is in both of the wider patterns.
  np.testing.assert_array_equal(seen, wanted)
