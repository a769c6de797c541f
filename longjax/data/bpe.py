"""Byte-level byte-pair encoding, trained on texts of one's own."""

import os
import pathlib
from collections.abc import Iterable

from longjax.data import optional

# Numbered in this order, as in RoBERTa and BART but for the mask's number.
SPECIAL = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')
BYTES = 256


def train(
  texts: Iterable[str], vocab_size: int, path: str | os.PathLike
) -> None:
  """Writes a tokenizer.json, for `longjax.interop.load_tokenizer`.

  A text is encoded as <s> text </s>, a pair as <s> a </s></s> b </s>; any text
  has an encoding, since every byte is a token.

  Args:
    texts: to count pairs in; gone through once.
    vocab_size: tokens at most, with special ones and bytes. A small text may
      have fewer pairs than that.
    path: of the file; its folder is made.

  Raises:
    ValueError: a vocabulary too small for the bytes, or no text at all.
    ModuleNotFoundError: tokenizers is not installed.
  """
  smallest = BYTES + len(SPECIAL)
  if vocab_size < smallest:
    raise ValueError(
      f'vocab_size={vocab_size} must be at least {smallest}: {BYTES} bytes and '
      f'{", ".join(SPECIAL)}'
    )
  tokenizers = optional.require('tokenizers', 'byte-pair encoding')
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  seen = 0

  def counted():
    nonlocal seen
    for text in texts:
      seen += len(text)
      yield text

  tokenizer.train_from_iterator(
    counted(),
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIAL),
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  if not seen:
    raise ValueError('there is no text to train byte-pair encoding on')
  tokenizer.post_processor = processors.RobertaProcessing(
    ('</s>', SPECIAL.index('</s>')),
    ('<s>', SPECIAL.index('<s>')),
    add_prefix_space=False,
  )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix('.tmp')
  tokenizer.save(str(scratch))
  scratch.replace(path)
