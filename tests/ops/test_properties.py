"""What must never change a result: the future, padding, neighbours, documents.

Bit-equal where shapes are equal, within 2e-6 where they are not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Dilated, Lambda, SelfExtend, SlidingWindow
from tests.ops.helpers import (
  QUICK,
  assert_close,
  forward,
  normal,
  qkv,
  run,
  transformer_xl,
)

PATTERNS = {
  'window': (SlidingWindow(9, dilation=(1, 2)), longjax.XPos(scale_base=30.0)),
  'two-sided window': (SlidingWindow(5, 7), transformer_xl(0, 2, 8, -7, 5)),
  'LongNet': (Dilated((8, 32), (2, 3)), longjax.RoPE()),
  'detached': (
    Dilated((8, 32), (1, 4), causal=False, detach_weights=True),
    longjax.RoPE(),
  ),
  'Lambda': (Lambda(9, 4), longjax.RoPE()),
  'Self-Extend': (SelfExtend(9, 3), longjax.ALiBi()),
}
CAUSAL = [name for name, (pattern, _) in PATTERNS.items() if pattern.causal]
LENGTH = 64
RESULTS = ('out', 'lse', 'dq', 'dk', 'dv')

# Three texts, of which the first has padding in its middle; padding at the end.
IDS = np.array([4] * 11 + [-1] * 4 + [4] * 6 + [0] * 13 + [9] * 24 + [-1] * 6)


@functools.cache
def compiled(name):
  """(q, k, v), ids, cotangents -> results, forward and backward, of xla."""
  pattern, position = PATTERNS[name]

  @jax.jit
  def call(inputs, ids, cotangents):
    (out, lse), pull = jax.vjp(
      lambda *x: longjax.attention(
        *x, pattern, position=position, segment_ids=ids, return_lse=True
      ),
      *inputs,
    )
    return (out, lse, *pull(cotangents))

  quick = call.lower(*example()).compile(compiler_options=QUICK)

  def results(*arguments):
    return [np.asarray(y) for y in quick(*arguments)]

  return results


def example(seed=0):
  inputs = qkv(seed, 2, LENGTH, 2, 1)
  ids = jnp.asarray(np.stack([IDS, np.sort(IDS)]))
  cotangents = normal(seed + 1, 2, LENGTH, 2, 8), normal(seed + 2, 2, LENGTH, 2)
  return inputs, ids, cotangents


def replaced(arrays, row, where, seed=50):
  """The arrays with other numbers in some tokens of a row."""
  rng = np.random.default_rng(seed)
  arrays = [np.array(x) for x in arrays]
  for x in arrays:
    x[row, where] = 20 * rng.normal(size=x[row, where].shape)
  return tuple(jnp.asarray(x) for x in arrays)


@pytest.mark.parametrize('name', PATTERNS)
def test_padding_never_changes_a_result(name):
  inputs, ids, cotangents = example()
  base = compiled(name)(inputs, ids, cotangents)
  padding = np.asarray(ids[0]) < 0
  other = compiled(name)(
    replaced(inputs, 0, padding), ids, replaced(cotangents, 0, padding)
  )
  for result, a, b in zip(RESULTS, base, other, strict=True):
    np.testing.assert_array_equal(a[0, ~padding], b[0, ~padding], result)
    # Padding itself sees nothing and gets nothing.
    nothing = -np.inf if result == 'lse' else 0
    np.testing.assert_array_equal(a[0, padding], nothing, result)


@pytest.mark.parametrize('name', PATTERNS)
def test_batch_neighbours_never_change_a_result(name):
  inputs, ids, cotangents = example()
  base = compiled(name)(inputs, ids, cotangents)
  everything = np.ones(LENGTH, bool)
  other = compiled(name)(
    replaced(inputs, 1, everything),
    ids.at[1].set(jnp.arange(LENGTH) // 7 - 1),
    replaced(cotangents, 1, everything),
  )
  for result, a, b in zip(RESULTS, base, other, strict=True):
    np.testing.assert_array_equal(a[0], b[0], result)
    assert (a[1] != b[1]).any()


@pytest.mark.parametrize('name', PATTERNS)
def test_other_segments_never_change_a_result(name):
  inputs, ids, cotangents = example()
  base = compiled(name)(inputs, ids, cotangents)
  for segment in (0, 4):
    mine = np.asarray(ids[0]) == segment
    other = compiled(name)(
      replaced(inputs, 0, ~mine), ids, replaced(cotangents, 0, ~mine)
    )
    for result, a, b in zip(RESULTS, base, other, strict=True):
      np.testing.assert_array_equal(a[0, mine], b[0, mine], result)


@pytest.mark.parametrize('name', CAUSAL)
def test_causality_by_perturbation(name):
  """The future is not seen, and its loss is not felt before it."""
  inputs, _, cotangents = example()
  ids = jnp.zeros((2, LENGTH), int)
  base = compiled(name)(inputs, ids, cotangents)
  for t in (1, 8, 33, LENGTH - 1):
    later = np.arange(LENGTH) >= t
    other = compiled(name)(replaced(inputs, 0, later), ids, cotangents)
    for a, b in zip(base[:2], other[:2], strict=True):
      np.testing.assert_array_equal(a[0, ~later], b[0, ~later])
      assert (a[0, t] != b[0, t]).any()
    # Gradients only flow back: without a later loss, later keys get none.
    dout, dlse = cotangents
    silent = dout * ~later[:, None, None], dlse * ~later[:, None]
    _, _, *gradients = compiled(name)(inputs, ids, silent)
    for gradient in gradients:
      np.testing.assert_array_equal(gradient[:, later], 0)


@pytest.mark.parametrize('name', PATTERNS)
def test_packed_equals_separate(name):
  """Documents in one row, and each in a row of its own, padded on the left."""
  pattern, position = PATTERNS[name]
  lengths = (19, 30)
  inputs = qkv(3, 1, sum(lengths), 2, 1)
  cotangents = normal(4, 1, 49, 2, 8), normal(5, 1, 49, 2)
  ids = jnp.asarray([[6] * lengths[0] + [2] * lengths[1]])
  packed = run(
    'xla',
    inputs,
    pattern,
    position=position,
    segment_ids=ids,
    cotangents=cotangents,
  )
  apart = np.zeros((2, 30), int) - 1
  where = (slice(11, 30), slice(0, 30))
  parts = (slice(0, 19), slice(19, 49))

  def separate(x):
    y = np.zeros((2, 30, *x.shape[2:]), x.dtype)
    for row in range(2):
      y[row, where[row]] = x[0, parts[row]]
    return jnp.asarray(y)

  for row in range(2):
    apart[row, where[row]] = 0
  alone = run(
    'xla',
    tuple(separate(x) for x in inputs),
    pattern,
    position=position,
    segment_ids=jnp.asarray(apart),
    cotangents=tuple(separate(x) for x in cotangents),
  )
  for result in RESULTS:
    together = np.concatenate(
      [alone[result][row, where[row]] for row in range(2)]
    )
    np.testing.assert_allclose(
      packed[result][0], together, atol=2e-6 if result == 'out' else 5e-6
    )
  for a, b in zip(packed['dposition'], alone['dposition'], strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('name', ['LongNet', 'Lambda'])
def test_a_text_does_not_depend_on_the_length_it_is_padded_to(name):
  pattern, position = PATTERNS[name]
  inputs = qkv(6, 1, 41, 2, 1)
  alone, lse = forward('xla', inputs, pattern, position=position)
  for length in (64, 129):
    more = [(0, 0), (0, length - 41), (0, 0), (0, 0)]
    out, longer_lse = forward(
      'xla',
      [jnp.pad(x, more, constant_values=3.0) for x in inputs],
      pattern,
      position=position,
      segment_ids=jnp.where(jnp.arange(length) < 41, 0, -1)[None],
    )
    np.testing.assert_allclose(out[:, :41], alone, atol=2e-6)
    np.testing.assert_allclose(longer_lse[:, :41], lse, atol=2e-6)


EMPTY = {
  'keys all ahead': (
    SlidingWindow(3),
    dict(kv_positions=jnp.int32(20), logit_soft_cap=2.0),
  ),
  'keys all out of reach': (
    SlidingWindow(3, 2),
    dict(q_positions=jnp.int32(50), position=longjax.RoPE()),
  ),
  'no such segment': (
    Lambda(5, 2),
    dict(
      segment_ids=(jnp.full((2, 16), 1), jnp.full((2, 16), 2)),
      position=longjax.ALiBi(),
      dropout_rate=0.3,
      dropout_key=jax.random.key(0),
    ),
  ),
  'all padding': (
    SelfExtend(4, 2),
    dict(segment_ids=jnp.full((2, 16), -1), position=longjax.RoPE()),
  ),
  'rows of no residue': (
    # Offsets 4 and 5 are nobody's among 2 heads; their rows see no key.
    Dilated((16,), (16,), offsets='torchscale'),
    dict(q_positions=jnp.int32(2), position=longjax.RoPE()),
  ),
  'detached, rows of no residue': (
    Dilated((16, 16), (16, 8), offsets='torchscale', detach_weights=True),
    dict(q_positions=jnp.int32(2), position=longjax.RoPE()),
  ),
  'empty slots': (
    Lambda(4, 2),
    dict(
      q_positions=jnp.full((2, 16), 3),
      kv_positions=jnp.full((2, 16), -1),
      global_tokens=jnp.asarray([[0, -1], [3, 3]]),
      position=transformer_xl(0, 2, 8, 0, 4),
    ),
  ),
  'empty queries': (
    SlidingWindow(4),
    dict(
      q_positions=jnp.full((2, 16), -1),
      kv_positions=jnp.arange(16)[None].repeat(2, 0),
      global_tokens=jnp.asarray([[0, -1], [3, 3]]),
    ),
  ),
}


@pytest.mark.parametrize('name', EMPTY)
def test_rows_that_see_no_key(name):
  """out 0, lse -inf and gradient 0, whatever the cotangents."""
  pattern, options = EMPTY[name]
  got = run('xla', qkv(5, 2, 16, 2), pattern, **options)
  empty = got['lse'] == -np.inf
  assert empty.any()
  if 'residue' not in name:
    assert empty.all()
    for gradient in (got['dk'], got['dv'], *got['dposition']):
      np.testing.assert_array_equal(gradient, 0)
  np.testing.assert_array_equal(got['out'][empty], 0)
  np.testing.assert_array_equal(got['dq'][empty], 0)
  for gradient in (got['dq'], got['dk'], got['dv'], *got['dposition']):
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize('cap', [None, 4.0])
def test_pairs_outside_of_the_table_that_nobody_sees_do_no_harm(cap):
  """Transformer-XL's table knows the visible distances only."""
  at = jnp.arange(30)[None]
  options = {} if cap is None else dict(logit_soft_cap=cap)
  inputs = qkv(9, 1, 30, 2)
  got, wanted = (
    run(
      implementation,
      inputs,
      SlidingWindow(5),
      position=transformer_xl(1, 2, 8, 0, 5),
      q_positions=at,
      kv_positions=at,
      **options,
    )
    for implementation in ('xla', 'reference')
  )
  assert_close(got, wanted)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_softmax_is_float32_whatever_the_dtype(implementation, dtype):
  """Narrow sums of a thousand ones would stop at 256 (or 2048)."""
  q, k, v = qkv(1, 1, 3000, 1, dtype=dtype, kv_length=3000)
  out, lse = forward(
    implementation,
    (0 * q[:, -2:], k, jnp.ones_like(v)),
    longjax.Full(causal=False),
  )
  assert out.dtype == dtype and lse.dtype == np.float32
  np.testing.assert_allclose(lse, np.log(3000), rtol=1e-6)
  np.testing.assert_allclose(out.astype(np.float32), 1, rtol=1e-2)


def test_scale_and_soft_cap_act_on_scaled_logits_and_bias():
  """c * tanh((scale * q . k + bias) / c), in numpy."""
  inputs = qkv(2, 1, 12, 2)
  q, k, v = (np.asarray(x[0], np.float64) for x in inputs)
  out, lse = forward(
    'xla',
    inputs,
    longjax.Full(),
    position=longjax.ALiBi(np.float32([0.5, 0.25])),
    scale=0.3,
    logit_soft_cap=1.5,
  )
  i = np.arange(12)
  s = 0.3 * np.einsum('thd,shd->hts', q, k)
  s = s - np.array([0.5, 0.25])[:, None, None] * np.abs(i[:, None] - i)
  p = np.exp(1.5 * np.tanh(s / 1.5)) * np.tri(12)
  np.testing.assert_allclose(lse[0].T, np.log(p.sum(-1)), atol=1e-5)
  p = p / p.sum(-1, keepdims=True)
  np.testing.assert_allclose(out[0], np.einsum('hts,she->the', p, v), atol=1e-5)


def test_global_tokens_count_once_and_only_backwards_if_causal():
  inputs = qkv(4, 2, 24, 2)
  zero = (0 * inputs[0], *inputs[1:])
  tokens = jnp.asarray([[20, 3, 3, -1], [0, -1, -1, -1]])
  i = np.arange(24)
  for pattern in (SlidingWindow(4), SlidingWindow(4, 4)):
    _, lse = forward('xla', zero, pattern, global_tokens=tokens)
    for row, named in enumerate(((20, 3), (0,))):
      seen = pattern.multiplicity(i[:, None], i, 0, 2) > 0
      for token in named:
        seen[:, token] |= (i >= token) | (not pattern.causal)
      np.testing.assert_allclose(np.exp(lse[row, :, 0]), seen.sum(1), rtol=1e-5)


def test_gqa_is_attention_with_repeated_kv_heads():
  q, k, v = qkv(5, 1, 30, 6, 2)
  for pattern in (SlidingWindow(5, dilation=(1, 2) * 3), Dilated((8,), (4,))):
    grouped = run('xla', (q, k, v), pattern)
    repeated = run(
      'xla', (q, jnp.repeat(k, 3, 2), jnp.repeat(v, 3, 2)), pattern
    )
    for name in ('dk', 'dv'):
      dx = repeated[name]
      repeated[name] = dx.reshape(1, 30, 2, 3, 8).sum(3)
    assert_close(grouped, repeated)
