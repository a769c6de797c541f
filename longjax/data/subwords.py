"""Byte-pair vocabularies of tiktoken, such as LongNet's cl100k_base.

Files (.tiktoken: a token in base64 and its rank a line) are those that tiktoken
downloads. Where it cannot, name a file of the same name on this machine. Either
way its digest is checked against the library's.
"""

import base64
import binascii
import hashlib
import pathlib
import re

import numpy as np

from longjax.data import optional

NAMES = ('cl100k_base', 'o200k_base', 'p50k_base', 'r50k_base')
SUFFIX = '.tiktoken'

# How bytes that are no UTF-8 look once decoded with 'surrogateescape'.
_NO_TEXT = re.compile('([\udc80-\udcff]+)')


def is_name(name: str) -> bool:
  """Whether it names such a vocabulary, by itself or by its file."""
  return name in NAMES or name.endswith(SUFFIX)


class SubwordVocabulary:
  """A map between bytes and tokens of several bytes each.

  Attributes:
    name: of the encoding, such as 'cl100k_base'.
    size: number of tokens; special ones, which no text becomes, among them.
    dtype: the smallest unsigned dtype that holds every token.
  """

  def __init__(self, name: str):
    """`name` is one of NAMES, or a path to NAME.tiktoken.

    Raises:
      ValueError: another name, or a file that is not of its name.
      FileNotFoundError: no such file.
      ConnectionError: tiktoken cannot download it.
      ModuleNotFoundError: there is no tiktoken.
    """
    path = pathlib.Path(name) if name.endswith(SUFFIX) else None
    self.name = path.stem if path else name
    if self.name not in NAMES:
      raise ValueError(
        f"{name} is none of tiktoken's {', '.join(NAMES)}, nor a file "
        f'{NAMES[0]}{SUFFIX} or the like'
      )
    tiktoken = optional.require('tiktoken', f'the vocabulary {self.name}')
    self._encoding = tiktoken.Encoding(**_definition(self.name, path))
    self.size = self._encoding.n_vocab
    self.dtype = np.min_scalar_type(self.size - 1)

  def encode(self, text: str | bytes, *, source: str = 'the text'):
    """Tokens of `text` (a str is taken as UTF-8), of any bytes whatever.

    Bytes that are no UTF-8 are a token each. What looks like a special token is
    ordinary text.
    """
    del source
    raw = text.encode() if isinstance(text, str) else text
    pieces = []
    decoded = raw.decode('utf-8', 'surrogateescape')
    for number, piece in enumerate(_NO_TEXT.split(decoded)):
      if number % 2:
        octets = piece.encode('utf-8', 'surrogateescape')
        tokens = [self._encoding.encode_single_token(b) for b in _each(octets)]
      else:
        tokens = self._encoding.encode_ordinary(piece)
      pieces.append(np.asarray(tokens, self.dtype))
    return np.concatenate(pieces)

  def decode(self, tokens) -> bytes:
    """The bytes of `tokens`, an integer array [length].

    Raises:
      ValueError: a token that there is not.
    """
    tokens = np.asarray(tokens)
    try:
      return self._encoding.decode_bytes([int(token) for token in tokens])
    except (KeyError, OverflowError) as error:
      raise ValueError(
        f'one of the tokens {tokens[:8]}... is not in {self.name}: {error}'
      ) from error


def _each(octets: bytes):
  return (octets[i : i + 1] for i in range(len(octets)))


def _definition(name: str, path: pathlib.Path | None) -> dict:
  """What tiktoken.Encoding is made of; its ranks from `path`, if given."""
  from tiktoken_ext import openai_public

  download = openai_public.load_tiktoken_bpe

  def ranks(url, expected_hash=None):
    if path is not None:
      return _read_ranks(path, expected_hash)
    try:
      return download(url, expected_hash=expected_hash)
    except OSError as error:  # requests' errors are such
      raise ConnectionError(
        f'{name} could not be downloaded from {url} ({type(error).__name__}): '
        f'bring the file, and give its path (.../{name}{SUFFIX}) instead'
      ) from error

  # The library's definitions of encodings download their ranks themselves.
  openai_public.load_tiktoken_bpe = ranks
  try:
    return openai_public.ENCODING_CONSTRUCTORS[name]()
  finally:
    openai_public.load_tiktoken_bpe = download


def _read_ranks(path: pathlib.Path, expected: str | None) -> dict[bytes, int]:
  if not path.is_file():
    raise FileNotFoundError(f'{path} does not exist')
  raw = path.read_bytes()
  digest = hashlib.sha256(raw).hexdigest()
  if expected not in (None, digest):
    raise ValueError(
      f'{path} is not {path.stem}: its sha256 is {digest}, expected {expected}'
    )
  ranks = {}
  for number, line in enumerate(raw.splitlines()):
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
      raise ValueError(f'{path}, line {number + 1}: {error}') from error
  return ranks
