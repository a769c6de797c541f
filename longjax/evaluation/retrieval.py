"""Retrieval from long texts: something hidden, asked for at the end.

`passkey` hides a number among filler sentences (arXiv 2305.16300, as
LM-Infinite's section 5.4 uses it), `key_value` asks for the value of one key
among many pairs (arXiv 2307.03172, section 3).
"""

import dataclasses
import os
import re
import uuid
from collections.abc import Callable, Mapping

import numpy as np

from longjax.generation.sample import sample
from longjax.ops.middle import MiddleKeys


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt's text for any size, and what answers it.

  Attributes:
    text: (fillers before, fillers after what is hidden) -> the prompt.
    answered: whether a generated text holds the answer.
    new_tokens: how many to generate.
  """

  text: Callable[[int, int], str]
  answered: Callable[[str], bool]
  new_tokens: int


# A task makes a question from a generator of random numbers.
Task = Callable[[np.random.Generator], Question]


def passkey(rng: np.random.Generator) -> Question:
  """A pass key in 1 ... 9,999,999; the first whole number must be it."""
  key = int(rng.integers(1, 10_000_000))
  intro = (
    'There is an important info hidden inside a lot of irrelevant text. Find '
    'it and memorize it. I will quiz you about the important information '
    'there.\n'
  )
  filler = (
    'The grass is green. The sky is blue. The sun is yellow. Here we go. There '
    'and back again. '
  )
  hidden = f'The pass key is {key}. Remember it. {key} is the pass key. '
  question = '\nWhat is the pass key? The pass key is'

  def text(before, after):
    return intro + filler * before + hidden + filler * after + question

  def answered(answer):
    number = re.search(r'\d+', answer)
    return number is not None and int(number[0]) == key

  return Question(text, answered, 7)


def key_value(rng: np.random.Generator) -> Question:
  """One of many pairs of random identifiers; its value must be generated."""

  def identifier():
    return str(uuid.UUID(bytes=rng.bytes(16)))

  key, value = identifier(), identifier()
  others = []

  def pair(number):
    while len(others) <= number:
      others.append(f'"{identifier()}": "{identifier()}"')
    return others[number]

  def text(before, after):
    pairs = [pair(number) for number in range(before + after)]
    pairs.insert(before, f'"{key}": "{value}"')
    data = ',\n '.join(pairs)
    return (
      'Extract the value corresponding to the specified key in the JSON object '
      f'below.\n\nJSON data:\n{{{data}}}\n\nKey: "{key}"\nCorresponding value:'
    )

  # An identifier has 36 characters, of which a token is one at least.
  return Question(text, lambda answer: value in answer, 48)


TASKS = {'passkey': passkey, 'key_value': key_value}


def make_prompt(
  tokenizer, question: Question, length: int, depth: float
) -> list[int]:
  """Tokens of a prompt of at most `length`, as near to it as fillers allow.

  Args:
    tokenizer: of `longjax.interop.load_tokenizer`.
    question: of a task.
    length: tokens.
    depth: where the answer lies, 0 at the beginning, 1 at the end.

  Raises:
    ValueError: too short for even one filler, or a depth outside of 0 ... 1.
  """
  if not 0 <= depth <= 1:
    raise ValueError(f'depth must lie in 0 ... 1, got {depth}')

  def tokens(fillers):
    before = round(depth * fillers)
    return tokenizer.encode(question.text(before, fillers - before))

  shortest = len(tokens(1))
  if shortest > length:
    raise ValueError(
      f'this prompt has at least {shortest} tokens, length is {length}'
    )
  # Fillers have about as many tokens each: from an estimate, one by one.
  each = (len(tokens(11)) - shortest) / 10
  fillers = 1 + int((length - shortest) / each)
  while len(tokens(fillers + 1)) <= length:
    fillers += 1
  while fillers > 1 and len(tokens(fillers)) > length:
    fillers -= 1
  return tokens(fillers)


def accuracy(
  model,
  tokenizer,
  task: Task,
  *,
  length: int,
  depth: float,
  samples: int,
  seed: int = 0,
  middle_keys: MiddleKeys | None = None,
) -> float:
  """Share of `samples` questions answered, decoding greedily.

  Args:
    model: a `DecoderLM`.
    tokenizer, length, depth: of `make_prompt`.
    task: one of `TASKS`.
    samples: how many questions.
    seed: of the questions.
    middle_keys: LM-Infinite's top-k, with which the paper's table 2 was had.

  Raises:
    ValueError: see `make_prompt`; fewer than one sample.
  """
  if samples < 1:
    raise ValueError(f'samples must be at least 1, got {samples}')
  rng = np.random.default_rng([seed, length, round(1000 * depth)])
  answered = 0
  for _ in range(samples):
    question = task(rng)
    prompt = make_prompt(tokenizer, question, length, depth)
    new = sample(
      model,
      prompt,
      question.new_tokens,
      temperature=0,
      middle_keys=middle_keys,
    )
    answered += question.answered(tokenizer.decode(new))
  return answered / samples


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
