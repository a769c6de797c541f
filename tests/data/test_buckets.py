import json

import numpy as np
import pytest

from longjax.data import buckets as lib
from longjax.data.buckets import FILLER, BucketedBatches

BUCKETS = (4, 8, 16)
LENGTHS = np.random.default_rng(0).integers(1, 17, size=37)


def collate(rows, length):
  return {'rows': rows.copy(), 'length': length}


def make(lengths=LENGTHS, batch_size=4, seed=0, **options):
  return BucketedBatches(
    lengths,
    collate,
    buckets=BUCKETS,
    batch_size=batch_size,
    seed=seed,
    **{'loader': 'numpy', **options},
  )


def take(batches, count):
  return [next(batches) for _ in range(count)]


def same(a, b):
  return all(
    x['length'] == y['length'] and (x['rows'] == y['rows']).all()
    for x, y in zip(a, b, strict=True)
  )


@pytest.mark.parametrize('loader', ['grain', 'numpy'])
@pytest.mark.parametrize('batch_size', [1, 4, 37, 50])
def test_an_epoch_has_every_example_once(loader, batch_size):
  batches = make(batch_size=batch_size, loader=loader)
  assert batches.batches_per_epoch == -(-37 // batch_size)
  orders = []
  for epoch in range(2):
    rows = []
    for batch in take(batches, batches.batches_per_epoch):
      assert len(batch['rows']) == batch_size
      assert batch['length'] in BUCKETS
      real = batch['rows'][batch['rows'] != FILLER]
      assert (LENGTHS[real] <= batch['length']).all()
      rows.extend(real)
    assert sorted(rows) == list(range(37))
    assert batches.epoch == epoch + 1
    orders.append(rows)
  assert orders[0] != orders[1]


def test_batches_are_as_short_as_their_bucket():
  """At most one batch of each bucket has examples of shorter ones."""
  for batch in take(make(), 10):
    shorter = [length for length in BUCKETS if length < batch['length']]
    rows = batch['rows'][batch['rows'] != FILLER]
    if shorter and (LENGTHS[rows] <= shorter[-1]).any():
      # Such a batch also has an example that needs its length, or is the last.
      assert (LENGTHS[rows] > shorter[-1]).any() or FILLER in batch['rows']
  lengths = np.repeat([3, 7, 16], 8)
  found = [b['length'] for b in take(make(lengths), 6)]
  assert sorted(found) == [4, 4, 8, 8, 16, 16]
  # A short last batch is no longer than it must be.
  assert next(make([2, 3], shuffle=False))['length'] == 4


def test_in_order_without_shuffling():
  lengths = np.array([3, 16, 4, 5, 2, 1])
  found = take(make(lengths, batch_size=2, shuffle=False), 3)
  assert [b['rows'].tolist() for b in found] == [[0, 2], [4, 5], [3, 1]]
  assert [b['length'] for b in found] == [4, 4, 16]


@pytest.mark.parametrize('loader', ['grain', 'numpy'])
def test_a_resumed_iterator_goes_on_exactly(loader):
  whole = make(loader=loader)
  take(whole, 13)
  state = json.loads(json.dumps(whole.get_state()))
  wanted = take(whole, 15)
  resumed = make(loader=loader)
  resumed.set_state(state)
  assert resumed.epoch == 1
  assert same(take(resumed, 15), wanted)


def test_both_loaders_make_the_same_batches():
  assert same(take(make(loader='grain'), 25), take(make(), 25))


def test_processes_share_each_batch():
  whole = take(make(), 12)
  parts = [take(make(process_index=p, process_count=2), 12) for p in range(2)]
  for batch, *rows in zip(whole, *parts, strict=True):
    assert {r['length'] for r in rows} == {batch['length']}
    together = np.stack([r['rows'] for r in rows], axis=1).reshape(-1)
    np.testing.assert_array_equal(together, batch['rows'])


def test_seeds_differ():
  assert not same(take(make(seed=0), 9), take(make(seed=1), 9))


@pytest.mark.parametrize(
  'changes',
  [
    dict(lengths=LENGTHS[:-1]),
    dict(lengths=LENGTHS[::-1]),
    dict(batch_size=5),
    dict(seed=1),
    dict(identity='another text'),
  ],
)
def test_a_state_of_another_stream_is_refused(changes):
  state = make().get_state()
  with pytest.raises(ValueError, match='they are not the same stream'):
    make(**changes).set_state(state)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(lengths=[]), 'no examples'),
    (dict(lengths=[1, 17]), 'a sequence of 17 is longer than the last bucket'),
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(process_count=3), 'batch_size=4 does not divide over 3'),
    (dict(process_index=1), r'process_index=1 is not in \[0, 1\)'),
    (dict(seed=-1), 'seed=-1 must not be negative'),
    (dict(loader='torch'), "loader='torch' is not one of grain, numpy"),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


@pytest.mark.parametrize(
  ('buckets', 'message'),
  [((), 'at least 1'), ((0, 4), 'at least 1'), ((4, 4), 'must grow')],
)
def test_buckets_must_grow(buckets, message):
  with pytest.raises(ValueError, match=message):
    lib.bucket_of([1], buckets)
