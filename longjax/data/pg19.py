"""PG-19: books from Project Gutenberg published before 1919.

Either a local file of JSON lines, {"id", "title", "year", "text"} a book, or
the catalogue's own `pg19`, which keeps its official splits.
"""

import pathlib

from longjax.data import files, jsonl, optional
from longjax.data import splits as splits_lib


def read(path) -> splits_lib.Splits:
  """Splits, by book, of a local .jsonl, .jsonl.xz or .jsonl.gz file.

  Raises:
    FileNotFoundError, ValueError: see `files.read_bytes`; ValueError also for
      a line that is no book, naming the line.
  """
  path = pathlib.Path(path)
  books = [_text(book, where) for where, book in jsonl.read(path)]
  if not books:
    raise ValueError(f'{path} holds no books')
  return splits_lib.by_document(
    books,
    f'books of {path.name}, not the official PG-19 splits'
    ' (figures are not comparable with published ones)',
  )


def read_prepared(data_dir=None) -> splits_lib.Splits:
  """The official splits from tensorflow-datasets, about 11 GB in memory.

  Args:
    data_dir: where tensorflow-datasets keeps its sets; None is its default.

  Raises:
    ModuleNotFoundError: tensorflow-datasets is not installed, or the set is
      not prepared yet and TensorFlow, with which the catalogue downloads, is
      not installed.
  """
  tfds = optional.require('tensorflow_datasets', 'pg19 without a path')
  builder = tfds.builder('pg19', data_dir=data_dir, file_format='array_record')
  if not builder.is_prepared():
    optional.require(
      'tensorflow', "the catalogue's own download of pg19", extra='tfds'
    )
    builder.download_and_prepare()
  return splits_lib.Splits(
    *(
      files.join(
        book['book_text'] for book in builder.as_data_source(split=name)
      )
      for name in splits_lib.NAMES
    ),
    description='pg19: the full set, its official splits',
  )


def _text(book: dict, where: str) -> bytes:
  if not isinstance(book.get('text'), str):
    raise ValueError(
      f"{where} has no 'text'; a book is {{id, title, year, text}}"
    )
  return book['text'].encode()
