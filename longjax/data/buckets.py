"""Batches of sequences of unlike lengths: each is padded to its bucket.

Buckets are a few lengths; a sequence belongs to the shortest that holds it. An
epoch is a permutation of all examples, dealt to batches bucket by bucket. What
does not fill a batch of its bucket goes on to the next longer one; only the
last batch of the longest may be short, and is filled up with rows that do not
count. So an epoch has every example exactly once, in ceil(examples / batch
size) batches of as many shapes as there are buckets, and its batches come in
an order of their own.

Everything follows from the seed and the number of a batch: to resume is to go
on counting. Process p of P has rows p, p + P, ... of every batch.
"""

import functools
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longjax.data import optional
from longjax.data.batches import Resumable, check_share

# In place of an example, a row that does not count.
FILLER = -1


def bucket_of(lengths, buckets: Sequence[int]) -> np.ndarray:
  """The number of the shortest bucket that holds each of the lengths.

  Raises:
    ValueError: buckets that do not grow, or a length beyond the last.
  """
  edges = np.asarray(buckets)
  if edges.ndim != 1 or not len(edges) or edges[0] < 1:
    raise ValueError(f'buckets {tuple(buckets)} must be lengths of at least 1')
  if (np.diff(edges) <= 0).any():
    raise ValueError(f'buckets {tuple(buckets)} must grow')
  lengths = np.asarray(lengths)
  if len(lengths) and lengths.max() > edges[-1]:
    raise ValueError(
      f'a sequence of {lengths.max()} is longer than the last bucket '
      f'{edges[-1]}'
    )
  return np.searchsorted(edges, lengths)


class BucketedBatches(Resumable):
  """Endless iterator of what `collate` makes of the rows of a batch.

  Attributes:
    examples_per_epoch: how many there are.
    batches_per_epoch: how many batches they make.
  """

  def __init__(
    self,
    lengths: Sequence[int],
    collate: Callable[[np.ndarray, int], Any],
    *,
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    loader: str = 'grain',
    identity: Any = None,
  ):
    """Checks the arguments; makes no batch yet.

    Args:
      lengths: of the examples, in whatever the buckets count.
      collate: (numbers int [rows] of examples, `FILLER` for rows that must not
        count; the bucket's length) -> a batch of this process, arrays with its
        rows first. Called by a thread of grain's.
      buckets: growing lengths; the last holds the longest example.
      batch_size: rows a batch, over all processes.
      seed: of the order.
      shuffle: False deals the examples, and the batches, in order.
      process_index, process_count: as of `longjax.data.Batches`.
      loader: 'grain' reads ahead in a thread; 'numpy' does the same work, in
        the same order, when asked.
      identity: what JSON can hold and the batches depend on besides, such as
        a digest of the examples.

    Raises:
      ValueError: an argument out of range, or no examples.
      ModuleNotFoundError: loader='grain' where grain is not installed.
    """
    if not len(lengths):
      raise ValueError('there are no examples to make batches of')
    check_share(batch_size, process_index, process_count, seed, loader)
    lengths = np.asarray(lengths, np.int64)
    source = _Batches(
      bucket_of(lengths, buckets),
      collate,
      tuple(buckets),
      batch_size,
      seed if shuffle else None,
      (process_index, process_count),
    )
    self.examples_per_epoch = len(lengths)
    self.batches_per_epoch = source.per_epoch
    self._taken = 0
    self._identity = {
      'examples': len(lengths),
      'crc32': zlib.crc32(lengths.tobytes()),
      'buckets': list(buckets),
      'batch_size': batch_size,
      'seed': seed,
      'shuffle': bool(shuffle),
      'identity': identity,
    }
    make = {'grain': _Ahead, 'numpy': _WhenAsked}[loader]
    self._stream = make(source)

  def __next__(self):
    batch = next(self._stream)
    self._taken += 1
    return batch

  @property
  def epoch(self) -> int:
    """How many whole epochs have been yielded."""
    return self._taken // self.batches_per_epoch


class _Batches:
  """Batch number b of the endless stream, for every b."""

  def __init__(self, bucket, collate, buckets, batch_size, seed, process):
    self._bucket = bucket
    self._collate = collate
    self._buckets = buckets
    self._batch_size = batch_size
    self._seed = seed
    self._process = process
    self.per_epoch = -(-len(bucket) // batch_size)
    # Reading ahead crosses from one epoch to the next.
    self._epoch = functools.lru_cache(maxsize=2)(self._deal)

  def __len__(self) -> int:
    return 2**62 // self.per_epoch * self.per_epoch

  def __getitem__(self, number: int):
    epoch, place = divmod(operator.index(number), self.per_epoch)
    rows, bucket = self._epoch(epoch)
    index, count = self._process
    return self._collate(
      rows[place][index::count], self._buckets[bucket[place]]
    )

  def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows [batches, batch size], bucket [batches]) of an epoch."""
    generator = np.random.default_rng([self._seed or 0, epoch])
    shuffle = self._seed is not None
    count = len(self._bucket)
    order = generator.permutation(count) if shuffle else np.arange(count)
    rows, numbers, left = [], [], order[:0]
    for number in range(len(self._buckets)):
      mine = np.concatenate([left, order[self._bucket[order] == number]])
      whole = len(mine) // self._batch_size * self._batch_size
      rows.append(mine[:whole].reshape(-1, self._batch_size))
      numbers += [number] * len(rows[-1])
      left = mine[whole:]
    if len(left):
      # No longer than what is left needs: a shorter bucket may do.
      fill = np.full(self._batch_size - len(left), FILLER)
      rows.append(np.concatenate([left, fill])[None])
      numbers.append(self._bucket[left].max())
    rows, numbers = np.concatenate(rows), np.array(numbers)
    places = np.arange(len(rows))
    if shuffle:
      places = generator.permutation(len(rows))
    return rows[places], numbers[places]


class _WhenAsked:
  def __init__(self, source):
    self._source = source
    self.seek(0)

  def seek(self, taken):
    self._next = taken

  def __next__(self):
    self._next += 1
    return self._source[self._next - 1]


class _Ahead:
  """The same out of grain, which makes batches ahead in a thread."""

  def __init__(self, source):
    grain = optional.require('grain', "loader='grain'")
    self._iterator = iter(
      grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
      )
    )

  def seek(self, taken):
    self._iterator.set_state({'next_index': taken})

  def __next__(self):
    return next(self._iterator)
