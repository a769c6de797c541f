"""ROUGE with intervals, and what a summary must do better than.

Scores are rouge-score's F1 (Lin 2004), 0 ... 100, of each pair of texts;
rougeLsum takes the union of longest common subsequences over sentences, rougeL
one of the whole text. Their means come with bootstrap intervals over papers.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from longjax.data import optional

KINDS = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')

# Of the bootstrap.
RESAMPLES = 1000

# A sentence ends at a line's end, or at . ! ? (and what closes quotes) before
# white space and a capital, a digit or an opening quote or bracket.
_ENDS = re.compile(r'\n+|(?<=[.!?])["\'”’)\]]*\s+(?=["\'“‘(\[]?[A-Z0-9])')


class Interval(NamedTuple):
  """A mean and its confidence interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]'


def sentences(text: str) -> list[str]:
  """The sentences of a text, by a plain rule; none are empty."""
  starts = [0, *(match.end() for match in _ENDS.finditer(text))]
  pieces = zip(starts, [*starts[1:], len(text)], strict=True)
  return [s for a, b in pieces if (s := text[a:b].strip())]


def scores(
  predictions: Sequence[str], references: Sequence[str]
) -> dict[str, np.ndarray]:
  """{kind of ROUGE: float64 [texts]} of predictions, without stemming.

  Raises:
    ValueError: no texts, or not as many of both.
    ModuleNotFoundError: rouge-score is not installed.
  """
  optional.require('rouge_score', 'ROUGE', extra='interop')
  from rouge_score import rouge_scorer

  if not len(references) or len(predictions) != len(references):
    raise ValueError(
      f'as many predictions as references are needed, got {len(predictions)} '
      f'and {len(references)}'
    )
  scorer = rouge_scorer.RougeScorer(KINDS)
  rows = [
    scorer.score(_by_line(wanted), _by_line(got))
    for got, wanted in zip(predictions, references, strict=True)
  ]
  return {
    kind: np.array([100 * row[kind].fmeasure for row in rows]) for kind in KINDS
  }


def _by_line(text):
  return '\n'.join(sentences(text))


def interval(
  values, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
  """The mean over texts, with the percentile bootstrap's interval.

  Args:
    values: [texts]; of two systems on the same texts their differences, whose
      interval says more than those of either.
    seed: of the resampling. Equal seeds draw equal texts, if as many.
    resamples: how often as many texts are drawn, with replacement.
    confidence: of the interval.

  Raises:
    ValueError: no values.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f'values must be [texts], got shape {values.shape}')
  generator = np.random.default_rng(seed)
  means = [
    values[generator.integers(len(values), size=len(values))].mean()
    for _ in range(resamples)
  ]
  tail = 50 * (1 - confidence)
  low, high = np.percentile(means, [tail, 100 - tail])
  return Interval(float(values.mean()), float(low), float(high))


def intervals(scores: Mapping[str, np.ndarray], *, seed: int = 0) -> dict:
  """{kind: {'mean', 'low', 'high'}}, which JSON can hold."""
  return {
    kind: interval(values, seed=seed)._asdict()
    for kind, values in scores.items()
  }


def lead(article: str, count: int = 3) -> str:
  """The first sentences of an article, a line each: a strong baseline."""
  return '\n'.join(sentences(article)[:count])


def random_sentences(article: str, count: int, seed: Sequence[int]) -> str:
  """Sentences from anywhere, in the article's order; `seed` of integers."""
  found = sentences(article)
  chosen = np.random.default_rng(seed).choice(
    len(found), size=min(count, len(found)), replace=False
  )
  return '\n'.join(found[i] for i in sorted(chosen))


def derangement(count: int, seed: int = 0) -> np.ndarray:
  """A permutation of `count` papers, int [count], that leaves none in place.

  To give a model another paper's text: if it summarizes what it reads, ROUGE
  falls. Drawn evenly from the cyclic ones (Sattolo's algorithm).

  Raises:
    ValueError: fewer than two papers.
  """
  if count < 2:
    raise ValueError(f'{count} papers cannot be exchanged: 2 are needed')
  generator = np.random.default_rng(seed)
  order = np.arange(count)
  for last in range(count - 1, 0, -1):
    other = generator.integers(last)
    order[[last, other]] = order[[other, last]]
  return order


def draw(
  curves: Mapping[str, Mapping[int, Mapping[str, Interval]]],
  levels: Mapping[str, Mapping[str, Interval]],
  path: str | os.PathLike,
  *,
  title: str = '',
) -> None:
  """Writes a picture: ROUGE-1, 2 and L over the length of the input.

  Args:
    curves: {label: {tokens read: {kind: interval}}}, with its interval a band.
    levels: {label: {kind: interval}} of what has no length, as level lines.
    path: of the .png.
    title: above it.
  """
  from matplotlib import figure

  canvas = figure.Figure(figsize=(11, 4.1), layout='constrained')
  canvas.suptitle(title)
  for axes, kind in zip(canvas.subplots(1, 3), KINDS[:3], strict=True):
    for number, (label, points) in enumerate(curves.items()):
      lengths = sorted(points)
      mean, low, high = zip(*(points[n][kind] for n in lengths), strict=True)
      color = f'C{number}'
      axes.plot(lengths, mean, marker='o', color=color, label=label)
      axes.fill_between(lengths, low, high, color=color, alpha=0.15)
    for number, (label, level) in enumerate(levels.items(), len(curves)):
      style = dict(color=f'C{number}', linestyle=(0, (5, 1 + number)))
      axes.axhline(level[kind].mean, label=label, **style)
    axes.set_xscale('log', base=2)
    ticks = sorted({n for points in curves.values() for n in points})
    axes.set_xticks(ticks, [f'{n:,}' for n in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel='input tokens read', ylabel=kind.replace('rouge', 'ROUGE-'))
    axes.grid(alpha=0.3)
  handles = axes.get_legend_handles_labels()
  canvas.legend(
    *handles,
    loc='outside lower center',
    ncols=len(handles[0]),
    fontsize='small',
  )
  canvas.savefig(path, dpi=130)
