"""The prepared sets, and downloads from a server of this test's own."""

import dataclasses
import functools
import hashlib
import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from longjax import data
from longjax.data import builders, download, pg19, wikipedia

TEXT = b'the quick brown fox jumps over the lazy dog ' * 50


def _zip(text):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('enwik8', text)
  return buffer.getvalue()


class _Server(http.server.SimpleHTTPRequestHandler):
  """Serves a folder; the file called cut.zip breaks off half-way."""

  requests = 0

  def do_GET(self):
    type(self).requests += 1
    super().do_GET()

  def copyfile(self, source, output):
    body = source.read()
    half = self.path == '/cut.zip'
    output.write(body[: len(body) // 2] if half else body)

  def log_message(self, *args):
    pass


@pytest.fixture
def served(tmp_path):
  """A folder and the address at which its files are served."""
  folder = tmp_path / 'served'
  folder.mkdir()
  _Server.requests = 0
  handler = functools.partial(_Server, directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()


@pytest.fixture
def official(served, monkeypatch):
  """A small 'official' enwik8, downloaded from the test's own server."""
  folder, address = served
  (folder / 'enwik8.zip').write_bytes(_zip(TEXT))
  source = wikipedia.Source(
    'enwik8', f'{address}/enwik8.zip', hashlib.md5(TEXT).hexdigest()
  )
  monkeypatch.setattr(wikipedia, 'FULL_SIZE', len(TEXT))
  monkeypatch.setattr(wikipedia, 'HELD_OUT', 100)
  monkeypatch.setattr(builders.Enwik8, 'SOURCE', source)
  return source


def test_the_official_set_is_downloaded_and_prepared_once(official, tmp_path):
  first = data.load('enwik8', data_dir=tmp_path / 'tfds')
  second = data.load('enwik8', data_dir=tmp_path / 'tfds')
  assert _Server.requests == 1
  assert first.sha256 == second.sha256
  assert first.description == 'enwik8: the full set, standard 90M/5M/5M split'
  assert first.decode(first.test) == TEXT[-100:]
  assert first.decode(first.validation) == TEXT[-200:-100]
  assert first.decode(first.train) == TEXT[:-200]


def test_the_official_sources():
  assert wikipedia.ENWIK8.url.endswith('/enwik8.zip')
  assert wikipedia.TEXT8.md5 == '3bea1919949baf155f99411df5fada7e'
  assert builders.Text8.SOURCE is wikipedia.TEXT8


def test_a_download_of_another_md5_is_refused_and_removed(
  official, tmp_path, monkeypatch
):
  wrong = dataclasses.replace(official, md5='0' * 32)
  monkeypatch.setattr(builders.Enwik8, 'SOURCE', wrong)
  with pytest.raises(
    ValueError, match=f'have md5 {official.md5}, expected 0{{32}}.*removed'
  ):
    data.load('enwik8', data_dir=tmp_path / 'tfds')
  assert not list((tmp_path / 'tfds').rglob('enwik8.zip'))
  # ... and nothing half-prepared stands in the way of the next attempt.
  monkeypatch.setattr(builders.Enwik8, 'SOURCE', official)
  assert data.load('enwik8', data_dir=tmp_path / 'tfds').vocab_size == 256


def test_a_truncated_archive_is_refused_and_removed(official, served, tmp_path):
  (served[0] / 'enwik8.zip').write_bytes(_zip(TEXT)[:-30])
  with pytest.raises(ValueError, match='not a whole .zip.*was removed'):
    wikipedia.fetch(official, tmp_path)
  assert not (tmp_path / 'enwik8.zip').exists()


def test_a_transfer_that_breaks_off_leaves_no_file(served, tmp_path):
  folder, address = served
  (folder / 'cut.zip').write_bytes(bytes(100_000))
  with pytest.raises(ConnectionError, match='cannot download .*cut.zip to'):
    download.fetch(f'{address}/cut.zip', tmp_path / 'downloads')
  assert not (tmp_path / 'downloads' / 'cut.zip').exists()


def test_without_a_network_it_says_what_to_do(tmp_path):
  # Port 9 of this machine: nothing answers.
  with pytest.raises(ConnectionError) as error:
    download.fetch('http://127.0.0.1:9/enwik8.zip', tmp_path)
  assert 'copy enwik8.zip here by other means and pass' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_file_the_server_lacks(served, tmp_path):
  with pytest.raises(ConnectionError, match='HTTPError: 404'):
    download.fetch(f'{served[1]}/absent.zip', tmp_path)


@pytest.mark.parametrize('name', ['enwik8', 'text8'])
def test_a_prepared_file_equals_the_file(name, tmp_path, monkeypatch):
  monkeypatch.setattr(builders, '_RECORD_BYTES', 64)
  path = tmp_path / 'some'
  path.write_bytes(TEXT)
  plain = data.load(name, path)
  prepared = data.load(name, path, data_dir=tmp_path / 'tfds')
  assert prepared.sha256 == plain.sha256
  assert prepared.description == plain.description
  np.testing.assert_array_equal(prepared.train, plain.train)


def test_two_files_are_two_sets(tmp_path):
  for text in (TEXT, TEXT[::-1]):
    path = tmp_path / 'same_name'
    path.write_bytes(text)
    corpus = data.load('enwik8', path, data_dir=tmp_path / 'tfds')
    assert corpus.decode(corpus.train) == text[: len(corpus.train)]
  assert len(list((tmp_path / 'tfds' / 'enwik8').glob('file_*'))) == 2


def test_the_standard_library_prepared(tmp_path):
  plain = data.load('python_source')
  prepared = data.load('python_source', data_dir=tmp_path)
  assert prepared.sha256 == plain.sha256
  assert prepared.description == plain.description


def test_a_damaged_prepared_set_is_refused(tmp_path):
  path = tmp_path / 'some'
  path.write_bytes(TEXT)
  builder = builders.Enwik8(path=path, data_dir=tmp_path / 'tfds')
  builder.download_and_prepare()
  builder.info.metadata['sha256']['validation'] = '0' * 64
  with pytest.raises(ValueError, match='its validation split has sha256'):
    builders.read(builder)


def test_tfds_knows_the_builders_by_name(tmp_path):
  builder = tfds.builder('python_source', data_dir=tmp_path)
  assert isinstance(builder, builders.PythonSource)


def test_pg19s_own_download_needs_tensorflow(tmp_path):
  with pytest.raises(
    ModuleNotFoundError, match=r'pg19 needs tensorflow, .*longjax\[tfds\]'
  ):
    pg19.read_prepared(tmp_path)
