import json
import sys

import numpy as np
import pytest

from longjax.evaluation import rouge


def test_scores_of_known_pairs():
  """By hand: F1 of words, of pairs of words, of the common subsequence."""
  got = ['the cat sat', 'nothing', 'b a. c d.']
  wanted = ['the cat ran off', 'nothing', 'a b. c d.']
  found = rouge.scores(got, wanted)
  np.testing.assert_allclose(found['rouge1'], [400 / 7, 100, 100])
  # Of (the cat), (cat sat) and (the cat), (cat ran), (ran off): one in common.
  np.testing.assert_allclose(found['rouge2'], [40, 0, 100 / 3])
  np.testing.assert_allclose(found['rougeL'], [400 / 7, 100, 75])


def test_rouge_lsum_goes_by_sentences():
  """Sentences in another order cost rougeL, not rougeLsum."""
  found = rouge.scores(['One two three. Four five.'], ['Four five. One two 3.'])
  assert found['rougeL'][0] < found['rougeLsum'][0]
  np.testing.assert_allclose(found['rougeLsum'], [80])


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('', []),
    ('  \n ', []),
    ('One. Two! Three?', ['One.', 'Two!', 'Three?']),
    ('no capital. after it', ['no capital. after it']),
    ('by line .\nand line\n\nfour', ['by line .', 'and line', 'four']),
    ('He said "so." Then (see 3.) (Or not.)', 3),
    ('Of 3.5 metres, e.g. here. End', ['Of 3.5 metres, e.g. here.', 'End']),
  ],
)
def test_sentences(text, wanted):
  found = rouge.sentences(text)
  if isinstance(wanted, int):
    assert len(found) == wanted
  else:
    assert found == wanted
  assert ''.join(''.join(found).split()) == ''.join(text.split())


def test_baselines():
  article = ' '.join(f'Sentence {i}.' for i in range(20))
  assert rouge.lead(article) == 'Sentence 0.\nSentence 1.\nSentence 2.'
  assert rouge.lead('Only one.') == 'Only one.'
  drawn = rouge.random_sentences(article, 3, (0, 5))
  assert drawn == rouge.random_sentences(article, 3, (0, 5))
  assert drawn != rouge.random_sentences(article, 3, (0, 6))
  numbers = [int(line.split()[1][:-1]) for line in drawn.split('\n')]
  assert len(set(numbers)) == 3 and numbers == sorted(numbers)
  assert rouge.random_sentences('Only one.', 3, (0,)) == 'Only one.'


@pytest.mark.parametrize('count', [2, 3, 50])
def test_a_derangement_leaves_nothing_in_place(count):
  orders = [rouge.derangement(count, seed) for seed in range(20)]
  for order in orders:
    assert sorted(order) == list(range(count))
    assert (order != np.arange(count)).all()
  np.testing.assert_array_equal(orders[3], rouge.derangement(count, 3))
  assert count == 2 or len({tuple(order) for order in orders}) > 1
  with pytest.raises(ValueError, match='1 papers cannot be exchanged'):
    rouge.derangement(1)


def test_intervals_hold_the_mean_as_often_as_they_say():
  """Of 200 samples from a known law, about 95% of intervals hold its mean."""
  generator = np.random.default_rng(0)
  held = 0
  for seed in range(200):
    found = rouge.interval(
      generator.gamma(2.0, size=60), seed=seed, resamples=300
    )
    assert found.low < found.mean < found.high
    held += found.low <= 2 <= found.high
  assert 0.88 <= held / 200 <= 0.99


def test_intervals_are_the_same_every_time():
  values = np.arange(30.0)
  assert rouge.interval(values, seed=1) == rouge.interval(values, seed=1)
  assert rouge.interval(values, seed=1) != rouge.interval(values, seed=2)
  assert str(rouge.interval([3.0, 3.0])) == '3.00 [3.00, 3.00]'
  wide = rouge.interval(values, confidence=0.99)
  assert wide.low < rouge.interval(values).low
  found = rouge.intervals({'rouge1': values}, seed=1)
  assert json.loads(json.dumps(found)) == found
  assert found['rouge1']['mean'] == 14.5


def test_mistakes_are_named(monkeypatch):
  with pytest.raises(ValueError, match='as many predictions as .* 1 and 2'):
    rouge.scores(['a'], ['a', 'b'])
  with pytest.raises(ValueError, match='got 0 and 0'):
    rouge.scores([], [])
  with pytest.raises(ValueError, match=r'\[texts\], got shape \(0,\)'):
    rouge.interval([])
  monkeypatch.setitem(sys.modules, 'rouge_score', None)
  with pytest.raises(ModuleNotFoundError, match=r'longjax\[interop\]'):
    rouge.scores(['a'], ['a'])


def test_a_picture_is_drawn(tmp_path):
  point = {kind: rouge.Interval(30, 28, 32) for kind in rouge.KINDS}
  rouge.draw(
    {'the paper': {1024: point, 4096: point}, 'another': {4096: point}},
    {'lead-3': point},
    tmp_path / 'r.png',
    title='ROUGE',
  )
  assert (tmp_path / 'r.png').read_bytes().startswith(b'\x89PNG')
