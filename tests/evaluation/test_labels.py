"""Accuracy, F1 of labels and spans, exact match: by hand."""

import pytest

from longjax.evaluation import labels


def test_classification():
  found = labels.classification('aaabbc', 'aabbba')
  assert found['accuracy'] == pytest.approx(4 / 6)
  assert found['by_label']['a'] == dict(
    precision=pytest.approx(2 / 3),
    recall=pytest.approx(2 / 3),
    f1=pytest.approx(2 / 3),
    count=3,
  )
  assert found['by_label']['b']['f1'] == pytest.approx(0.8)
  assert found['by_label']['c']['f1'] == 0.0
  assert found['f1'] == pytest.approx((2 / 3 + 0.8 + 0) / 3)


def test_tagging_counts_spans():
  true = [['B-x', 'I-x', 'O', 'B-y'], ['O', 'B-x', 'B-x']]
  said = [['B-x', 'I-x', 'O', 'B-x'], ['I-x', 'B-x', 'B-x']]
  found = labels.tagging(true, said)
  assert found['accuracy'] == pytest.approx(5 / 7)
  # Right: the first, and both of the second row; 5 were said, 4 there are.
  assert found['precision'] == pytest.approx(3 / 5)
  assert found['recall'] == pytest.approx(3 / 4)
  assert found['f1'] == pytest.approx(6 / 9)
  cut = labels.tagging([['B-x', 'I-x', 'I-x']], [['B-x', 'I-x', 'O']])
  assert cut['f1'] == 0.0
  plain = labels.tagging([['NOUN', 'O', 'VERB']], [['NOUN', 'VERB', 'VERB']])
  assert plain['f1'] == pytest.approx(0.8)


def test_answers_as_squad_counts_them():
  found = labels.answers(
    [['The Eiffel Tower', 'Tower'], ['1889'], [], ['x']],
    ['eiffel tower!', 'in 1889', '', ''],
  )
  assert found['exact_match'] == pytest.approx(2 / 4)
  assert found['f1'] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
  assert labels.answers([[]], ['something'])['f1'] == 0.0


def test_bad_input():
  with pytest.raises(ValueError, match='2 predictions for 1 examples'):
    labels.classification(['a'], ['a', 'b'])
  with pytest.raises(ValueError, match='one at least'):
    labels.answers([], [])
