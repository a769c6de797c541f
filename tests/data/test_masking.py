"""Which tokens are masked, with what, and that it can be done again."""

import dataclasses

import numpy as np
import pytest

from longjax.data.masking import MaskedBatches, Masking, evaluation_batches

MASKING = Masking(begin=0, end=2, pad=1, mask=4, ordinary=np.arange(5, 105))
TOKENS = np.random.default_rng(0).integers(5, 105, 3000)


def batches(**changes):
  options = dict(length=42, batch_size=4, seed=3, loader='numpy') | changes
  return MaskedBatches(TOKENS, masking=MASKING, **options)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def test_eighty_ten_ten():
  tokens = np.random.default_rng(1).integers(5, 105, 100_000)
  hidden, places = MASKING.hide(tokens, np.random.default_rng(2))
  assert len(places) == 15_000 == len(set(places))
  elsewhere = np.delete(np.arange(len(tokens)), places)
  np.testing.assert_array_equal(hidden[elsewhere], tokens[elsewhere])
  masked = (hidden[places] == MASKING.mask).mean()
  same = (hidden[places] == tokens[places]).mean()
  # A random token is the true one once in a hundred times.
  assert masked == pytest.approx(0.8, abs=0.01)
  assert same == pytest.approx(0.101, abs=0.01)
  others = hidden[places][hidden[places] != MASKING.mask]
  assert others.min() >= 5 and others.max() < 105


def test_rows_are_framed_and_hold_what_was_hidden():
  (batch,) = take(batches(), 1)
  assert {name: x.shape for name, x in batch.items()} == {
    'tokens': (4, 42),
    'places': (4, 6),
    'targets': (4, 6),
  }
  assert (batch['tokens'][:, 0] == 0).all()
  assert (batch['tokens'][:, -1] == 2).all()
  assert batch['places'].min() >= 1 and batch['places'].max() <= 40
  # Put back, every row is a stretch of the text.
  np.put_along_axis(batch['tokens'], batch['places'], batch['targets'], axis=1)
  text = TOKENS.astype(np.int32)
  for row in batch['tokens']:
    starts = np.flatnonzero(text[:-40] == row[1])
    assert any((text[s : s + 40] == row[1:-1]).all() for s in starts)


def test_another_choice_each_epoch():
  """A batch of all the text: the same sequences, masked elsewhere."""
  iterator = batches(batch_size=74, length=42)
  first, second = (next(iterator) for _ in range(2))

  def chosen(batch):
    whole = batch['tokens'].copy()
    np.put_along_axis(whole, batch['places'], batch['targets'], axis=1)
    return {
      row.tobytes(): places.tobytes()
      for row, places in zip(whole, batch['places'], strict=True)
    }

  assert iterator.epoch == 2
  a, b = chosen(first), chosen(second)
  assert a.keys() == b.keys()
  assert sum(a[row] != b[row] for row in a) > 60


@pytest.mark.parametrize('loader', ['numpy', 'grain'])
def test_goes_on_exactly(loader):
  if loader == 'grain':
    pytest.importorskip('grain')
  whole = take(batches(loader=loader), 30)
  iterator = batches(loader=loader)
  take(iterator, 11)
  state = iterator.get_state()
  again = batches(loader=loader)
  again.set_state(state)
  assert_equal(take(again, 19), whole[11:])
  with pytest.raises(ValueError, match='saved place in the data has seed=3'):
    batches(loader=loader, seed=4).set_state(state)
  other = batches(loader=loader)
  other._masking = dataclasses.replace(MASKING, share=0.3)
  with pytest.raises(ValueError, match='has share=0.15, this iterator share='):
    other.set_state(state)


def test_processes_share_one_stream():
  whole = take(batches(), 5)
  parts = [take(batches(process_index=p, process_count=2), 5) for p in range(2)]
  for batch, *halves in zip(whole, *parts, strict=True):
    for name, rows in batch.items():
      for p in range(2):
        np.testing.assert_array_equal(halves[p][name], rows[p::2])


def test_evaluation_hides_the_same_whatever_the_length():
  found = []
  for length, batch_size in ((12, 8), (102, 4), (3002, 1)):
    rows = evaluation_batches(TOKENS, length, batch_size, MASKING, seed=5)
    assert {x['tokens'].shape for x in rows} == {(batch_size, length)}
    whole = {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    text, at = [], []
    for row, places, targets, counts in zip(*whole.values(), strict=True):
      at += list(len(text) + places[counts] - 1)
      row[places[counts]] = targets[counts]
      text += list(row[(row != 0) & (row != 1) & (row != 2)])
    assert text == TOKENS.tolist()
    found.append(at)
  assert len(found[0]) == 450
  assert found[0] == found[1] == found[2]


def test_bad_input():
  with pytest.raises(ValueError, match=r'share must lie in \(0, 1\), got 1.5'):
    dataclasses.replace(MASKING, share=1.5)
  with pytest.raises(ValueError, match='length=2 must be at least 3'):
    batches(length=2)
  with pytest.raises(
    ValueError, match='tokens hold no sequence of length 3998'
  ):
    batches(length=4000)
  with pytest.raises(ValueError, match='it has 0 tokens'):
    evaluation_batches(TOKENS[:0], 12, 4, MASKING)
