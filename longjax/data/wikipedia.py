"""enwik8 and text8: 100 MB of Wikipedia, raw and cleaned.

Both are split in the literature's way: the first 90 million bytes train, the
next 5 million validate, the last 5 million test.
"""

import dataclasses
import hashlib
import pathlib

from longjax.data import download, files
from longjax.data import splits as splits_lib

FULL_SIZE = 100_000_000
HELD_OUT = 5_000_000


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a set comes from, and the md5 of its unpacked 100 MB file."""

  name: str
  url: str
  md5: str


ENWIK8 = Source(
  name='enwik8',
  url='http://mattmahoney.net/dc/enwik8.zip',
  md5='a1fa5ffddb56f4953e226637dabbb36a',
)
TEXT8 = Source(
  name='text8',
  url='http://mattmahoney.net/dc/text8.zip',
  md5='3bea1919949baf155f99411df5fada7e',
)


def read(source: Source, path) -> splits_lib.Splits:
  """Splits of a local file: the whole set, a prefix of it, or another text.

  Only the whole set is split in the standard way.

  Raises:
    FileNotFoundError, ValueError: see `files.read_bytes`; ValueError also for
      a file of the full size that is not the set.
  """
  path = pathlib.Path(path)
  data = files.read_bytes(path)
  if len(data) != FULL_SIZE:
    return splits_lib.proportional(
      data,
      f'{source.name} from {path.name}: {len(data):,} bytes, a prefix or other'
      f' text and not the full {FULL_SIZE:,} (figures are not comparable with'
      ' published ones)',
    )
  check(source, data, where=str(path))
  return standard(source, data)


def fetch(source: Source, folder) -> splits_lib.Splits:
  """Splits of the official set, downloaded into `folder` at the first call.

  Raises:
    ConnectionError: the download failed; says what to do without a network.
    ValueError: what was downloaded is damaged or is not the set. The file is
      removed, so that the next call downloads it again.
  """
  path = download.fetch(source.url, folder)
  try:
    data = files.read_bytes(path)
    check(source, data, where=source.url)
  except ValueError as error:
    path.unlink()
    raise ValueError(f'{error}; the download was removed') from error
  return standard(source, data)


def check(source: Source, data: bytes, where: str) -> None:
  """Refuses bytes that are not the whole set, naming what was found."""
  found = hashlib.md5(data, usedforsecurity=False).hexdigest()
  if found != source.md5:
    raise ValueError(
      f'{where} is not {source.name}: its {len(data):,} bytes have md5 {found},'
      f' expected {source.md5} ({FULL_SIZE:,} bytes)'
    )


def standard(source: Source, data: bytes) -> splits_lib.Splits:
  return splits_lib.by_bytes(
    data, HELD_OUT, f'{source.name}: the full set, standard 90M/5M/5M split'
  )
