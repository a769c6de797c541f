"""Tensors in safetensors files, one or several with an index, by name."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Of stored tensors that can be read.
DTYPES = ('F32', 'BF16', 'F16', 'F64')


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file.

  Raises:
    ValueError: it holds none.
  """
  try:
    found = json.loads(path.read_text())
  except ValueError as error:  # no JSON, or no text at all
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds {type(found).__name__}, not an object')
  return found


class Tensors:
  """The tensors of a folder; read, by slices of rows, only when asked for.

  Use as a context manager: files are mapped into memory while it is open.

  Raises:
    FileNotFoundError: no weights in the folder, or a file that the index
      names is missing.
    ValueError: a file that is no safetensors, or is cut short; an index
      that is none.
  """

  def __init__(self, folder: str | os.PathLike):
    self._folder = pathlib.Path(folder)
    self._stack = contextlib.ExitStack()
    self._file_of = {}

  def __enter__(self) -> 'Tensors':
    index = self._folder / INDEX
    if index.exists():
      wanted = read_json(index).get('weight_map')
      if not wanted:
        raise ValueError(f'{index} has no weight_map')
      names = sorted(set(wanted.values()))
    elif (self._folder / SINGLE).exists():
      wanted, names = None, [SINGLE]
    else:
      other = sorted(p.name for p in self._folder.glob('*.bin'))
      hint = f'; {other} must be converted to safetensors' if other else ''
      raise FileNotFoundError(
        f'{self._folder} has neither {SINGLE} nor {INDEX}{hint}'
      )
    with contextlib.ExitStack() as stack:
      for name in names:
        file = stack.enter_context(_open(self._folder / name))
        self._file_of |= dict.fromkeys(file.keys(), file)
      for tensor, name in (wanted or {}).items():
        if tensor not in self._file_of:
          raise ValueError(f'{INDEX} says {name} holds {tensor}; it does not')
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error):
    self._stack.close()

  def __iter__(self) -> Iterator[str]:
    return iter(self._file_of)

  def __contains__(self, name: str) -> bool:
    return name in self._file_of

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._file_of[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    return self._file_of[name].get_slice(name).get_dtype()

  def read(self, name: str, first: int = 0, last: int | None = None):
    """Rows [first, last) of a tensor, as a numpy array."""
    if first == 0 and last is None:
      return self._file_of[name].get_tensor(name)
    return self._file_of[name].get_slice(name)[first:last]


def _open(path: pathlib.Path):
  import safetensors

  if not path.exists():
    raise FileNotFoundError(f'{path} is missing, though {INDEX} names it')
  try:
    return safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is damaged or cut short ({path.stat().st_size} bytes): {error}'
    ) from error


def write(
  folder: pathlib.Path,
  sizes: Mapping[str, int],
  tensor,
  max_file_bytes: int,
):
  """Writes tensors, in files of at most `max_file_bytes` (but one at least).

  Args:
    sizes: bytes of each tensor, in the order they are written.
    tensor: name -> numpy array; called for one file's tensors at a time.
  """
  from safetensors.numpy import save_file

  files, size = [[]], 0
  for name, nbytes in sizes.items():
    if files[-1] and size + nbytes > max_file_bytes:
      files.append([])
      size = 0
    files[-1].append(name)
    size += nbytes
  if len(files) == 1:
    names = [SINGLE]
  else:
    names = [
      f'model-{i + 1:05}-of-{len(files):05}.safetensors'
      for i in range(len(files))
    ]
  for file, members in zip(names, files, strict=True):
    arrays = {name: np.ascontiguousarray(tensor(name)) for name in members}
    # What transformers asks for.
    save_file(arrays, folder / file, metadata={'format': 'pt'})
  if len(files) > 1:
    weight_map = {
      name: file
      for file, members in zip(names, files, strict=True)
      for name in members
    }
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))
