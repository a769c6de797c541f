"""Reading text files whole, compressed or not, with errors that say why."""

import contextlib
import gzip
import lzma
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_DAMAGE = (
  EOFError,
  gzip.BadGzipFile,
  lzma.LZMAError,
  zipfile.BadZipFile,
  zlib.error,
)


def read_bytes(path) -> bytes:
  """The bytes of a file; .zip (of one file), .xz and .gz are unpacked.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a folder, an empty file, or a damaged archive.
  """
  with _opened(path) as file:
    return file.read()


def read_lines(path) -> Iterator[bytes]:
  """The lines of such a file, one at a time: it need not fit into memory.

  Raises:
    As `read_bytes`, once the damage is reached.
  """
  with _opened(path) as file:
    yield from file


@contextlib.contextmanager
def _opened(path) -> Iterator[BinaryIO]:
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; a file is wanted here')
  if not path.exists():
    raise FileNotFoundError(f'no such file: {path}')
  try:
    with _unpacking(path) as file:
      if not file.peek(1):
        raise ValueError(f'{path} is empty')
      yield file
  except _DAMAGE as error:
    raise ValueError(
      f'{path} is not a whole {path.suffix} file (truncated?): {error}'
    ) from error


@contextlib.contextmanager
def _unpacking(path: pathlib.Path):
  if path.suffix == '.zip':
    with zipfile.ZipFile(path) as archive:
      names = [i.filename for i in archive.infolist() if not i.is_dir()]
      if len(names) != 1:
        raise ValueError(f'{path} holds {len(names)} files; one is wanted')
      with archive.open(names[0]) as file:
        yield file
    return
  opened = {'.xz': lzma.open, '.gz': gzip.open}.get(path.suffix, open)
  with opened(path, 'rb') as file:
    yield file


def join(documents: Iterable[bytes]) -> bytes:
  """Documents one after another, each ended by a line end."""
  return b''.join(
    text if text.endswith(b'\n') else text + b'\n' for text in documents
  )
