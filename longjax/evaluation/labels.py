"""How good predicted labels, spans of labels and answers are."""

import collections
import re
import string
from collections.abc import Sequence


def classification(true: Sequence, predicted: Sequence) -> dict:
  """Accuracy and F1 of labels.

  Returns:
    'accuracy'; 'f1', the mean over the true labels of their F1 (macro);
    'by_label', {label: {'precision', 'recall', 'f1', 'count'}}.
  """
  _check(true, predicted)
  right = collections.Counter(
    t for t, p in zip(true, predicted, strict=True) if t == p
  )
  there, said = collections.Counter(true), collections.Counter(predicted)
  by_label = {
    str(label): {
      **_f1(right[label], said[label], count),
      'count': count,
    }
    for label, count in sorted(there.items(), key=lambda x: str(x[0]))
  }
  return {
    'accuracy': right.total() / len(true),
    'f1': sum(x['f1'] for x in by_label.values()) / len(by_label),
    'by_label': by_label,
  }


def tagging(
  true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict:
  """Accuracy of tags, and F1 of the spans that tags in IOB2 spell.

  A span is B-x and the I-x that follow it; an I-x that follows nothing of its
  kind begins one, as conlleval counts. Tags of another form are spans of one
  word each, but for 'O'.

  Returns:
    'accuracy' over all words; 'precision', 'recall', 'f1' over all spans.
  """
  _check(true, predicted)
  spans = [set(_spans(tags)) for tags in true]
  found = [set(_spans(tags)) for tags in predicted]
  words = [
    t == p
    for row, other in zip(true, predicted, strict=True)
    for t, p in zip(row, other, strict=True)
  ]
  return {
    'accuracy': sum(words) / len(words),
    **_f1(
      sum(len(a & b) for a, b in zip(spans, found, strict=True)),
      sum(map(len, found)),
      sum(map(len, spans)),
    ),
  }


def _spans(tags):
  """(kind, first, past the last) of each."""
  start = kind = None
  for at, tag in enumerate([*tags, 'O']):
    prefix, dash, name = tag.partition('-')
    inside = prefix == 'I' and dash and name == kind
    if kind is not None and not inside:
      yield kind, start, at
      kind = None
    if tag != 'O' and not inside:
      start, kind = at, name if prefix in ('B', 'I') and dash else tag
      if kind == tag:
        yield kind, at, at + 1
        kind = None


def answers(
  true: Sequence[Sequence[str]], predicted: Sequence[str]
) -> dict[str, float]:
  """SQuAD's exact match and F1: the best over the true answers, in the mean.

  Case, punctuation and a, an, the do not count. For a question without answers
  the right one is ''.
  """
  _check(true, predicted)
  exact = f1 = 0.0
  for texts, text in zip(true, predicted, strict=True):
    words = normal(text).split()
    wanted = [normal(t).split() for t in texts] or [[]]
    exact += max(float(words == w) for w in wanted)
    f1 += max(_overlap(words, w) for w in wanted)
  return {'f1': f1 / len(true), 'exact_match': exact / len(true)}


def normal(text: str) -> str:
  """An answer without case, punctuation, articles and spare spaces."""
  text = text.lower().translate(str.maketrans('', '', string.punctuation))
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _overlap(words, wanted) -> float:
  if not words or not wanted:
    return float(words == wanted)
  common = (collections.Counter(words) & collections.Counter(wanted)).total()
  return _f1(common, len(words), len(wanted))['f1']


def _f1(right: int, said: int, there: int) -> dict[str, float]:
  return {
    'precision': right / said if said else 0.0,
    'recall': right / there if there else 0.0,
    'f1': 2 * right / (said + there) if said + there else 0.0,
  }


def _check(true, predicted):
  if len(true) != len(predicted) or not len(true):
    raise ValueError(
      f'{len(predicted)} predictions for {len(true)} examples: one each is '
      'wanted, and one at least'
    )
