"""Batches of contiguous sequences, epoch-exact and resumable.

A split of N tokens holds (N - 1) // length sequences; sequence i is
tokens[i * length : (i + 1) * length + 1], so that the inputs [:-1] and the
targets [1:] of all sequences together cover every token once. What does not
fill a last sequence is dropped.

The sequences form one endless stream: a permutation of all of them, then
another, and so on. Batch b of B sequences is places b * B to (b + 1) * B of
that stream, whoever computes it. So every epoch visits every sequence exactly
once (a batch may straddle two epochs), and process p of P takes places p,
p + P, p + 2P, ... of it: the processes are disjoint and together complete. Long
sequences may be cut into parts besides, one for each of several processes.
"""

import functools
import logging
import operator
import zlib

import numpy as np

from longjax.data import optional

LOADERS = ('grain', 'numpy')

_log = logging.getLogger(__name__)


def _check_positive(**numbers):
  for name, value in numbers.items():
    if operator.index(value) < 1:
      raise ValueError(f'{name}={value} must be at least 1')


def check_share(batch_size, process_index, process_count, seed, loader):
  """Raises ValueError unless batches can be shared so among processes."""
  _check_positive(batch_size=batch_size, process_count=process_count)
  if batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size} does not divide over {process_count} processes'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index} is not in [0, {process_count})'
    )
  if operator.index(seed) < 0:
    raise ValueError(f'seed={seed} must not be negative')
  if loader not in LOADERS:
    raise ValueError(f'loader={loader!r} is not one of {", ".join(LOADERS)}')


class Resumable:
  """An endless iterator of batches that goes on where another one stood.

  Subclasses set `_stream`, with `seek(batches taken)`, `_taken`, and
  `_identity`: what the stream depends on, which JSON can hold.
  """

  def __iter__(self):
    return self

  def get_state(self) -> dict:
    """Where the iterator stands: a small dict that JSON can hold."""
    return {**self._identity, 'batches_taken': self._taken}

  def set_state(self, state: dict) -> None:
    """Continues exactly after the batches that `state` had yielded.

    Raises:
      ValueError: the state is of other data or other arguments.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise ValueError(
          f'the saved place in the data has {name}={state.get(name)}, this'
          f' iterator {name}={value}: they are not the same stream'
        )
    self._taken = operator.index(state['batches_taken'])
    self._stream.seek(self._taken)


class Batches(Resumable):
  """Endless iterator of {'tokens': int32 [local batch, length / parts + 1]}.

  Attributes:
    sequences_per_epoch: how many sequences the tokens hold.
    dropped_tokens: how many tokens at the end are no sequence's target.
  """

  def __init__(
    self,
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    part: int = 0,
    parts: int = 1,
    loader: str = 'grain',
  ):
    """Checks the arguments; reads nothing yet.

    Args:
      tokens: integer array [N].
      length: number of inputs, and of targets, in a sequence.
      batch_size: sequences a batch, over all processes.
      seed: of the order of the sequences.
      shuffle: False goes through the sequences in order.
      process_index: which part of every batch is yielded here.
      process_count: into how many parts batches are split.
      part, parts: of each sequence, cut into so many, only this one is read.
      loader: 'grain' reads ahead in a thread and needs grain; 'numpy' does
        the same work when asked, with another shuffle.

    Raises:
      ValueError: an argument out of range, or too few tokens for a sequence.
      ModuleNotFoundError: loader='grain' where grain is not installed.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(
        'tokens must be a one-dimensional array of integers, not'
        f' {tokens.dtype}{list(tokens.shape)}'
      )
    _check_positive(length=length, parts=parts)
    check_share(batch_size, process_index, process_count, seed, loader)
    if length % parts or not 0 <= part < parts:
      raise ValueError(
        f'part={part} is none of parts={parts} that length={length} has'
      )
    if len(tokens) < length + 1:
      raise ValueError(
        f'{len(tokens)} tokens hold no sequence of length {length}: at least'
        f' {length + 1} are wanted'
      )

    self.sequences_per_epoch = (len(tokens) - 1) // length
    self.dropped_tokens = (len(tokens) - 1) % length
    self._batch_size = batch_size
    self._taken = 0
    # What the stream depends on, and so what a saved state must agree with.
    # The number of processes is not among it: the stream is the same.
    self._identity = {
      'num_tokens': len(tokens),
      'crc32': zlib.crc32(np.ascontiguousarray(tokens)),
      'length': length,
      'batch_size': batch_size,
      'seed': seed,
      'shuffle': bool(shuffle),
      'loader': loader,
    }
    make_stream = {'grain': _GrainStream, 'numpy': _NumpyStream}[loader]
    self._stream = make_stream(
      _Sequences(tokens, length, part, parts),
      batch_size // process_count,
      seed=seed if shuffle else None,
      process_index=process_index,
      process_count=process_count,
    )
    _log.info(
      '%d sequences of %d in an epoch, %d tokens at the end dropped',
      self.sequences_per_epoch,
      length,
      self.dropped_tokens,
    )

  def __next__(self) -> dict[str, np.ndarray]:
    tokens = next(self._stream)
    self._taken += 1
    return {'tokens': tokens}

  @property
  def epoch(self) -> int:
    """How many whole epochs have been yielded."""
    return self._taken * self._batch_size // self.sequences_per_epoch


class _Sequences:
  """The sequences of `tokens` by number: int32 [length / parts + 1] each."""

  def __init__(self, tokens: np.ndarray, length: int, part: int, parts: int):
    self._tokens = tokens
    self._length = length
    self._size = length // parts
    self._first = part * self._size

  def __len__(self) -> int:
    return (len(self._tokens) - 1) // self._length

  def __getitem__(self, index: int) -> np.ndarray:
    start = index * self._length + self._first
    return self._tokens[start : start + self._size + 1].astype(np.int32)


class _NumpyStream:
  """Batches, computed when asked for."""

  def __init__(self, sequences, size, *, seed, process_index, process_count):
    self._sequences = sequences
    self._places = np.arange(size) * process_count + process_index
    self._stride = size * process_count
    self._seed = seed
    self._taken = 0
    # A batch may straddle epochs; each one's order is drawn once.
    self._order = functools.lru_cache(maxsize=2)(self._draw)

  def _draw(self, epoch: int) -> np.ndarray:
    count = len(self._sequences)
    if self._seed is None:
      return np.arange(count)
    return np.random.default_rng([self._seed, epoch]).permutation(count)

  def __next__(self) -> np.ndarray:
    places = self._taken * self._stride + self._places
    self._taken += 1
    epochs, offsets = np.divmod(places, len(self._sequences))
    return np.stack(
      [
        self._sequences[self._order(int(epoch))[offset]]
        for epoch, offset in zip(epochs, offsets, strict=True)
      ]
    )

  def seek(self, taken: int) -> None:
    self._taken = taken


class _GrainStream:
  """The same stream out of grain, which reads ahead in a thread."""

  def __init__(self, sequences, size, *, seed, process_index, process_count):
    grain = optional.require('grain', "loader='grain'")
    dataset = grain.MapDataset.source(sequences)
    if seed is not None:
      dataset = dataset.seed(seed).shuffle()
    # Repeating reseeds the shuffle in every epoch. Without a number of epochs
    # the length is sys.maxsize, which slicing and batching overflow.
    dataset = dataset.repeat(num_epochs=2**62 // len(sequences))
    dataset = dataset[process_index::process_count]
    self._iterator = iter(
      dataset.batch(size).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
      )
    )

  def __next__(self) -> np.ndarray:
    return next(self._iterator)

  def seek(self, taken: int) -> None:
    self._iterator.set_state({'next_index': taken})
