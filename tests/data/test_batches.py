import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longjax.data import Batches

LOADERS = ['grain', 'numpy']

both_loaders = pytest.mark.parametrize('loader', LOADERS)


def _stream(count, *, processes=1, **arguments):
  """`count` global batches of `processes` iterators, [processes, local, L]."""
  parts = [
    Batches(process_index=p, process_count=processes, **arguments)
    for p in range(processes)
  ]
  return [np.stack([next(p)['tokens'] for p in parts]) for _ in range(count)]


def _numbers(batches, length):
  """The numbers of the sequences, in the order of the global stream.

  The tokens are 0, 1, 2, ..., so that a sequence's first says which it is;
  process p of P holds places p, p + P, ... of a batch.
  """
  return np.concatenate([b[..., 0].T.reshape(-1) // length for b in batches])


@both_loaders
@settings(max_examples=25)
@given(
  extra=st.integers(0, 40),
  length=st.integers(1, 9),
  local=st.integers(1, 5),
  processes=st.integers(1, 3),
  seed=st.integers(0, 2**31),
  shuffle=st.booleans(),
)
def test_every_epoch_has_every_sequence_once(
  loader, extra, length, local, processes, seed, shuffle
):
  tokens = np.arange(length + 1 + extra)
  arguments = dict(
    tokens=tokens,
    length=length,
    batch_size=local * processes,
    seed=seed,
    shuffle=shuffle,
    loader=loader,
  )
  n = Batches(**arguments).sequences_per_epoch
  assert n == (len(tokens) - 1) // length
  count = 3 * n // (local * processes) + 1
  batches = _stream(count, processes=processes, **arguments)
  for row in np.concatenate([b.reshape(-1, length + 1) for b in batches]):
    np.testing.assert_array_equal(row, tokens[row[0] : row[0] + length + 1])
    assert row[0] % length == 0
  numbers = _numbers(batches, length)
  for epoch in range(3):
    order = numbers[epoch * n : (epoch + 1) * n]
    if not shuffle:
      np.testing.assert_array_equal(order, np.arange(n))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


@both_loaders
def test_the_stream_does_not_depend_on_the_number_of_processes(loader):
  arguments = dict(
    tokens=np.arange(701), length=7, batch_size=12, seed=5, loader=loader
  )
  orders = [
    _numbers(_stream(20, processes=p, **arguments), 7) for p in (1, 2, 3, 12)
  ]
  for order in orders[1:]:
    np.testing.assert_array_equal(order, orders[0])


@both_loaders
def test_orders_differ_between_epochs_and_between_seeds(loader):
  def order(seed):
    batches = _stream(
      2,
      tokens=np.arange(501),
      length=5,
      batch_size=100,
      seed=seed,
      loader=loader,
    )
    return [_numbers([b], 5).tolist() for b in batches]

  orders = order(0) + order(1)
  assert len({tuple(o) for o in orders}) == 4
  assert order(0) == order(0)


@both_loaders
@pytest.mark.parametrize('taken', [0, 1, 4, 23])
def test_resuming_is_exact(loader, taken):
  """At the start, in the middle of an epoch, and several epochs on."""

  def make():
    return Batches(
      np.arange(301), 10, 8, seed=3, process_count=2, loader=loader
    )

  whole = make()
  for _ in range(taken):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  epoch = whole.epoch
  rest = [next(whole)['tokens'] for _ in range(9)]

  resumed = make()
  next(resumed)
  resumed.set_state(state)
  assert resumed.epoch == epoch == taken * 8 // 30
  for expected in rest:
    np.testing.assert_array_equal(next(resumed)['tokens'], expected)
  # ... and going back, on an iterator that has read on.
  resumed.set_state(state)
  np.testing.assert_array_equal(next(resumed)['tokens'], rest[0])
  assert resumed.get_state()['batches_taken'] == taken + 1


@both_loaders
def test_resuming_on_another_number_of_processes_is_exact(loader):
  arguments = dict(
    tokens=np.arange(301), length=10, batch_size=8, seed=3, loader=loader
  )
  alone = Batches(**arguments)
  for _ in range(5):
    next(alone)
  pair = [
    Batches(**arguments, process_index=p, process_count=2) for p in (0, 1)
  ]
  for part in pair:
    part.set_state(alone.get_state())
  both = np.stack([next(p)['tokens'] for p in pair], axis=1).reshape(8, 11)
  np.testing.assert_array_equal(both, next(alone)['tokens'])


@pytest.mark.parametrize('loader', LOADERS)
def test_parts_of_sequences_overlap_by_the_token_between_them(loader):
  arguments = dict(
    tokens=np.arange(97), length=12, batch_size=4, seed=1, loader=loader
  )
  whole = next(Batches(**arguments))['tokens']
  parts = [Batches(**arguments, part=p, parts=3) for p in range(3)]
  for number, part in enumerate(parts):
    np.testing.assert_array_equal(
      next(part)['tokens'], whole[:, 4 * number : 4 * number + 5]
    )
  # A place in the data is that of any part.
  assert parts[0].get_state() == parts[2].get_state()


@pytest.mark.parametrize(
  ('changed', 'name'),
  [
    (dict(tokens=np.arange(1, 302)), 'crc32'),
    (dict(tokens=np.arange(311)), 'num_tokens'),
    (dict(length=11), 'length'),
    (dict(batch_size=4), 'batch_size'),
    (dict(seed=4), 'seed'),
    (dict(shuffle=False), 'shuffle'),
    (dict(loader='grain'), 'loader'),
  ],
)
def test_a_state_of_another_stream_is_refused(changed, name):
  arguments = dict(
    tokens=np.arange(301), length=10, batch_size=8, seed=3, loader='numpy'
  )
  state = Batches(**arguments).get_state()
  with pytest.raises(ValueError, match=f'the saved place .* has {name}='):
    Batches(**{**arguments, **changed}).set_state(state)


@both_loaders
def test_what_is_yielded(loader):
  tokens = np.arange(100, dtype=np.uint8)
  batches = Batches(tokens, 10, 6, seed=0, process_count=2, loader=loader)
  batch = next(batches)
  assert list(batch) == ['tokens']
  assert batch['tokens'].shape == (3, 11)
  assert batch['tokens'].dtype == np.int32
  assert (batches.sequences_per_epoch, batches.dropped_tokens) == (9, 9)


@both_loaders
def test_a_text_of_one_sequence(loader):
  batches = Batches(np.arange(8), 7, 2, seed=0, loader=loader)
  np.testing.assert_array_equal(
    next(batches)['tokens'], [np.arange(8), np.arange(8)]
  )
  assert batches.epoch == 2


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (dict(tokens=np.arange(10)), '10 tokens hold no sequence of length 10: at'),
    (dict(tokens=np.zeros(0, int)), '0 tokens hold no sequence'),
    (dict(tokens=np.zeros((2, 20), int)), r'one-dimensional.*int64\[2, 20\]'),
    (dict(tokens=np.zeros(20)), r'array of integers, not float64\[20\]'),
    (dict(length=0), 'length=0 must be at least 1'),
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(process_count=3), 'batch_size=8 does not divide over 3 processes'),
    (dict(parts=3), 'part=0 is none of parts=3 that length=10 has'),
    (dict(parts=2, part=2), 'part=2 is none of parts=2 that length=10 has'),
    (dict(process_index=1), r'process_index=1 is not in \[0, 1\)'),
    (dict(seed=-1), 'seed=-1 must not be negative'),
    (dict(loader='torch'), "loader='torch' is not one of grain, numpy"),
  ],
)
def test_bad_arguments_are_named(changed, message):
  arguments = dict(tokens=np.arange(100), length=10, batch_size=8, seed=0)
  with pytest.raises(ValueError, match=message):
    Batches(**{**arguments, **changed})
