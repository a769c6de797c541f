"""Sequences of tokens of any lengths in a file, mapped into memory."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np


class RaggedWriter:
  """Writes sequences one by one; a context manager.

  Args:
    path: of PATH.tokens and PATH.lengths.npy.
    dtype: of the tokens.
  """

  def __init__(self, path: str | os.PathLike, dtype):
    self._path = pathlib.Path(path)
    self._dtype = np.dtype(dtype)
    self._lengths = []

  def __enter__(self):
    self._file = open(f'{self._path}.tokens', 'wb')
    return self

  def append(self, tokens: Sequence[int]) -> None:
    np.asarray(tokens, self._dtype).tofile(self._file)
    self._lengths.append(len(tokens))

  def __exit__(self, *error):
    self._file.close()
    np.save(f'{self._path}.lengths.npy', np.array(self._lengths, np.int64))


class Ragged(Sequence):
  """What a `RaggedWriter` wrote: sequence i as an array, read when asked for.

  Args:
    path, dtype: the writer's.

  Attributes:
    lengths: int64 [sequences].

  Raises:
    FileNotFoundError, ValueError: files missing, or not of these lengths.
  """

  def __init__(self, path: str | os.PathLike, dtype):
    self.lengths = np.load(f'{path}.lengths.npy')
    self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
    file, dtype = pathlib.Path(f'{path}.tokens'), np.dtype(dtype)
    wanted = int(self._starts[-1]) * dtype.itemsize
    if (found := file.stat().st_size) != wanted:
      raise ValueError(f'{file} has {found} bytes in place of {wanted}')
    # An empty file cannot be mapped.
    self._tokens = (
      np.memmap(file, dtype, mode='r') if wanted else np.zeros(0, dtype)
    )

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f'no sequence {index} among {len(self)}')
    return self._tokens[self._starts[index] : self._starts[index + 1]]
