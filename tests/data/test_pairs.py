import numpy as np
import pytest

from longjax.data import pairs as lib
from longjax.data.buckets import FILLER
from longjax.data.ragged import Ragged, RaggedWriter

SPECIAL = lib.Special(bos=0, pad=1, eos=2, start=9)


@pytest.fixture
def ragged(tmp_path):
  def make(name, *rows):
    with RaggedWriter(tmp_path / name, np.uint8) as writer:
      for row in rows:
        writer.append(row)
    return Ragged(tmp_path / name, np.uint8)

  return make


def test_a_batch_of_pairs(ragged):
  pairs = lib.Pairs(
    ragged('s', [11, 12, 13, 14, 15], [16]), ragged('t', [21], [22, 23, 24])
  )
  assert pairs.lengths.tolist() == [5, 1]
  batch = lib.collate(pairs, [1, FILLER, 0], 6, 4, SPECIAL)
  assert batch['tokens'].tolist() == [
    [0, 16, 2, 1, 1, 1],
    [0, 2, 1, 1, 1, 1],
    [0, 11, 12, 13, 14, 2],  # cut off
  ]
  assert batch['labels'].tolist() == [[0, 22, 23, 2], [1] * 4, [0, 21, 2, 1]]
  assert batch['decoder_tokens'].tolist() == [
    [9, 0, 22, 23],
    [9, 1, 1, 1],
    [9, 0, 21, 2],
  ]
  assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}


def test_another_papers_text(ragged):
  pairs = lib.Pairs(
    ragged('s', [11], [12, 13], [14]), ragged('t', [21], [22], [23]), [1, 2, 0]
  )
  assert pairs.lengths.tolist() == [2, 1, 1]
  assert [pairs.source(i).tolist() for i in range(3)] == [[12, 13], [14], [11]]
  assert [pairs.target(i).tolist() for i in range(3)] == [[21], [22], [23]]


def test_openings_are_pieces_without_overlap(ragged):
  texts = ragged('s', [1, 2, 3, 4, 5], [6], [7, 8])
  openings = lib.Spans(texts, 2, 9)
  pieces = [openings.source(i).tolist() for i in range(len(openings.lengths))]
  assert pieces == [[1, 2], [3, 4], [7, 8]]
  assert openings.lengths.tolist() == [2, 2, 2]
  batch = lib.collate(openings, [1], 4, 3, SPECIAL)
  assert batch['tokens'].tolist() == [[0, 3, 4, 2]]
  assert batch['labels'].tolist() == [[0, 3, 2]]
  with pytest.raises(ValueError, match='no text has 6 tokens for a piece'):
    lib.Spans(texts, 6, 1)


def test_spans_begin_anywhere(ragged):
  texts = ragged('s', list(range(100, 160)), list(range(200, 245)))
  spans = lib.Spans(texts, 10, 4, seed=0)
  assert len(spans.lengths) == 6 + 4
  firsts = []
  for number in range(10):
    piece, span = spans.source(number), spans.target(number)
    first = span[0] - piece[0]
    np.testing.assert_array_equal(span, piece[first : first + 4])
    firsts.append(first)
  assert set(firsts) <= set(range(7)) and len(set(firsts)) > 3
  again = lib.Spans(texts, 10, 4, seed=0)
  np.testing.assert_array_equal(again.target(7), spans.target(7))
  other = [lib.Spans(texts, 10, 4, seed=1).target(n)[0] for n in range(10)]
  assert other != [spans.target(n)[0] for n in range(10)]


def test_the_first_papers_only(ragged):
  pairs = lib.Pairs(
    ragged('s', [11], [12], [13]), ragged('t', [2], [3], [4]), count=2
  )
  assert pairs.lengths.tolist() == [1, 1]
