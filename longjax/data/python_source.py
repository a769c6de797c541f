"""The source of Python's own standard library: real text on every machine.

About 9 MB of code and prose by many hands with dependencies over thousands of
characters, read from where this Python keeps it. The text differs between
Python builds, so a figure on it is quoted with the digest of its split.
"""

import pathlib
import platform
import sysconfig

from longjax.data import splits as splits_lib

# Left out: other people's packages, tests (a distribution may drop them),
# generated tables and topics, frozen oddities, and applications.
_SKIPPED_FOLDERS = frozenset(
  {
    '__phello__',
    '__pycache__',
    'dist-packages',
    'encodings',
    'ensurepip',
    'idlelib',
    'lib2to3',
    'pydoc_data',
    'site-packages',
    'test',
    'tests',
    'turtledemo',
  }
)
# Written when Python is built or configured, so they name the machine.
_SKIPPED_PREFIXES = ('_sysconfigdata', 'sitecustomize', 'usercustomize')


def paths(root: pathlib.Path) -> list[pathlib.Path]:
  """The .py files that make the corpus, in their fixed order."""
  found = []
  for path in root.rglob('*.py'):
    *folders, name = path.relative_to(root).parts
    if _SKIPPED_FOLDERS.intersection(folders):
      continue
    if any(folder.startswith('config-') for folder in folders):
      continue
    if not name.startswith(_SKIPPED_PREFIXES):
      found.append(path)
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read(min_bytes: int = 0) -> splits_lib.Splits:
  """The standard library's files, split by file (18 : 1 : 1).

  Args:
    min_bytes: shorter files are left out.

  Raises:
    FileNotFoundError: this Python carries no source files.
    ValueError: no file is that long.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found = paths(root)
  if len(found) < splits_lib.PERIOD:
    raise FileNotFoundError(
      f'{root} holds {len(found)} .py files: this Python has no source of its'
      " standard library; use data.name='text' with a path"
    )
  return splits_lib.by_document(
    [path.read_bytes() for path in found],
    f'files of the standard library of'
    f' {platform.python_implementation()} {platform.python_version()}',
    min_bytes,
  )
