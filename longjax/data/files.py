"""Reading text files whole, compressed or not, with errors that say why."""

import gzip
import lzma
import pathlib
import zipfile
import zlib
from collections.abc import Iterable

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
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; a file is wanted here')
  if not path.exists():
    raise FileNotFoundError(f'no such file: {path}')
  try:
    data = _unpack(path)
  except _DAMAGE as error:
    raise ValueError(
      f'{path} is not a whole {path.suffix} file (truncated?): {error}'
    ) from error
  if not data:
    raise ValueError(f'{path} is empty')
  return data


def _unpack(path: pathlib.Path) -> bytes:
  if path.suffix == '.zip':
    with zipfile.ZipFile(path) as archive:
      names = [i.filename for i in archive.infolist() if not i.is_dir()]
      if len(names) != 1:
        raise ValueError(f'{path} holds {len(names)} files; one is wanted')
      return archive.read(names[0])
  if path.suffix == '.xz':
    with lzma.open(path) as file:
      return file.read()
  if path.suffix == '.gz':
    with gzip.open(path) as file:
      return file.read()
  return path.read_bytes()


def join(documents: Iterable[bytes]) -> bytes:
  """Documents one after another, each ended by a line end."""
  return b''.join(
    text if text.endswith(b'\n') else text + b'\n' for text in documents
  )
