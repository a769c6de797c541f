"""Bits per character by overlapping windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.evaluation import bits_per_character
from longjax.evaluation.bits import windows

VOCABULARY = 11


@jax.jit
def logits_fn(tokens):
  """A causal model that looks at everything before: cumulative sums."""
  table = jax.random.normal(jax.random.key(0), (VOCABULARY, 16))
  head = jax.random.normal(jax.random.key(1), (16, VOCABULARY))
  seen = jnp.cumsum(jnp.sin(jnp.cumsum(table[tokens], axis=1)), axis=1)
  return jnp.tanh(seen) @ head


def losses_of(logits):
  """What `bits_per_character` asks for, from a function to logits."""

  def losses_fn(inputs, targets):
    log_p = jax.nn.log_softmax(logits(inputs))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

  return losses_fn


losses_fn = losses_of(logits_fn)


def text(n, seed=0):
  return np.random.default_rng(seed).integers(0, VOCABULARY, n).astype(np.uint8)


@pytest.mark.parametrize(
  ('n', 'length', 'stride'),
  [
    (100, 16, 4),
    (101, 16, 16),
    (37, 16, 5),
    (17, 16, 3),
    (5, 16, 1),
    (1, 4, 2),
  ],
)
def test_every_character_is_scored_exactly_once(n, length, stride):
  count = np.zeros(n, int)
  count[0] = 1  # the first one, charged as uniform
  for number, (start, first, end) in enumerate(windows(n, length, stride)):
    assert 0 <= start < first < end <= n
    assert end - start <= length + 1
    if number:
      assert first - start >= length - stride + 1
    count[first:end] += 1
  assert (count == 1).all()


def test_equal_to_scoring_each_character_alone_with_the_same_context():
  tokens = text(75)
  length, stride = 16, 5
  total = np.log2(VOCABULARY)
  for start, first, end in windows(tokens.size, length, stride):
    for position in range(first, end):
      context = jnp.asarray(tokens[start:position][None].astype(np.int32))
      log_p = jax.nn.log_softmax(logits_fn(context)[0, -1])
      total -= float(log_p[tokens[position]]) / np.log(2)
  result = bits_per_character(
    losses_fn,
    tokens,
    vocab_size=VOCABULARY,
    length=length,
    stride=stride,
    batch_size=3,
  )
  assert result.characters == tokens.size
  assert result.bits_per_character == pytest.approx(
    total / tokens.size, abs=1e-5
  )


def test_same_for_any_batch_size():
  tokens = text(333)
  results = [
    bits_per_character(
      losses_fn,
      tokens,
      vocab_size=VOCABULARY,
      length=32,
      stride=8,
      batch_size=b,
    ).bits_per_character
    for b in (1, 2, 7, 64)
  ]
  np.testing.assert_allclose(results, results[0], atol=1e-5, rtol=0)


def test_shapes_never_change_and_padding_is_never_scored():
  shapes = set()

  def counting(tokens):
    shapes.add(tokens.shape)
    return logits_fn(tokens)

  short = bits_per_character(
    losses_of(counting),
    text(90),
    vocab_size=VOCABULARY,
    length=16,
    stride=8,
    batch_size=4,
  )
  assert shapes == {(4, 16)}
  # More characters after a text never change the bits of those before.
  longer = bits_per_character(
    losses_of(counting),
    text(90)[:89],
    vocab_size=VOCABULARY,
    length=16,
    stride=8,
    batch_size=4,
  )
  start, _, _ = list(windows(90, 16, 8))[-1]
  last = jax.nn.log_softmax(
    logits_fn(jnp.asarray(text(90)[start:89][None].astype(np.int32)))[0, -1]
  )[text(90)[89]]
  difference = short.bits_per_character * 90 - longer.bits_per_character * 89
  assert difference == pytest.approx(-float(last) / np.log(2), abs=1e-3)


def test_a_uniform_model_costs_log2_of_the_vocabulary():
  result = bits_per_character(
    losses_of(lambda t: jnp.zeros((*t.shape, 8))),
    np.zeros(50, np.int32),
    vocab_size=8,
    length=8,
    stride=3,
    batch_size=2,
  )
  assert result.bits_per_character == pytest.approx(3.0)
  assert (result.length, result.stride, result.windows) == (8, 3, 15)


def test_one_character():
  result = bits_per_character(
    losses_fn, text(1), vocab_size=VOCABULARY, length=4, stride=2, batch_size=2
  )
  assert result.bits_per_character == pytest.approx(np.log2(VOCABULARY))
  assert result.characters == 1


def test_progress_sees_every_batch():
  seen = []

  def progress(batches):
    for batch in batches:
      seen.append(batch)
      yield batch

  bits_per_character(
    losses_fn,
    text(60),
    vocab_size=VOCABULARY,
    length=8,
    stride=8,
    batch_size=2,
    progress=progress,
  )
  assert len(seen) == 4


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(stride=9), 'stride 9, length 8'),
    (dict(stride=0), 'stride 0'),
    (dict(batch_size=0), 'batch_size must be >= 1, got 0'),
    (dict(tokens=np.zeros(0, np.int32)), 'non-empty'),
    (dict(tokens=np.zeros((2, 3), np.int32)), r'\(2, 3\)'),
  ],
)
def test_bad_input(kwargs, message):
  kwargs = (
    dict(tokens=text(20), vocab_size=8, length=8, stride=4, batch_size=2)
    | kwargs
  )
  with pytest.raises(ValueError, match=message):
    bits_per_character(losses_fn, **kwargs)
