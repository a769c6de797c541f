"""Identities that LM-Infinite's attention must satisfy.

Numbered as in the project's fact sheet on the paper (B11); each is checked
against float64 numpy. L is the window, G the number of start keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Lambda
from longjax.ops import merge
from longjax.positions import alibi_slopes
from tests.ops import dense
from tests.ops.helpers import (
  assert_close,
  check_against_reference,
  forward,
  normal,
  qkv,
  run,
)

HEADS, LENGTH = 2, 40
L, G = 12, 5
INPUTS = qkv(21, 1, LENGTH, HEADS)
Q, K, V = (np.asarray(x[0]) for x in INPUTS)
ROPE = longjax.RoPE()
I = np.arange(LENGTH)
DISTANCE = I[:, None] - I


def lambda_mask(length, window, start):
  i = np.arange(length)
  d = i[:, None] - i
  return (d >= 0) & ((d < window) | (i < start))


def capped_rope_logits(q, k, window):
  """w(q, k, min(d, L)) pair by pair: q turned by the told distance."""
  s = np.zeros((q.shape[1], len(q), len(k)))
  for i in range(len(q)):
    for j in range(len(k)):
      turned = dense.rotate(q[i : i + 1], [min(i - j, window)])[0]
      s[:, i, j] = (turned * k[j]).sum(-1) / np.sqrt(q.shape[-1])
  return s


def dense_lambda(q, k, v, window, start):
  """(out [T, H, E], lse [T, H]) by the definition."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  s = capped_rope_logits(q, k, window)
  out, lse, _ = dense.softmax(s, lambda_mask(len(q), window, start), v)
  return out, lse


def test_b11_01_short_texts_are_vanilla_and_row_l_plus_1_is_the_first_other():
  vanilla = run('xla', INPUTS, longjax.Full(), position=ROPE)
  short = run('xla', INPUTS, Lambda(LENGTH, G), position=ROPE)
  assert_close(short, vanilla)
  out, _ = forward('xla', INPUTS, Lambda(L, G), position=ROPE)
  differs = np.abs(out - vanilla['out']).max(axis=(0, 2, 3))
  # Row L sees token 0 at distance min(L, L): still the same.
  assert differs[: L + 1].max() < 2e-5
  assert differs[L + 1] > 1e-3


def test_b11_02_two_branches_are_the_dense_capped_logits():
  """Rotated local pairs, and raw start keys with queries turned to L."""
  q, k = (x.astype(np.float64) for x in (Q, K))
  near = DISTANCE < L
  local = dense.logits(dense.rotate(q, I), dense.rotate(k, I))
  start = dense.logits(dense.rotate(q, np.full(LENGTH, L)), k)
  two = np.where(near, local, start)
  mask = lambda_mask(LENGTH, L, G)
  capped = capped_rope_logits(q, k, L)
  np.testing.assert_allclose(two[:, mask], capped[:, mask], atol=1e-12)
  wanted, lse, _ = dense.softmax(two, mask, V)
  got = forward('xla', INPUTS, Lambda(L, G), position=ROPE)
  np.testing.assert_allclose(got[0][0], wanted, atol=2e-5)
  np.testing.assert_allclose(got[1][0], lse, atol=2e-5)


@pytest.mark.parametrize('interleaved', [False, True])
def test_b11_03_only_the_difference_of_rotations_counts(interleaved):
  scheme = longjax.RoPE(interleaved=interleaved)
  q, k = INPUTS[0][0], INPUTS[1][0]
  wanted = (scheme.rotate(q, jnp.int32(L)) * k).sum(-1)
  for a in (0, 7, 4096, 2**20, 2**30 - L):
    turned = scheme.rotate(q, jnp.int32(L + a))
    got = (turned * scheme.rotate(k, jnp.int32(a))).sum(-1)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_b11_04_no_start_keys_all_start_keys_and_long_windows():
  without = run('xla', INPUTS, Lambda(L, 0), position=ROPE)
  window = run('xla', INPUTS, longjax.SlidingWindow(L - 1), position=ROPE)
  assert_close(without, window)
  ceiling = forward('xla', INPUTS, Lambda(L, LENGTH), position=ROPE)
  s = capped_rope_logits(Q.astype(np.float64), K.astype(np.float64), L)
  wanted, lse, _ = dense.softmax(s, np.tri(LENGTH), V)
  np.testing.assert_allclose(ceiling[0][0], wanted, atol=2e-5)
  np.testing.assert_allclose(ceiling[1][0], lse, atol=2e-5)
  vanilla, _ = forward('xla', INPUTS, longjax.Full(), position=ROPE)
  for start in (0, G):
    out, _ = forward('xla', INPUTS, Lambda(LENGTH, start), position=ROPE)
    np.testing.assert_allclose(out, vanilla, atol=2e-6)


def test_b11_05_how_many_keys_a_row_sees():
  seen = Lambda(L, G).multiplicity(I[:, None], I, 0, HEADS)
  wanted = np.minimum(I + 1, L) + np.clip(I - L + 1, 0, G)
  np.testing.assert_array_equal(seen.sum(1), wanted)
  ones = jnp.ones_like(INPUTS[2])
  out, lse = forward('xla', (*INPUTS[:2], ones), Lambda(L, G), position=ROPE)
  np.testing.assert_allclose(out, 1, rtol=1e-6)
  # With no logits at all, the denominator is the number of keys.
  _, lse = forward('xla', (0 * INPUTS[0], *INPUTS[1:]), Lambda(L, G))
  np.testing.assert_allclose(np.exp(lse[0, :, 0]), wanted, rtol=1e-5)


def test_b11_06_masked_tokens_are_inert():
  attend = jax.jit(
    lambda q, k, v: longjax.attention(q, k, v, Lambda(L, G), position=ROPE)
  )
  q, k, v = INPUTS
  base = attend(q, k, v)
  for t in (0, G - 1, G, 20):
    out = attend(q, k.at[:, t].add(9.0), v.at[:, t].add(9.0))
    changed = np.any(out != base, axis=(0, 2, 3))
    np.testing.assert_array_equal(changed, lambda_mask(LENGTH, L, G)[:, t])


@pytest.mark.parametrize(
  ('length', 'start'),
  [(L, 0), (L + 1, 1), (2 * L - 1, 30), (2 * L, L + 5), (2 * L + 1, 3)],
)
def test_b11_07_any_length_and_any_number_of_start_keys(length, start):
  inputs = [x[:, :length] for x in INPUTS]
  got = forward('xla', inputs, Lambda(L, start), position=ROPE)
  wanted = dense_lambda(*(x[0] for x in inputs), L, start)
  np.testing.assert_allclose(got[0][0], wanted[0], atol=2e-5)
  np.testing.assert_allclose(got[1][0], wanted[1], atol=2e-5)


def test_b11_08_merging_the_two_branches_by_lse():
  s = capped_rope_logits(Q.astype(np.float64), K.astype(np.float64), L)
  near = (DISTANCE >= 0) & (DISTANCE < L)
  far = lambda_mask(LENGTH, L, G) & ~near
  parts = [dense.softmax(s, mask, V)[:2] for mask in (near, far)]
  out, lse = merge([tuple(map(jnp.float32, part)) for part in parts])
  got = forward('xla', INPUTS, Lambda(L, G), position=ROPE)
  np.testing.assert_allclose(got[0][0], out, atol=2e-5)
  np.testing.assert_allclose(got[1][0], lse, atol=2e-5)


LONG = qkv(22, 1, 3 * L + 4, HEADS)


def long_prefill():
  return forward('xla', LONG, Lambda(L, G), position=ROPE)[0]


@jax.jit
def step(q, k, v, at, slots):
  """Queries from position `at` on against a cache of keys at `slots`."""
  return longjax.attention(
    q,
    k,
    v,
    Lambda(L, G),
    position=ROPE,
    q_positions=at,
    kv_positions=slots,
  )


def test_b11_09_evicting_decode_is_prefill():
  """A cache of the first G and the last L - 1 keys is all a query needs."""
  whole = long_prefill()
  q, k, v = LONG

  for t in (0, 1, L - 1, L, L + 1, L + G - 1, L + G, L + G + 1, 3 * L):
    kept = [p for p in range(t + 1) if p < G or p > t - L]
    slots = np.full(G + L, -1)
    # In any order.
    slots[np.random.default_rng(t).permutation(G + L)[: len(kept)]] = kept
    out = step(
      q[:, t : t + 1],
      # Whatever lies in an empty slot.
      jnp.where((slots < 0)[:, None, None], 1e3, k[:, slots]),
      jnp.where((slots < 0)[:, None, None], 1e3, v[:, slots]),
      jnp.int32(t),
      jnp.asarray(slots)[None],
    )
    np.testing.assert_allclose(out[:, 0], whole[:, t], atol=2e-6)


@pytest.mark.parametrize('chunk', [1, 7, L, 2 * L])
def test_b11_10_chunked_prefill_with_a_carried_cache(chunk):
  whole = long_prefill()
  q, k, v = LONG
  length = q.shape[1]

  for start in range(0, length, chunk):
    at = np.arange(start, start + chunk)
    carried = [p for p in range(start) if p < G or p >= start - L]
    slots = np.full(G + L + chunk, -1)
    slots[: len(carried)] = carried
    slots[G + L :] = at
    slots[slots >= length] = -1
    out = step(
      q[:, np.minimum(at, length - 1)],
      k[:, slots],
      v[:, slots],
      jnp.asarray(at)[None],
      jnp.asarray(slots)[None],
    )
    n = min(chunk, length - start)
    np.testing.assert_allclose(
      out[:, :n], whole[:, start : start + n], atol=2e-6
    )


def test_b11_11_shifting_all_positions_of_the_local_branch():
  base, _ = forward('xla', INPUTS, Lambda(L, 0), position=ROPE)
  for shift in (1, 1000, 2**20):
    moved, _ = forward(
      'xla',
      INPUTS,
      Lambda(L, 0),
      position=ROPE,
      q_positions=jnp.int32(shift),
      kv_positions=jnp.int32(shift),
    )
    np.testing.assert_allclose(moved, base, atol=2e-5)


def test_b11_12_alibi_is_clipped_and_row_constants_cancel():
  got = forward('xla', INPUTS, Lambda(L, G), position=longjax.ALiBi())
  slopes = alibi_slopes(HEADS).astype(np.float64)[:, None, None]
  s = dense.logits(Q, K)
  mask = lambda_mask(LENGTH, L, G)
  clipped = s - slopes * np.minimum(DISTANCE, L)
  out, lse, _ = dense.softmax(clipped, mask, V)
  np.testing.assert_allclose(got[0][0], out, atol=2e-5)
  np.testing.assert_allclose(got[1][0], lse, atol=2e-5)
  # MPT's form: of the key alone, up to a constant of the row.
  dropped = clipped + slopes * I[:, None]
  np.testing.assert_allclose(
    dense.softmax(dropped, mask, V)[0], out, atol=1e-12
  )


def test_b11_15_attention_sinks_are_the_same_until_something_is_evicted():
  window, start = 6, 3
  sinks = longjax.AttentionSinks(window, start)
  a, _ = forward('xla', INPUTS, sinks, position=ROPE)
  vanilla, _ = forward('xla', INPUTS, longjax.Full(), position=ROPE)
  b, _ = forward('xla', INPUTS, Lambda(window + start, start), position=ROPE)
  full = window + start
  np.testing.assert_allclose(a[:, :full], vanilla[:, :full], atol=2e-5)
  np.testing.assert_allclose(a[:, :full], b[:, :full], atol=2e-5)
  assert (
    np.abs(a[:, full:] - vanilla[:, full:]).max(axis=(0, 2, 3)).min() > 1e-3
  )


@pytest.mark.parametrize(
  'pattern',
  [
    Lambda(L, G, ceiling=False),
    longjax.DistanceCeiling(L),
    longjax.AttentionSinks(L, G),
  ],
)
@pytest.mark.parametrize('position', [ROPE, longjax.ALiBi()])
def test_halves_and_rivals_equal_the_reference(pattern, position):
  check_against_reference(INPUTS, pattern, position=position)
  packed = jnp.asarray(np.repeat([0, 1, -1, 1], 10)[None])
  check_against_reference(
    INPUTS, pattern, position=position, segment_ids=packed
  )


def test_b11_04_the_ceiling_alone_is_lambda_that_starts_with_every_key():
  ceiling = run('xla', INPUTS, longjax.DistanceCeiling(L), position=ROPE)
  assert_close(ceiling, run('xla', INPUTS, Lambda(L, LENGTH), position=ROPE))


def test_b11_16_cost_per_token_is_constant():
  """L + G keys for every further query."""
  i = np.arange(5 * L)
  seen = Lambda(L, G).multiplicity(i[:, None], i, 0, HEADS)
  assert set(seen.sum(1)[L + G :]) == {L + G}
  # What the branches' intervals span is no more.
  spans = [
    np.maximum(hi - lo + 1, 0)
    for lo, hi in (b.bounds(i) for b in Lambda(L, G).branches(HEADS))
  ]
  np.testing.assert_array_equal(
    (np.minimum(spans[0], i + 1) + spans[1])[L + G :], L + G
  )


def test_b11_17_angles_are_float32_and_bfloat16_ones_would_fail():
  positions = np.array([0, 1, 1000, 2**17, 2**17 + 1, 2**20 + 3, 2**30])
  scheme = longjax.RoPE()
  x = normal(3, len(positions), HEADS, 8)
  for dtype, bound in ((jnp.float32, 1e-4), (jnp.bfloat16, 2e-2)):
    y = x.astype(dtype)
    exact = dense.rotate(np.asarray(y, np.float64), positions)
    got = scheme.rotate(y, jnp.asarray(positions)[:, None])
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=bound)
  # The same test of angles computed in bfloat16.
  inverse = jnp.asarray(10000.0 ** (-np.arange(4) / 4), jnp.bfloat16)
  angle = jnp.asarray(positions, jnp.bfloat16)[:, None] * inverse
  angle = np.asarray(angle.astype(jnp.float32))[:, None]
  a, b = np.split(np.asarray(x), 2, axis=-1)
  narrow = np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      a * np.sin(angle) + b * np.cos(angle),
    ],
    axis=-1,
  )
  exact = dense.rotate(np.asarray(x, np.float64), positions)
  assert np.abs(narrow - exact).max() > 0.5
