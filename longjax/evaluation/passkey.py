"""Passkey retrieval: a number hidden in a long text, asked for at its end.

The task of arXiv 2305.16300 as LM-Infinite's section 5.4 uses it: filler
sentences, one sentence with the number somewhere among them, and a question
whose answer is the first whole number that the model generates.
"""

import os
import re
from collections.abc import Mapping

import numpy as np

from longjax.generation.sample import sample

TASK = (
  'There is an important info hidden inside a lot of irrelevant text. Find it '
  'and memorize it. I will quiz you about the important information there.\n'
)
FILLER = (
  'The grass is green. The sky is blue. The sun is yellow. Here we go. There '
  'and back again. '
)
HIDDEN = 'The pass key is {key}. Remember it. {key} is the pass key. '
QUESTION = '\nWhat is the pass key? The pass key is'
LARGEST = 9_999_999
NEW_TOKENS = 7


def make_prompt(tokenizer, key: int, length: int, depth: float) -> list[int]:
  """Tokens of a prompt of at most `length`, as near to it as fillers allow.

  Args:
    tokenizer: of `longjax.interop.load_tokenizer`.
    key: the number.
    length: tokens.
    depth: where the number lies, 0 at the beginning, 1 at the end.

  Raises:
    ValueError: too short for even one filler, or a depth outside of 0 ... 1.
  """
  if not 0 <= depth <= 1:
    raise ValueError(f'depth must lie in 0 ... 1, got {depth}')

  def text(fillers):
    before = round(depth * fillers)
    return ''.join(
      (
        TASK,
        FILLER * before,
        HIDDEN.format(key=key),
        FILLER * (fillers - before),
        QUESTION,
      )
    )

  def tokens(fillers):
    return tokenizer.encode(text(fillers))

  shortest = len(tokens(1))
  if shortest > length:
    raise ValueError(
      f'a passkey prompt has at least {shortest} tokens, length is {length}'
    )
  # Fillers have about as many tokens each; what borders merge is little.
  each = (len(tokens(11)) - shortest) / 10
  fillers = 1 + int((length - shortest) / each)
  while fillers > 1 and len(tokens(fillers)) > length:
    fillers -= 1
  return tokens(fillers)


def accuracy(
  model,
  tokenizer,
  *,
  length: int,
  depth: float,
  samples: int,
  seed: int = 0,
) -> float:
  """Share of `samples` numbers found, decoding greedily.

  Args:
    model: a `DecoderLM`.
    tokenizer, length, depth: of `make_prompt`.
    samples: how many numbers, uniform in 1 ... 9,999,999.
    seed: of the numbers.

  Raises:
    ValueError: see `make_prompt`; fewer than one sample.
  """
  if samples < 1:
    raise ValueError(f'samples must be at least 1, got {samples}')
  rng = np.random.default_rng([seed, length, round(1000 * depth)])
  found = 0
  for key in rng.integers(1, LARGEST + 1, samples):
    prompt = make_prompt(tokenizer, int(key), length, depth)
    answer = tokenizer.decode(sample(model, prompt, NEW_TOKENS, temperature=0))
    number = re.search(r'\d+', answer)
    found += number is not None and int(number[0]) == key
  return found / samples


def draw(found: Mapping[str, Mapping[str, float]], path: str | os.PathLike):
  """Writes a picture: for each label a grid of lengths by depths.

  Args:
    found: {label: {'length,depth': share}}.
    path: of the .png.
  """
  from matplotlib import figure

  canvas = figure.Figure(
    figsize=(1 + 3 * len(found), 3.2), layout='constrained'
  )
  all_axes = canvas.subplots(1, len(found), squeeze=False)[0]
  for axes, (label, grid) in zip(all_axes, found.items(), strict=True):
    cells = {tuple(map(float, key.split(','))): v for key, v in grid.items()}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    image = [[cells[length, depth] for length in lengths] for depth in depths]
    axes.imshow(image, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
    for row, values in enumerate(image):
      for column, value in enumerate(values):
        axes.text(column, row, f'{value:.0%}', ha='center', va='center')
    axes.set_xticks(range(len(lengths)), [f'{n:.0f}' for n in lengths])
    axes.set_yticks(range(len(depths)), [f'{d:g}' for d in depths])
    axes.set(title=label, xlabel='tokens', ylabel='depth')
  canvas.savefig(path, dpi=150)
