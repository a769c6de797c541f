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
  assert s.description == '45 x, split by document (41/2/2)'


def test_few_documents_are_split_by_position():
  s = splits.by_document([b'a' * 50, b'b' * 48], 'x')
  assert (
    s.train + s.validation + s.test == b'a' * 50 + b'\n' + b'b' * 48 + b'\n'
  )
  assert len(s.test) == 5
  assert 'by position' in s.description


def test_short_documents_are_left_out_before_the_split():
  documents = [bytes([65 + i % 26]) * (i + 1) + b'\n' for i in range(45)]
  s = splits.by_document(documents, 'x', min_bytes=20)
  assert s == splits.by_document(documents[18:], 'x')._replace(
    description='27 x of 20 bytes or more, split by document (25/1/1)'
  )


@pytest.mark.parametrize(
  ('min_bytes', 'message'),
  [(-1, 'not be negative, got -1'), (9, 'no document has 9.*longest.*has 8')],
)
def test_a_least_size_that_cannot_be(min_bytes, message):
  with pytest.raises(ValueError, match=message):
    splits.by_document([b'12345678', b'123'], 'x', min_bytes)
