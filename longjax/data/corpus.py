"""A corpus: three arrays of tokens and what is needed to read them."""

import dataclasses
import hashlib

import numpy as np

from longjax.data import splits as splits_lib
from longjax.data import subwords
from longjax.data import vocabulary as vocabulary_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A text, tokenized and split.

  Attributes:
    name: the name it was loaded by.
    train: tokens [length], uint8 or (for more than 256 symbols) uint16 or
      uint32.
    validation: likewise.
    test: likewise.
    vocabulary: the map between bytes and tokens.
    description: where the text comes from and how it was split; says so when
      figures on it are not comparable with published ones.
    sha256: hexadecimal digest of each split's raw bytes, whatever the
      vocabulary, by split name.
  """

  name: str
  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  vocabulary: vocabulary_lib.Vocabulary | subwords.SubwordVocabulary
  description: str
  sha256: dict[str, str]

  @property
  def vocab_size(self) -> int:
    return self.vocabulary.size

  def encode(self, text: str | bytes) -> np.ndarray:
    """Tokens of a text, most often one a byte; a str is taken as UTF-8."""
    return self.vocabulary.encode(text)

  def decode(self, tokens) -> bytes:
    """The bytes of an array of tokens [length]."""
    return self.vocabulary.decode(tokens)


def build(name: str, splits: splits_lib.Splits, vocab: str) -> Corpus:
  """Tokenizes raw splits with the vocabulary called `vocab`."""
  vocabulary = vocabulary_lib.build(vocab, splits.train)
  raw = {key: getattr(splits, key) for key in splits_lib.NAMES}
  return Corpus(
    name=name,
    vocabulary=vocabulary,
    description=splits.description,
    sha256=digests(splits),
    **{
      key: vocabulary.encode(text, source=f'{name} {key}')
      for key, text in raw.items()
    },
  )


def digests(splits: splits_lib.Splits) -> dict[str, str]:
  return {
    key: hashlib.sha256(getattr(splits, key)).hexdigest()
    for key in splits_lib.NAMES
  }
