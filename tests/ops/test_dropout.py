"""Which entries are dropped: the hash, and how attention uses it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax.ops.dropout import keep_mask, seed_of
from tests.ops.helpers import forward, qkv

PATTERNS = [
  longjax.SlidingWindow(5, 3, dilation=(1, 2)),
  longjax.Dilated((8, 16), (1, 2), causal=False),
  longjax.Lambda(9, 4),
]


def mask(seed, rate=0.3, rows=3, heads=4, queries=50, keys=60):
  shape = np.ix_(*(np.arange(n) for n in (rows, heads, queries, keys)))
  return np.asarray(keep_mask(seed_of(seed), rate, *shape))


def dropped(q, k, pattern, implementation, **options):
  """Weights [H, T, S] after dropout: v is the identity."""
  v = jnp.broadcast_to(
    jnp.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1])
  )
  return forward(implementation, (q, k, v), pattern, **options)[0]


@pytest.mark.parametrize('rate', [0.01, 0.1, 0.5, 0.9])
def test_rate_is_right_within_4_sigma(rate):
  kept = mask(jax.random.key(5), rate)
  sigma = math.sqrt(rate * (1 - rate) / kept.size)
  assert abs((1 - kept.mean()) - rate) < 4 * sigma
  # Also for each row, head, query and key of the sheet.
  for axis in range(4):
    others = tuple(a for a in range(4) if a != axis)
    sigma = math.sqrt(rate * (1 - rate) * kept.shape[axis] / kept.size)
    assert np.abs(1 - kept.mean(axis=others) - rate).max() < 5 * sigma


def test_no_axis_repeats_or_mirrors_another():
  kept = mask(jax.random.key(6), 0.5)
  agreement = []
  for axis in range(4):
    agreement.append((np.roll(kept, 1, axis) == kept).mean())
  agreement.append((mask(jax.random.key(7), 0.5) == kept).mean())
  # The mask of queries and keys is not symmetric.
  square = kept[..., :50]
  agreement.append((square.swapaxes(2, 3) == square).mean())
  np.testing.assert_allclose(agreement, 0.5, atol=0.02)


def test_each_number_and_key_matters():
  seed = seed_of(jax.random.key(0))
  place = dict(row=2, head=3, q_position=1000, k_position=7)
  keys = np.arange(200, dtype=np.int32)

  def row_of(seed, **changes):
    at = {**place, **changes}
    return np.asarray(
      keep_mask(
        seed,
        0.5,
        at['row'],
        at['head'],
        at['q_position'],
        at['k_position'] + keys,
      )
    )

  base = row_of(seed)
  for changed in (
    row_of(seed, row=1),
    row_of(seed, head=2),
    row_of(seed, q_position=2**30),
    row_of(seed, k_position=2**30),
    row_of(seed_of(jax.random.key(1))),
  ):
    assert 0.3 < (changed == base).mean() < 0.7


def test_typed_and_raw_keys_are_the_same():
  typed, raw = jax.random.key(9), jax.random.PRNGKey(9)
  np.testing.assert_array_equal(seed_of(typed), seed_of(raw))
  assert seed_of(raw).dtype == jnp.uint32 and seed_of(raw).shape == (2,)


def test_rates_at_the_ends():
  assert mask(jax.random.key(1), 0.0).all()
  assert mask(jax.random.key(1), 1 - 1e-9).mean() < 1e-3


@pytest.mark.parametrize('pattern', PATTERNS, ids=repr)
def test_both_implementations_drop_the_same_entries(pattern):
  """The numerator only, with the others divided by 1 - rate."""
  q, k, _ = qkv(1, 2, 32, 2, 1, 4)
  rate, key = 0.4, jax.random.key(3)
  whole = dropped(q, k, pattern, 'reference')
  kept = np.asarray(
    keep_mask(
      seed_of(key), rate, *np.ix_(*(np.arange(n) for n in (2, 2, 32, 32)))
    )
  ).swapaxes(1, 2)
  for implementation in ('xla', 'reference'):
    weights = dropped(
      q, k, pattern, implementation, dropout_rate=rate, dropout_key=key
    )
    np.testing.assert_allclose(weights, whole * kept / (1 - rate), atol=2e-6)
    # Which ones, exactly.
    np.testing.assert_array_equal(weights != 0, (whole > 0) & kept)


def test_lse_is_of_before_dropout():
  x = qkv(2)
  pattern = longjax.SlidingWindow(9)
  plain = forward('xla', x, pattern)
  dropping = forward(
    'xla', x, pattern, dropout_rate=0.5, dropout_key=jax.random.key(0)
  )
  np.testing.assert_allclose(dropping[1], plain[1], atol=1e-6)
  assert np.abs(dropping[0] - plain[0]).max() > 0.1


def test_entries_belong_to_absolute_positions_not_to_slots():
  """A later chunk of queries drops what the whole call drops there."""
  q, k, v = qkv(3, length=48)
  options = dict(dropout_rate=0.5, dropout_key=jax.random.key(4))
  pattern = longjax.Lambda(9, 4)
  whole, _ = forward('xla', (q, k, v), pattern, **options)
  chunk, _ = forward(
    'xla', (q[:, 30:], k, v), pattern, q_positions=30, **options
  )
  np.testing.assert_allclose(chunk, whole[:, 30:], atol=2e-6)
