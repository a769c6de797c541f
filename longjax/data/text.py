"""Plain text: one file, or a folder of them."""

import pathlib

from longjax.data import files
from longjax.data import splits as splits_lib


def read(path, min_bytes: int = 0) -> splits_lib.Splits:
  """Splits of a text file by position, of a folder's files by file.

  A folder is read whole, subfolders included, hidden files and folders left
  out, in the order of the paths.

  Args:
    path: the file or folder.
    min_bytes: shorter files of a folder are left out.

  Raises:
    FileNotFoundError: no such path, or a folder without files.
    ValueError: see `files.read_bytes`; a text too short to split; `min_bytes`
      that no file has, or with one file.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    if min_bytes:
      raise ValueError(
        f'{min_bytes} bytes at least are wanted of each file, but {path} is one'
        ' file, not a folder of them'
      )
    data = files.read_bytes(path)
    return splits_lib.proportional(data, f'{path.name}: {len(data):,} bytes')
  found = sorted(
    (file.relative_to(path).as_posix(), file)
    for file in path.rglob('*')
    if file.is_file() and not _hidden(file.relative_to(path))
  )
  if not found:
    raise FileNotFoundError(f'no files in the folder {path}')
  return splits_lib.by_document(
    [files.read_bytes(file) for _, file in found],
    f'files of the folder {path.name}',
    min_bytes,
  )


def _hidden(relative: pathlib.Path) -> bool:
  return any(part.startswith('.') for part in relative.parts)
