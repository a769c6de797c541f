import lzma

import pytest

from longjax.data import jsonl


def test_objects_and_where_they_stand(tmp_path):
  path = tmp_path / 'a.jsonl.xz'
  path.write_bytes(lzma.compress(b'{"a": 1}\n\n{"b": [2]}'))
  assert list(jsonl.read(path)) == [
    (f'{path} line 1', {'a': 1}),
    (f'{path} line 3', {'b': [2]}),
  ]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"a": ', 'a.jsonl line 2 is not JSON: Expecting value'),
    (b'{"a": "\xff"}', 'a.jsonl line 2 is not JSON'),
    (b'[1]', 'a.jsonl line 2 is a JSON list, not an object'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"a": 1}\n' + line)
  with pytest.raises(ValueError, match=message):
    list(jsonl.read(path))


def test_lines_are_read_one_at_a_time(tmp_path):
  """A mistake far behind does not hinder what stands before it."""
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"a": 1}\n' * 1000 + b'{')
  lines = jsonl.read(path)
  assert next(lines)[1] == {'a': 1}


def test_a_truncated_file_is_refused_in_the_end(tmp_path):
  path = tmp_path / 'a.jsonl.xz'
  path.write_bytes(lzma.compress(b'{"a": 1}\n' * 1000)[:-20])
  with pytest.raises(ValueError, match='not a whole .xz file'):
    list(jsonl.read(path))
