import pytest

from longjax.data import splits


def test_proportional_is_90_5_5_and_loses_nothing():
  data = bytes(range(256)) * 4
  s = splits.proportional(data, 'x')
  assert s.train + s.validation + s.test == data
  assert (len(s.validation), len(s.test)) == (51, 51)
  assert s.description == 'x, proportional 90/5/5 split by position'


def test_proportional_refuses_an_empty_split():
  with pytest.raises(ValueError, match='19 bytes are too few.*at least 20'):
    splits.proportional(b'x' * 19, 'x')


def test_documents_are_kept_whole():
  documents = [f'document {i}\n'.encode() for i in range(45)]
  s = splits.by_document(documents, 'x')
  assert s.validation == documents[9] + documents[29]
  assert s.test == documents[19] + documents[39]
  assert s.train == b''.join(
    text for i, text in enumerate(documents) if i not in (9, 19, 29, 39)
  )
  assert s.description == 'x, split by document (41/2/2)'


def test_few_documents_are_split_by_position():
  s = splits.by_document([b'a' * 50, b'b' * 48], 'x')
  assert (
    s.train + s.validation + s.test == b'a' * 50 + b'\n' + b'b' * 48 + b'\n'
  )
  assert len(s.test) == 5
  assert 'by position' in s.description
