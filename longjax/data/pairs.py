"""Sources and targets of an encoder-decoder, and rows of a batch of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longjax.data.buckets import FILLER
from longjax.data.ragged import Ragged


@dataclasses.dataclass(frozen=True)
class Special:
  """Numbers of tokens: around a text, of padding, before a decoder's first."""

  bos: int
  pad: int
  eos: int
  start: int


class Pairs:
  """Source and target number i, tokens without special ones.

  Attributes:
    lengths: int64 [pairs], of the sources.
  """

  def __init__(
    self,
    sources: Ragged,
    targets: Ragged,
    order: Sequence[int] | None = None,
    count: int = 0,
  ):
    """Args:

    sources, targets: as many.
    order: target i stands with source order[i]; None: with its own.
    count: how many first ones; 0 for all.
    """
    count = min(count or len(targets), len(targets))
    self._sources, self._targets = sources, targets
    self._order = np.arange(count) if order is None else np.asarray(order)
    self.lengths = sources.lengths[self._order]

  def source(self, number: int) -> np.ndarray:
    return self._sources[self._order[number]]

  def target(self, number: int) -> np.ndarray:
    return self._targets[number]


class Spans:
  """Pieces of texts; the target is a part of the piece.

  Pieces of a text follow each other without a gap; what is left at its end, if
  it is short, is dropped.

  Attributes:
    lengths: int64 [pieces], all the same.
  """

  def __init__(
    self, texts: Ragged, length: int, span: int, *, seed: int | None = None
  ):
    """Args:

    texts: to cut into pieces.
    length: tokens of a piece.
    span: tokens of a target, or all where a piece has fewer.
    seed: of where the targets begin, each at a place of its own that stays;
      None for the pieces' openings.

    Raises:
      ValueError: every text is shorter than a piece.
    """
    counts = texts.lengths // length
    self._texts, self._length = texts, length
    self._span = min(span, length)
    self._text = np.repeat(np.arange(len(texts)), counts)
    firsts = np.cumsum(counts) - counts
    self._piece = np.arange(len(self._text)) - firsts[self._text]
    self.lengths = np.full(len(self._text), length)
    if not len(self.lengths):
      raise ValueError(f'no text has {length} tokens for a piece')
    self._first = np.zeros(len(self.lengths), np.int64)
    if seed is not None:
      self._first = np.random.default_rng(seed).integers(
        length - self._span + 1, size=len(self.lengths)
      )

  def source(self, number: int) -> np.ndarray:
    start = self._piece[number] * self._length
    return self._texts[self._text[number]][start : start + self._length]

  def target(self, number: int) -> np.ndarray:
    first = self._first[number]
    return self.source(number)[first : first + self._span]


def collate(
  pairs: Pairs | Spans,
  rows: Sequence[int],
  length: int,
  target_length: int,
  special: Special,
) -> dict[str, np.ndarray]:
  """A batch; what is too long is cut off at its end.

  Args:
    pairs: what to take from.
    rows: numbers of pairs; `FILLER` for a row without labels.
    length, target_length: of the batch, with a text's two special tokens.
    special: their numbers.

  Returns:
    {'tokens' [rows, length], 'decoder_tokens' [rows, target length], 'labels'
    likewise}, int32: <s> text </s> and padding; the labels' padding is not to
    be predicted. `decoder_tokens` are the start and the labels but the last.
  """
  tokens = np.full((len(rows), length), special.pad, np.int32)
  labels = np.full((len(rows), target_length), special.pad, np.int32)
  # An encoder wants a first token in every row.
  tokens[:, :2] = special.bos, special.eos
  for row, number in enumerate(rows):
    if number == FILLER:
      continue
    _write(tokens[row], pairs.source(number), special)
    _write(labels[row], pairs.target(number), special)
  start = np.full((len(rows), 1), special.start, np.int32)
  decoder_tokens = np.concatenate([start, labels[:, :-1]], axis=1)
  return {'tokens': tokens, 'decoder_tokens': decoder_tokens, 'labels': labels}


def _write(row, text, special):
  text = text[: len(row) - 2]
  row[0] = special.bos
  row[1 : len(text) + 1] = text
  row[len(text) + 1] = special.eos
