"""Maps between bytes and tokens.

Every vocabulary here is a table over the 256 byte values:

  bytes    token = byte value; 256 symbols; nothing is outside.
  letters  the 27 symbols of text8: space is 0, 'a' is 1, ... 'z' is 26; any
           other byte is refused.
  compact  the byte values that occur in a training split, in order, then one
           symbol for all others.

Those of `subwords` have tokens of several bytes each.
"""

import dataclasses

import numpy as np

from longjax.data import subwords

BYTES = 'bytes'
LETTERS = 'letters'
COMPACT = 'compact'
NAMES = (BYTES, LETTERS, COMPACT)

# What decoding writes for the unknown symbol: ASCII's own SUBSTITUTE.
UNKNOWN_BYTE = b'\x1a'


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """A table from byte values to tokens, and back.

  Attributes:
    name: one of NAMES.
    table: integer array [256], the token of each byte value; -1 for a byte
      value outside the vocabulary.
    symbols: uint8 array [size], the byte value each token decodes to.
  """

  name: str
  table: np.ndarray
  symbols: np.ndarray

  @property
  def size(self) -> int:
    return len(self.symbols)

  @property
  def dtype(self) -> np.dtype:
    """The smallest unsigned dtype that holds every token."""
    return np.min_scalar_type(self.size - 1)

  def encode(self, text: str | bytes, *, source: str = 'the text'):
    """Tokens of `text` (a str is taken as UTF-8): array [len(bytes)].

    Raises:
      ValueError: a byte is outside the vocabulary; says which one, where in
        `source`.
    """
    raw = text.encode() if isinstance(text, str) else text
    allowed = np.flatnonzero(self.table >= 0).astype(np.uint8).tobytes()
    if outside := raw.translate(None, delete=allowed)[:1]:
      raise ValueError(
        f'symbol {outside!r} at byte offset {raw.index(outside)} of {source} is'
        f' outside the vocabulary {self.name!r}, which holds'
        f' {allowed.decode("latin-1")!r}'
      )
    table = self.table.astype(self.dtype)
    if self.dtype == np.uint8:  # indexing would make 8-byte indices first
      return np.frombuffer(raw.translate(table.tobytes()), np.uint8)
    return table[np.frombuffer(raw, np.uint8)]

  def decode(self, tokens) -> bytes:
    """The bytes of `tokens`, an integer array [length].

    Raises:
      ValueError: a token is not in [0, size).
    """
    tokens = np.asarray(tokens)
    if tokens.size and not (0 <= tokens.min() and tokens.max() < self.size):
      bad = tokens[(tokens < 0) | (tokens >= self.size)].flat[0]
      raise ValueError(f'token {bad} is not in [0, {self.size})')
    return self.symbols[tokens.astype(np.int64)].tobytes()


def check(name: str):
  """Raises ValueError unless a vocabulary may be called so."""
  if name not in NAMES and not subwords.is_name(name):
    raise ValueError(
      f'vocab={name!r} is not one of {", ".join((*NAMES, *subwords.NAMES))}, '
      f'nor a path to a file such as {subwords.NAMES[0]}{subwords.SUFFIX}'
    )


def build(name: str, train: bytes) -> Vocabulary | subwords.SubwordVocabulary:
  """The vocabulary called `name`; 'compact' looks at the training split."""
  check(name)
  if name == BYTES:
    values = np.arange(256, dtype=np.uint8)
    return Vocabulary(name, np.arange(256), values)
  if name == LETTERS:
    values = np.frombuffer(b' abcdefghijklmnopqrstuvwxyz', np.uint8)
    return Vocabulary(name, _positions(values, outside=-1), values)
  if name == COMPACT:
    values = np.array([v for v in range(256) if v in train], np.uint8)
    unknown = np.frombuffer(UNKNOWN_BYTE, np.uint8)
    table = _positions(values, outside=len(values))
    return Vocabulary(name, table, np.concatenate([values, unknown]))
  return subwords.SubwordVocabulary(name)


def _positions(values: np.ndarray, outside: int) -> np.ndarray:
  table = np.full(256, outside)
  table[values] = np.arange(len(values))
  return table
