"""Generated continuations of long texts against the true ones.

LM-Infinite's table 3: after each milestone of a text the model goes on by
itself, and BLEU and ROUGE-L compare what it writes with what stands there.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from longjax.generation.sample import sample


def continuations(
  model, tokens: np.ndarray, milestone: int, num_tokens: int
) -> np.ndarray:
  """What the model likes best after `milestone` tokens of each text.

  Args:
    model: a `DecoderLM`.
    tokens: int [texts, length].
    milestone: how many tokens the model reads.
    num_tokens: how many it then writes.

  Returns:
    int32 [texts, num_tokens].

  Raises:
    ValueError: texts that end before milestone + num_tokens.
  """
  if milestone < 1 or milestone + num_tokens > tokens.shape[1]:
    raise ValueError(
      f'milestone {milestone} and {num_tokens} tokens do not lie in texts of '
      f'{tokens.shape[1]}'
    )
  # One text at a time: vanilla attention to all of it needs the memory.
  return np.concatenate(
    [
      sample(model, row[None, :milestone], num_tokens, temperature=0)
      for row in tokens
    ]
  )


def scores(generated: Sequence[str], true: Sequence[str]) -> dict:
  """{'bleu', 'rouge_l'}, both 0 ... 100.

  BLEU is sacrebleu's, over all texts; ROUGE-L is rouge-score's F1, the mean
  over texts.

  Raises:
    ValueError: no texts, or not as many of both.
  """
  import sacrebleu
  from rouge_score import rouge_scorer

  if not generated or len(generated) != len(true):
    raise ValueError(
      f'as many true as generated texts are needed, got {len(true)} and '
      f'{len(generated)}'
    )
  scorer = rouge_scorer.RougeScorer(['rougeL'])
  return {
    'bleu': sacrebleu.corpus_bleu(list(generated), [list(true)]).score,
    'rouge_l': 100
    * float(
      np.mean(
        [
          scorer.score(wanted, got)['rougeL'].fmeasure
          for got, wanted in zip(generated, true, strict=True)
        ]
      )
    ),
  }


def draw(results: Mapping[str, Mapping[str, Mapping]], path: str | os.PathLike):
  """Writes a picture: both scores after each milestone, a line for each label.

  Args:
    results: {label: {milestone: what `scores` returns}}.
    path: of the .png.
  """
  from matplotlib import figure

  canvas = figure.Figure(figsize=(9, 3.6), layout='constrained')
  for axes, (name, title) in zip(
    canvas.subplots(1, 2),
    (('bleu', 'BLEU'), ('rouge_l', 'ROUGE-L')),
    strict=True,
  ):
    for label, rows in results.items():
      milestones = sorted(map(int, rows))
      values = [rows[str(milestone)][name] for milestone in milestones]
      axes.plot(milestones, values, marker='o', label=label)
    axes.set_xscale('log', base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel='tokens read before', ylabel=title)
    axes.grid(alpha=0.3)
  axes.legend(fontsize='small')
  canvas.savefig(path, dpi=150)
