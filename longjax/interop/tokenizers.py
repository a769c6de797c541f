"""Tokenizers of pretrained models, behind one small interface."""

import hashlib
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Protocol

from longjax.data.subwords import SUFFIX, SubwordVocabulary

JSON, SENTENCEPIECE = 'tokenizer.json', 'tokenizer.model'
VOCABULARY, MERGES = 'vocab.json', 'merges.txt'


class Tokenizer(Protocol):
  """What every tokenizer here does."""

  vocab_size: int

  def encode(self, text: str) -> list[int]:
    """Tokens of a text, with those that the model puts first (BOS)."""

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones.

    Raises:
      ValueError: a token outside of the vocabulary.
    """


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in a file, or in a pretrained model's folder.

  tokenizer.json (the tokenizers library), tokenizer.model (sentencepiece) or
  llama2.c's tok*.bin or tiktoken's cl100k_base.tiktoken, by the file's name; of
  a folder also vocab.json with merges.txt (byte-level BPE).

  Raises:
    FileNotFoundError: no such file, or none of these in the folder.
    ValueError: a file of another kind, or a damaged one.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    for name in (JSON, SENTENCEPIECE):
      if (path / name).exists():
        return load_tokenizer(path / name)
    if (path / VOCABULARY).exists() and (path / MERGES).exists():
      return ByteLevelTokenizer(path)
    raise FileNotFoundError(
      f'{path} has neither {JSON} nor {SENTENCEPIECE} nor {VOCABULARY} with '
      f'{MERGES}'
    )
  if not path.exists():
    raise FileNotFoundError(f'{path} does not exist')
  kinds = {
    '.json': JSONTokenizer,
    '.model': SentencePieceTokenizer,
    '.bin': Llama2cTokenizer,
    SUFFIX: TiktokenTokenizer,
  }
  if path.suffix not in kinds:
    raise ValueError(f'{path} is none of *{", *".join(kinds)}')
  return kinds[path.suffix](path)


def _check(tokens, vocab_size):
  tokens = [int(token) for token in tokens]
  for token in tokens:
    if not 0 <= token < vocab_size:
      raise ValueError(
        f'token {token} is outside of the vocabulary 0 ... {vocab_size - 1}'
      )
  return tokens


class JSONTokenizer:
  """tokenizer.json, with its own post-processing (BOS and the like)."""

  def __init__(self, path):
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(f'{path} is no tokenizer.json: {error}') from error
    # Files may say to cut or fill up texts to some length; ours are long.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocab_size = self._tokenizer.get_vocab_size()

  def encode(self, text, pair=None):
    """Tokens of a text, or of two with what the model puts between them."""
    return self._tokenizer.encode(text, pair).ids

  def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of many texts, on all cores, without those put around a text."""
    found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def encode_offsets(self, text: str) -> tuple[list[int], list[tuple]]:
    """Plain tokens of a text, and where each stands: (first, past the last)."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def digest(self) -> str:
    """Of all that it is made of; tells it from other tokenizers."""
    return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

  def token(self, name: str) -> int:
    """The number of a token such as '<mask>'; ValueError if there is none."""
    if (token := self._tokenizer.token_to_id(name)) is None:
      raise ValueError(f'the vocabulary has no token {name!r}')
    return token

  def decode(self, tokens):
    return self._tokenizer.decode(_check(tokens, self.vocab_size))


class ByteLevelTokenizer(JSONTokenizer):
  """vocab.json and merges.txt of GPT-2's line, as of RoBERTa and BART.

  If the vocabulary has RoBERTa's special tokens, a text is <s> text </s> and a
  pair <s> a </s></s> b </s>.
  """

  def __init__(self, folder):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    folder = pathlib.Path(folder)
    files = folder / VOCABULARY, folder / MERGES
    try:
      model = models.BPE.from_file(*map(str, files))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(f'{folder} holds no byte-level BPE: {error}') from error
    self._tokenizer = tokenizers.Tokenizer(model)
    self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    self._tokenizer.decoder = decoders.ByteLevel()
    known = self._tokenizer.token_to_id
    special = ('<s>', '<pad>', '</s>', '<unk>', '<mask>', '<|endoftext|>')
    self._tokenizer.add_special_tokens(
      [
        # A mask takes the place of a word and of the space before it.
        tokenizers.AddedToken(name, lstrip=name == '<mask>', normalized=False)
        for name in special
        if known(name) is not None
      ]
    )
    ends = [(name, known(name)) for name in ('</s>', '<s>')]
    if all(number is not None for _, number in ends):
      self._tokenizer.post_processor = processors.RobertaProcessing(
        *ends, add_prefix_space=False
      )
    self.vocab_size = self._tokenizer.get_vocab_size()


class SentencePieceTokenizer:
  """tokenizer.model; BOS is put first where the model has one."""

  def __init__(self, path):
    import sentencepiece

    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.Load(str(path))
    except (OSError, RuntimeError) as error:
      raise ValueError(f'{path} is no sentencepiece model: {error}') from error
    self.vocab_size = self._processor.GetPieceSize()

  def encode(self, text):
    bos = self._processor.bos_id()
    return [bos] * (bos >= 0) + self._processor.EncodeAsIds(text)

  def decode(self, tokens):
    return self._processor.DecodeIds(_check(tokens, self.vocab_size))


class TiktokenTokenizer:
  """cl100k_base.tiktoken or another of `longjax.data.subwords`; no BOS."""

  def __init__(self, path):
    self._vocabulary = SubwordVocabulary(str(path))
    self.vocab_size = self._vocabulary.size

  def encode(self, text):
    return self._vocabulary.encode(text).tolist()

  def decode(self, tokens):
    raw = self._vocabulary.decode(_check(tokens, self.vocab_size))
    return raw.decode('utf-8', 'replace')


class Llama2cTokenizer:
  """llama2.c's tok.bin: pieces with scores, merged best first.

  Token 0 is unknown, 1 BOS, 2 EOS, 3 ... 258 the single bytes.
  """

  bos, eos, first_byte = 1, 2, 3

  def __init__(self, path):
    data = pathlib.Path(path).read_bytes()
    self._pieces, self._scores = [], []
    try:
      (longest,) = struct.unpack_from('<i', data, 0)
      at = 4
      while at < len(data):
        score, size = struct.unpack_from('<fi', data, at)
        at += 8
        if not 0 < size <= longest or at + size > len(data):
          raise ValueError(f'piece {len(self._pieces)} has {size} bytes')
        self._pieces.append(data[at : at + size])
        self._scores.append(score)
        at += size
    except (struct.error, ValueError) as error:
      raise ValueError(f'{path} is no llama2.c tokenizer: {error}') from error
    self.vocab_size = len(self._pieces)
    # Of equal pieces the first counts, as a linear search would find it.
    self._number = {p: n for n, p in reversed(list(enumerate(self._pieces)))}

  def encode(self, text):
    tokens = []
    # A space goes first, as sentencepiece does for LLaMA.
    for character in f' {text}' if text else '':
      piece = character.encode()
      if piece in self._number:
        tokens.append(self._number[piece])
      else:
        tokens += [byte + self.first_byte for byte in piece]
    return [self.bos, *self._merge(tokens)]

  def _merge(self, tokens):
    """Merges the neighbours with the best score until none are a piece.

    Left to right among equals. A heap of candidates over a linked list: texts
    may be long.
    """
    import heapq

    after = [*range(1, len(tokens) + 1)]
    before = [*range(-1, len(tokens) - 1)]
    alive = [True] * len(tokens)
    candidates = []

    def consider(i):
      j = after[i] if i >= 0 else len(tokens)
      if j < len(tokens):
        piece = self._pieces[tokens[i]] + self._pieces[tokens[j]]
        merged = self._number.get(piece)
        if merged is not None:
          entry = (-self._scores[merged], i, tokens[i], tokens[j], j, merged)
          heapq.heappush(candidates, entry)

    for i in range(len(tokens)):
      consider(i)
    while candidates:
      _, i, left, right, j, merged = heapq.heappop(candidates)
      current = alive[i] and alive[j] and after[i] == j
      if not current or (tokens[i], tokens[j]) != (left, right):
        continue
      tokens[i], alive[j] = merged, False
      after[i] = after[j]
      if after[i] < len(tokens):
        before[after[i]] = i
      consider(before[i])
      consider(i)
    return [token for token, kept in zip(tokens, alive, strict=True) if kept]

  def decode(self, tokens):
    pieces, previous = [], None
    for token in _check(tokens, self.vocab_size):
      if token not in (self.bos, self.eos):
        piece = self._pieces[token]
        if previous == self.bos:
          piece = piece.removeprefix(b' ')
        if self.first_byte <= token < self.first_byte + 256:
          piece = bytes([token - self.first_byte])
        pieces.append(piece)
      previous = token
    return b''.join(pieces).decode('utf-8', 'replace')
