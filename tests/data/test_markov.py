import collections
import itertools
import math

import numpy as np
import pytest

from longjax.data import markov


def _probability(train, context, symbol, vocab_size):
  """Witten-Bell, written out: P(symbol | context), a tuple of tokens."""
  k = len(context)
  shorter = (
    _probability(train, context[1:], symbol, vocab_size)
    if k
    else 1 / vocab_size
  )
  followers = collections.Counter(
    train[i + k]
    for i in range(len(train) - k)
    if tuple(train[i : i + k]) == context
  )
  n, t = followers.total(), len(followers)
  return (followers[symbol] + t * shorter) / (n + t) if n else shorter


@pytest.mark.parametrize('order', [0, 1, 2])
def test_equals_the_formula_written_out(order):
  rng = np.random.default_rng(order)
  train = rng.integers(0, 4, 60)
  test = rng.integers(0, 5, 40)
  expected = -np.mean(
    [
      math.log2(
        _probability(
          train.tolist(),
          tuple(test[max(i - order, 0) : i].tolist()),
          int(test[i]),
          vocab_size=5,
        )
      )
      for i in range(len(test))
    ]
  )
  found = markov.bits_per_character(train, test, order, vocab_size=5)
  assert found == pytest.approx(expected, rel=1e-12)


def test_the_probabilities_of_a_place_sum_to_one():
  rng = np.random.default_rng(0)
  train = rng.integers(0, 3, 50)
  for context in itertools.product(range(3), repeat=2):
    total = 0.0
    for symbol in range(3):
      with_it = np.array([*context, symbol])
      bits = 3 * markov.bits_per_character(train, with_it, 2, vocab_size=3)
      bits -= 2 * markov.bits_per_character(train, with_it[:2], 2, vocab_size=3)
      total += 2.0**-bits
    assert total == pytest.approx(1)


def test_long_texts_are_counted_in_pieces(monkeypatch):
  train = np.random.default_rng(1).integers(0, 7, 1000).astype(np.uint8)
  whole = markov.bits_per_character(train, train[:100], 2, vocab_size=7)
  monkeypatch.setattr(markov, '_CHUNK', 64)
  assert markov.bits_per_character(train, train[:100], 2, vocab_size=7) == whole


def test_a_text_shorter_than_the_context():
  train = np.array([0, 1, 0, 1])
  found = markov.bits_per_character(train, np.array([1]), 2, vocab_size=2)
  assert found == pytest.approx(1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(order=-1), 'order=-1 must not be negative'),
    (dict(order=3), r'order=3 over 256 symbols .* 67,108,864 are allowed'),
    (dict(order=1, vocab_size=9), r'train has tokens from 0 to 9.*\[0, 9\)'),
    (dict(order=1, test=np.array([], int)), 'test is empty'),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  defaults = dict(train=np.arange(10), test=np.arange(5))
  with pytest.raises(ValueError, match=message):
    markov.bits_per_character(**{**defaults, **arguments})
