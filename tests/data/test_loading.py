import json
import logging
import lzma
import subprocess
import sys

import numpy as np
import pytest

from longjax import data
from longjax.data import optional, python_source, wikipedia

TEXT = b'the quick brown fox jumps over the lazy dog ' * 50


def _raw(corpus):
  return corpus.decode(
    np.concatenate([corpus.train, corpus.validation, corpus.test])
  )


class TestWikipedia:
  """Local files in place of the official enwik8 and text8."""

  def test_a_prefix_is_split_in_proportion_and_says_so(self, tmp_path, caplog):
    path = tmp_path / 'some.xz'
    path.write_bytes(lzma.compress(TEXT))
    with caplog.at_level(logging.INFO):
      corpus = data.load('enwik8', path)
    assert _raw(corpus) == TEXT
    assert len(corpus.test) == len(TEXT) // 20
    for said in (corpus.description, caplog.text):
      assert '2,200 bytes, a prefix or other text and not the full' in said
      assert 'not comparable with published' in said
      assert 'proportional 90/5/5' in said

  def test_vocabularies(self, tmp_path):
    path = tmp_path / 'text'
    path.write_bytes(TEXT)
    assert data.load('enwik8', path).vocab_size == 256
    assert data.load('enwik8', path, vocab='compact').vocab_size == 28
    assert data.load('text8', path).vocab_size == 27
    assert _raw(data.load('text8', path)) == TEXT

  def test_a_symbol_outside_text8_is_named_with_its_place(self, tmp_path):
    path = tmp_path / 'text'
    path.write_bytes(TEXT[:100] + b'!' + TEXT)
    with pytest.raises(
      ValueError, match="b'!' at byte offset 100 of text8 train is outside"
    ):
      data.load('text8', path)

  def test_the_full_set_is_split_in_the_standard_way(self, monkeypatch):
    monkeypatch.setattr(wikipedia, 'HELD_OUT', 100)
    splits = wikipedia.standard(wikipedia.ENWIK8, TEXT)
    assert splits.train == TEXT[:-200]
    assert splits.validation == TEXT[-200:-100]
    assert splits.test == TEXT[-100:]

  def test_a_full_size_file_of_another_md5_is_refused(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(wikipedia, 'FULL_SIZE', len(TEXT))
    path = tmp_path / 'text'
    path.write_bytes(TEXT)
    with pytest.raises(
      ValueError,
      match='text is not enwik8: its 2,200 bytes have md5 [0-9a-f]{32},'
      ' expected a1fa5ffddb56f4953e226637dabbb36a',
    ):
      data.load('enwik8', path)

  def test_digests_are_of_the_bytes_whatever_the_vocabulary(self, tmp_path):
    path = tmp_path / 'text'
    path.write_bytes(TEXT)
    corpora = [data.load('text8', path, vocab=v) for v in ('bytes', 'letters')]
    assert corpora[0].sha256 == corpora[1].sha256
    assert len(set(corpora[0].sha256.values())) == 3

  def test_real_prefixes(self, shared_data):
    folder = shared_data / 'wikipedia'
    enwik8 = data.load('enwik8', folder / 'enwik8.first4154327.xz')
    assert enwik8.decode(enwik8.train[:10]) == b'<mediawiki'
    text8 = data.load('text8', folder / 'text8.first12549840.xz')
    assert text8.decode(text8.train[:10]) == b' anarchism'
    assert (len(text8.train), len(text8.test)) == (11_294_856, 627_492)


class TestPythonSource:
  def test_it_is_there_and_always_the_same(self):
    first, second = (data.load('python_source') for _ in range(2))
    assert first.sha256 == second.sha256
    assert first.vocab_size == 256
    sizes = [len(first.train), len(first.validation), len(first.test)]
    assert sum(sizes) > 5_000_000
    assert 0.85 < sizes[0] / sum(sizes) < 0.96
    assert min(sizes) > 200_000
    assert 'files of the standard library of CPython 3.' in first.description

  def test_what_is_taken(self, tmp_path):
    wanted = ['a.py', 'json/decoder.py', 'json/encoder.py']
    unwanted = [
      '_sysconfigdata_x.py',
      'b.txt',
      'config-3.12-x/c.py',
      'json/tests/t.py',
      'site-packages/p.py',
      'test/t.py',
    ]
    for name in reversed(wanted + unwanted):
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()
    found = [p.relative_to(tmp_path) for p in python_source.paths(tmp_path)]
    assert [path.as_posix() for path in found] == wanted

  def test_a_python_without_sources_says_so(self, tmp_path, monkeypatch):
    monkeypatch.setattr(
      python_source.sysconfig, 'get_path', lambda name: str(tmp_path)
    )
    with pytest.raises(FileNotFoundError, match='holds 0 .py files.*no source'):
      data.load('python_source')

  def test_it_takes_no_path(self, tmp_path):
    with pytest.raises(ValueError, match='python_source takes no path'):
      data.load('python_source', tmp_path)


class TestText:
  def test_a_file(self, tmp_path):
    path = tmp_path / 'book.txt'
    path.write_bytes(TEXT)
    corpus = data.load('text', path)
    assert _raw(corpus) == TEXT
    assert corpus.description.startswith('book.txt: 2,200 bytes, proportional')

  def test_a_folder_is_read_in_the_order_of_its_paths(self, tmp_path):
    for name in ('b/2.txt', 'a.txt', 'b/1.txt', '.hidden', '.git/x'):
      path = tmp_path / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(f'{name}\n')
    corpus = data.load('text', tmp_path)
    assert _raw(corpus) == b'a.txt\nb/1.txt\nb/2.txt\n'
    assert '3 files of the folder' in corpus.description

  def test_a_folder_of_many_files_is_split_by_file(self, tmp_path):
    for i in range(20):
      (tmp_path / f'{i:02}').write_bytes(b'%02d\n' % i)
    corpus = data.load('text', tmp_path)
    assert corpus.decode(corpus.validation) == b'09\n'
    assert corpus.decode(corpus.test) == b'19\n'

  def test_an_empty_folder_is_refused(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='no files in the folder'):
      data.load('text', tmp_path)

  def test_an_empty_file_is_refused(self, tmp_path):
    (tmp_path / 'empty').touch()
    with pytest.raises(ValueError, match='empty is empty'):
      data.load('text', tmp_path / 'empty')

  def test_a_missing_file_is_named(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file: .*absent'):
      data.load('text', tmp_path / 'absent')

  def test_a_path_is_wanted(self):
    with pytest.raises(ValueError, match="name='text' wants a path"):
      data.load('text')


class TestPg19:
  def _book(self, i):
    return {'id': i, 'title': 'T', 'year': 1900, 'text': f'Book {i}.'}

  def _write(self, path, lines):
    path.write_bytes(lzma.compress('\n'.join(lines).encode()))
    return path

  def test_books_are_kept_whole(self, tmp_path):
    lines = [json.dumps(self._book(i)) for i in range(20)]
    corpus = data.load('pg19', self._write(tmp_path / 'b.jsonl.xz', lines))
    assert corpus.decode(corpus.validation) == b'Book 9.\n'
    assert corpus.decode(corpus.test) == b'Book 19.\n'
    assert '20 books of b.jsonl.xz, not the official' in corpus.description

  @pytest.mark.parametrize(
    ('line', 'message'),
    [('{', 'line 2 is not JSON'), ('{"id": 1}', "line 2 has no 'text'")],
  )
  def test_a_bad_line_is_named(self, tmp_path, line, message):
    lines = [json.dumps(self._book(0)), line]
    with pytest.raises(ValueError, match=message):
      data.load('pg19', self._write(tmp_path / 'b.jsonl.xz', lines))

  def test_real_books(self, shared_data):
    corpus = data.load('pg19', shared_data / 'pg19' / 'test28.jsonl.xz')
    assert 'split by document (26/1/1)' in corpus.description
    assert len(corpus.train) > 10_000_000


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(name='wiki'), "'wiki' is not one of enwik8, text8, python_source"),
    (dict(name='python_source', vocab='words'), "'words' is not one of bytes"),
    (dict(name='text', path='x', data_dir='d'), "data_dir='d' has no use"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.load(**arguments)


def test_a_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(
    ModuleNotFoundError,
    match=r'enwik8 without a path needs tensorflow_datasets, .*longjax\[data\]',
  ):
    data.load('enwik8')
  with pytest.raises(ModuleNotFoundError, match='python_source from data_dir'):
    data.load('python_source', data_dir='anywhere')


def test_a_package_that_is_itself_broken_is_not_called_missing(
  tmp_path, monkeypatch
):
  (tmp_path / 'broken_package.py').write_text('import absent_dependency')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="named 'absent_dependency'"):
    optional.require('broken_package', 'this')


def test_every_name_is_loaded_by_numpy_alone(tmp_path):
  """As on a machine with no grain, tfds, pooch (or JAX) installed."""
  (tmp_path / 'text').write_bytes(TEXT)
  (tmp_path / 'books').write_text(json.dumps({'text': TEXT.decode()}))
  program = f"""
import sys
for name in ('jax', 'flax', 'grain', 'tensorflow_datasets', 'pooch', 'tqdm',
             'absl', 'ml_collections', 'optax', 'orbax'):
  sys.modules[name] = None  # importing it now raises ModuleNotFoundError
from longjax import data
data.load('python_source')
for name, path in [('enwik8', 'text'), ('text8', 'text'), ('text', 'text'),
                   ('pg19', 'books')]:
  corpus = data.load(name, {str(tmp_path)!r} + '/' + path)
  next(data.Batches(corpus.train, 8, 4, seed=0, loader='numpy'))
try:
  data.Batches(corpus.train, 8, 4, seed=0, loader='grain')
except ModuleNotFoundError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.startswith("loader='grain' needs grain, which is not")


def test_short_documents_are_left_out(tmp_path):
  for number in range(1, 4):
    (tmp_path / f'{number}.txt').write_bytes(b'%d' % number * 100 * number)
  corpus = data.load('text', tmp_path, min_document_bytes=200)
  assert corpus.description.startswith('2 files of the folder')
  assert set(corpus.train) == {ord('2'), ord('3'), ord('\n')}


def test_whose_documents_can_be_left_out(tmp_path):
  file = tmp_path / 'a.txt'
  file.write_bytes(b'x' * 100)
  with pytest.raises(ValueError, match=r'a\.txt is one file, not a folder'):
    data.load('text', file, min_document_bytes=5)
  with pytest.raises(ValueError, match='min_document_bytes=5.*not of text8'):
    data.load('text8', file, min_document_bytes=5)
