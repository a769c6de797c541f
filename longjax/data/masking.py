"""Masked language modelling's batches: RoBERTa's, without its sentences.

Of the tokens of a sequence a share is chosen; of these 80% become the mask, 10%
a random token and 10% stay as they are, and all are to be found again (BERT's
numbers; arXiv 1907.11692, section 4.1). The choice is another one each time
that a sequence is seen, and follows from the seed and the sequence's place in
the stream alone: a resumed run goes on with the same, on any number of
processes.
"""

import dataclasses

import numpy as np

from longjax.data.batches import Batches

TO_MASK, TO_RANDOM = 0.8, 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
  """How tokens are hidden.

  Attributes:
    begin, end, pad, mask: numbers of the special tokens.
    ordinary: int [tokens], what a random token may be.
    share: of the tokens that are chosen, in (0, 1).
  """

  begin: int
  end: int
  pad: int
  mask: int
  ordinary: np.ndarray
  share: float = 0.15

  def __post_init__(self):
    if not 0 < self.share < 1:
      raise ValueError(f'share must lie in (0, 1), got {self.share}')

  def count(self, length: int) -> int:
    """How many of so many tokens are chosen; at least one."""
    return max(1, round(self.share * length))

  def hide(self, tokens: np.ndarray, generator) -> tuple:
    """(tokens with some hidden, their places in order), of int [length]."""
    places = generator.permutation(len(tokens))[: self.count(len(tokens))]
    places = np.sort(places).astype(np.int32)
    draw = generator.random(len(places))
    random = generator.choice(self.ordinary, len(places))
    hidden = np.array(tokens, np.int32)
    hidden[places] = np.select(
      [draw < TO_MASK, draw < TO_MASK + TO_RANDOM],
      [self.mask, random],
      hidden[places],
    )
    return hidden, places

  def frame(self, tokens: np.ndarray) -> np.ndarray:
    """<s> tokens </s>, int32."""
    return np.concatenate([[self.begin], tokens, [self.end]]).astype(np.int32)


class MaskedBatches:
  """Endless iterator of sequences <s> text </s> with some tokens hidden.

  {'tokens' [rows, length], 'places' [rows, chosen], 'targets' [rows, chosen]},
  all int32: the targets are what stood at the places.
  """

  def __init__(
    self,
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    masking: Masking,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    loader: str = 'grain',
  ):
    """Args, besides those of `longjax.data.Batches`:

    length: of the sequences, with <s> and </s>; at least 3.
    masking: how tokens are hidden.

    Raises:
      ValueError: as of `Batches`, or for a length below 3.
    """
    if length < 3:
      raise ValueError(
        f'length={length} must be at least 3: <s>, a token and </s>'
      )
    self._batches = Batches(
      tokens,
      length - 2,
      batch_size,
      seed=seed,
      process_index=process_index,
      process_count=process_count,
      loader=loader,
    )
    self._masking = masking
    self._seed = seed
    self._batch_size = batch_size
    self._process = process_index, process_count
    self._taken = 0

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    texts = next(self._batches)['tokens'][:, :-1]
    index, count = self._process
    first = self._taken * self._batch_size + index
    self._taken += 1
    rows = [
      self._row(text, first + number * count)
      for number, text in enumerate(texts)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _row(self, text, place):
    # The order of the sequences has the seed alone: this is another stream.
    generator = np.random.default_rng([self._seed, 1, place])
    hidden, places = self._masking.hide(text, generator)
    return {
      'tokens': self._masking.frame(hidden),
      'places': places + 1,
      'targets': text[places].astype(np.int32),
    }

  @property
  def epoch(self) -> int:
    """How many whole epochs have been yielded."""
    return self._batches.epoch

  def get_state(self) -> dict:
    """Where the iterator stands: a small dict that JSON can hold."""
    return {**self._batches.get_state(), 'share': self._masking.share}

  def set_state(self, state: dict) -> None:
    """Continues exactly after the batches that `state` had yielded.

    Raises:
      ValueError: the state is of other tokens or other arguments.
    """
    if state.get('share') != self._masking.share:
      raise ValueError(
        f'the saved place in the data has share={state.get("share")}, this '
        f'iterator share={self._masking.share}: they are not the same stream'
      )
    self._batches.set_state(state)
    self._taken = state['batches_taken']


def evaluation_batches(
  tokens: np.ndarray,
  length: int,
  batch_size: int,
  masking: Masking,
  seed: int = 0,
) -> list[dict[str, np.ndarray]]:
  """A whole text with the same tokens hidden, whatever the length is.

  Args:
    tokens: int [N], the text.
    length: of the sequences it is cut into, with <s> and </s>.
    batch_size: sequences at a time; the last batch is filled with padding.
    masking: how tokens are hidden.
    seed: of the choice.

  Returns:
    Batches of equal shapes: as of `MaskedBatches`, and 'counts', bool, False at
    places that only fill a row up.

  Raises:
    ValueError: an empty text, or a length below 3.
  """
  if length < 3 or not len(tokens):
    raise ValueError(
      f'length={length} must be at least 3 and the text not empty (it has '
      f'{len(tokens)} tokens)'
    )
  hidden, chosen = masking.hide(tokens, np.random.default_rng(seed))
  starts = np.arange(0, len(tokens), length - 2)
  edges = np.searchsorted(chosen, [*starts, len(tokens)])
  most = int(np.diff(edges).max())
  rows = -(-len(starts) // batch_size) * batch_size
  whole = {
    'tokens': np.full((rows, length), masking.pad, np.int32),
    'places': np.zeros((rows, most), np.int32),
    'targets': np.zeros((rows, most), np.int32),
    'counts': np.zeros((rows, most), bool),
  }
  for row, start in enumerate(starts):
    framed = masking.frame(hidden[start : start + length - 2])
    whole['tokens'][row, : len(framed)] = framed
    mine = chosen[edges[row] : edges[row + 1]]
    whole['places'][row, : len(mine)] = mine - start + 1
    whole['targets'][row, : len(mine)] = tokens[mine]
    whole['counts'][row, : len(mine)] = True
  return [
    {name: array[at : at + batch_size] for name, array in whole.items()}
    for at in range(0, rows, batch_size)
  ]
