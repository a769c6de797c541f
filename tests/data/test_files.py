import gzip
import lzma
import zipfile

import pytest

from longjax.data import files

TEXT = b'a text of some length\n' * 1000


def _write(path, data=TEXT):
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('inside', data)
  elif path.suffix == '.xz':
    path.write_bytes(lzma.compress(data))
  elif path.suffix == '.gz':
    path.write_bytes(gzip.compress(data))
  else:
    path.write_bytes(data)
  return path


@pytest.mark.parametrize('name', ['t', 't.txt', 't.zip', 't.xz', 't.gz'])
def test_every_form_reads_the_same(tmp_path, name):
  assert files.read_bytes(_write(tmp_path / name)) == TEXT


@pytest.mark.parametrize('name', ['t.zip', 't.xz', 't.gz'])
def test_a_truncated_archive_is_refused(tmp_path, name):
  path = _write(tmp_path / name)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match=rf'{name} is not a whole \.') as error:
    files.read_bytes(path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['t.zip', 't.xz', 't.gz'])
def test_a_misnamed_file_is_refused(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(TEXT)
  with pytest.raises(ValueError, match='is not a whole'):
    files.read_bytes(path)


@pytest.mark.parametrize('name', ['t.txt', 't.zip', 't.xz', 't.gz'])
def test_an_empty_file_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match=f'{name} is empty'):
    files.read_bytes(_write(tmp_path / name, b''))


def test_an_archive_of_two_files_is_refused(tmp_path):
  path = _write(tmp_path / 't.zip')
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('second', 'more')
  with pytest.raises(ValueError, match='holds 2 files; one is wanted'):
    files.read_bytes(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file: .*absent'):
    files.read_bytes(tmp_path / 'absent')


def test_a_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match='is a folder'):
    files.read_bytes(tmp_path)


def test_join_ends_every_document_with_a_line_end():
  assert files.join([b'a', b'b\n', b'']) == b'a\nb\n\n'
