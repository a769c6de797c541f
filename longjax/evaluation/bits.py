"""Bits per character over a whole text, by overlapping windows.

The protocol of Longformer's section 4.2 (and Transformer-XL before it): slide a
window of `length` characters along the text by `stride` characters and score
only the last `stride` predictions of each. The paper uses length 32,256 and
stride 512 on enwik8 and text8.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class BitsPerCharacter:
  """The result, with everything needed to compare it with another.

  Attributes:
    bits_per_character: mean of -log2 p over all characters.
    characters: how many were scored, each exactly once: the whole text.
    length: characters that a window reads; no character has more context.
    stride: characters by which windows advance; from the second window on
      every character has at least length - stride + 1 characters of context.
    windows: how many windows were read.
  """

  bits_per_character: float
  characters: int
  length: int
  stride: int
  windows: int

  def __str__(self):
    return (
      f'{self.bits_per_character:.4f} bits/char over {self.characters:,} '
      f'characters (windows of {self.length}, stride {self.stride})'
    )


def windows(
  num_tokens: int, length: int, stride: int
) -> Iterator[tuple[int, int, int]]:
  """The windows over a text: (start, first scored, end of scored).

  A window reads characters start, ..., start + length - 1 and scores the
  predictions of characters first, ..., end - 1. The first window scores all it
  predicts, 1, ..., length; each next one starts `stride` later and scores the
  `stride` characters after those already scored (the last one fewer).
  """
  start, first = 0, 1
  while first < num_tokens:
    end = min(start + length + 1, num_tokens)
    yield start, first, end
    start, first = start + stride, end


def bits_per_character(
  losses_fn: Callable,
  tokens: np.ndarray,
  *,
  vocab_size: int,
  length: int,
  stride: int,
  batch_size: int,
  progress: Callable[[Iterable], Iterable] | None = None,
) -> BitsPerCharacter:
  """Scores every character of a text exactly once.

  The text's first character has nothing before it and is charged the uniform
  log2(vocab_size) bits; every other one is predicted from the characters of its
  window before it. Every batch has the same shape: the text's end and the last
  batch are filled up with padding which is not scored, so the model must be
  causal. The result does not depend on the batch size.

  Args:
    losses_fn: maps int32 inputs and targets, `[batch_size, length]` each, to
      the negative log-likelihood of each target after the inputs up to its own
      place, in nats; jitted by the caller.
    tokens: the text, `[characters]` integers.
    vocab_size: how many different characters there can be.
    length: characters read by a window, >= 1.
    stride: characters between the starts of windows, 1..length.
    batch_size: windows in one call of `losses_fn`; >= 1.
    progress: wraps the iterable of batches, as tqdm does.

  Returns:
    A `BitsPerCharacter`; the sums are taken in float64.

  Raises:
    ValueError: for an empty or 2-D text, a stride outside 1..length, or a
      length or batch size below 1.
  """
  tokens = np.asarray(tokens)
  if tokens.ndim != 1 or not tokens.size:
    raise ValueError(
      f'tokens must be one non-empty row of characters, got {tokens.shape}'
    )
  if length < 1 or not 1 <= stride <= length:
    raise ValueError(
      f'stride must lie in 1..length, got stride {stride}, length {length}'
    )
  if batch_size < 1:
    raise ValueError(f'batch_size must be >= 1, got {batch_size}')

  todo = list(windows(tokens.size, length, stride))
  total, characters = 0.0, 0
  batches = range(0, max(len(todo), 1), batch_size)
  for at in progress(batches) if progress else batches:
    inputs = np.zeros((batch_size, length), np.int32)
    targets = np.zeros((batch_size, length), np.int32)
    scored = np.zeros((batch_size, length), bool)
    for row, (start, first, end) in enumerate(todo[at : at + batch_size]):
      n = end - start - 1
      inputs[row, :n] = tokens[start : end - 1]
      targets[row, :n] = tokens[start + 1 : end]
      scored[row, first - start - 1 : n] = True
    losses = np.asarray(losses_fn(inputs, targets), np.float64)
    total += losses[scored].sum()
    characters += int(scored.sum())

  return BitsPerCharacter(
    bits_per_character=float(
      (total / math.log(2) + math.log2(vocab_size)) / (characters + 1)
    ),
    characters=characters + 1,
    length=length,
    stride=stride,
    windows=len(todo),
  )
