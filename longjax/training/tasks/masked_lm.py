"""Masked language modelling: Longformer's pretraining.

arXiv 2004.05150, section 5: a RoBERTa, made longer, goes on finding masked
tokens; `longjax.data.masking` says which are masked and how.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logsumexp

from longjax.data import bpe
from longjax.data.masking import MaskedBatches, Masking, evaluation_batches
from longjax.nn.memory import in_pieces
from longjax.sharding import shards
from longjax.training import settings as settings_lib
from longjax.training.forward import Apply
from longjax.training.loss import LOGITS
from longjax.training.metrics import track
from longjax.training.stages import Stage
from longjax.training.tasks import encoders, language_modelling

# Texts are given to the tokenizer in pieces of so many bytes, more or less.
PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Data(language_modelling.Data):
  """What to read; see `longjax.data.load`.

  Attributes:
    tokenizer: a file or folder; 'pretrained' for that in `config.pretrained`;
      'train' for a byte-level BPE of the training split, kept in the run; ''
      for `vocab`, with special tokens before it.
    vocab_size: of a BPE that is trained.
    share: of the tokens that are hidden.
  """

  tokenizer: str = ''
  vocab_size: int = 8192
  share: float = 0.15


@dataclasses.dataclass(frozen=True)
class Evaluation(settings_lib.Evaluation):
  """Bits for each masked token of a text cut into pieces.

  Which tokens are masked does not depend on how the text is cut.

  Attributes:
    length: of the pieces, in tokens with <s> and </s>.
    validation_characters, test_characters: score only so many first characters
      (bytes) of the split; 0 for all.
    seed: of the masking.
  """

  length: int = 512
  validation_characters: int = 0
  test_characters: int = 0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings(encoders.Settings):
  """A run of masked language modelling; see the classes above."""

  data: Data = dataclasses.field(default_factory=Data)
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


class MaskedLM(encoders.EncoderTask):
  """See `longjax.training.tasks.base.Task`.

  Attributes:
    corpus: the text, see `longjax.data.Corpus`.
  """

  Settings = Settings
  head = 'masked_lm'
  sequences = ('tokens',)
  scores = ('bits_per_token', 'bits_per_character')
  curves = ('bits_per_token',)

  def __init__(self, settings: Settings, workdir=None):
    super().__init__(settings, workdir)
    where = settings.data
    if where.tokenizer and where.vocab:
      raise ValueError(
        f'config.data.vocab {where.vocab!r} is of no use with a tokenizer '
        f'({where.tokenizer!r}): drop one of them'
      )
    self.corpus = where.load()
    self.title = self.corpus.name
    self.description = f'{self.corpus.name}, {self.corpus.description}'
    if where.tokenizer:
      self._tokenizer = self._find_tokenizer()
      special = encoders.special_tokens(self._tokenizer)
      vocab_size = self._tokenizer.vocab_size
    else:
      self._tokenizer = None
      special = {name: number for number, name in enumerate(bpe.SPECIAL)}
      vocab_size = len(special) + self.corpus.vocab_size
    self.set_sizes(special, vocab_size)
    self._masking = Masking(
      begin=special['<s>'],
      end=special['</s>'],
      pad=special['<pad>'],
      mask=special['<mask>'],
      ordinary=np.setdiff1d(np.arange(vocab_size), list(special.values())),
      share=where.share,
    )
    self._train = None

  def _find_tokenizer(self):
    where = self.settings.data
    if where.tokenizer == 'pretrained' and not self.settings.pretrained:
      raise ValueError(
        "config.data.tokenizer is 'pretrained' without config.pretrained"
      )
    named = where.tokenizer not in ('train', 'pretrained')
    settings = self.settings
    if where.tokenizer == 'train':
      settings = dataclasses.replace(settings, pretrained='')
    return encoders.find_tokenizer(
      where.tokenizer if named else '',
      settings,
      where.vocab_size,
      lambda: _pieces(self.corpus.decode(self.corpus.train)),
      self.workdir,
    )

  def encode(self, tokens) -> np.ndarray:
    """The model's tokens of the corpus', without <s> and </s>, int32."""
    if self._tokenizer is None:
      return np.asarray(tokens, np.int32) + len(bpe.SPECIAL)
    pieces = list(_pieces(self.corpus.decode(tokens)))
    encoded = self._tokenizer.encode_plain(pieces)
    return np.concatenate([np.asarray(x, np.int32) for x in encoded])

  def make_batches(self, stage: Stage, number: int) -> MaskedBatches:
    self.check_whole_rows()
    if self._train is None:
      self._train = self.encode(self.corpus.train)
    return MaskedBatches(
      self._train,
      stage.length,
      stage.batch_size,
      self._masking,
      seed=self.settings.seed + number,
      process_index=self.place.row,
      process_count=self.place.rows,
      loader=self.settings.data.loader,
    )

  def loss(self, model: nnx.Module, batch: Mapping, dropout_key):
    """Mean negative log-likelihood of the masked tokens, in nats."""
    losses = masked_losses(
      model, batch['tokens'], batch['places'], batch['targets'], dropout_key
    )
    return losses.mean(), None

  def tokens(self, batch: Mapping) -> int:
    return batch['tokens'].size

  def metrics(self, loss: float) -> dict[str, float]:
    return {'bits_per_token': loss / math.log(2)}

  def news(self, line: Mapping[str, float]) -> str:
    return f'{line["train/bits_per_token"]:.3f} bits/token'

  def score(self, apply: Apply, text: np.ndarray, progress=None) -> dict:
    """Bits of the masked tokens of a text, int [N] of the corpus' tokens.

    Returns:
      bits_per_token: mean of -log2 p over the masked tokens.
      bits_per_character: that, times tokens, over characters (bytes) of the
        text.
      masked, tokens, characters, length, share: what they were taken over.
    """
    protocol = self.settings.evaluation
    tokens = self.encode(text)
    batches = evaluation_batches(
      tokens,
      protocol.length,
      protocol.batch_size,
      self._masking,
      protocol.seed,
    )
    total, masked = 0.0, 0
    for batch in progress(batches) if progress else batches:
      losses = apply(masked_losses)(
        batch['tokens'], batch['places'], batch['targets']
      )
      total += np.asarray(losses, np.float64)[batch['counts']].sum()
      masked += int(batch['counts'].sum())
    characters = len(self.corpus.decode(text))
    bits = float(total / masked / math.log(2))
    return {
      'bits_per_token': bits,
      'bits_per_character': bits * len(tokens) / characters,
      'masked': masked,
      'tokens': len(tokens),
      'characters': characters,
      'length': protocol.length,
      'share': self._masking.share,
    }

  def validate(self, apply: Apply) -> dict:
    limit = self.settings.evaluation.validation_characters
    return self.score(apply, self._first('validation', limit))

  def test(self, apply: Apply, folder: pathlib.Path) -> dict:
    del folder
    limit = self.settings.evaluation.test_characters
    text = self._first('test', limit)
    score = self.score(
      apply,
      text,
      lambda batches: track(batches, 'test', enabled=jax.process_index() == 0),
    )
    return {
      **score,
      'split': 'test',
      'whole_split': len(text) == len(self.corpus.test),
      'data': self.corpus.name,
      'description': self.corpus.description,
      'split_sha256': self.corpus.sha256['test'],
    }

  def _first(self, split: str, limit: int):
    return getattr(self.corpus, split)[: limit or None]


def masked_losses(model, tokens, places, targets, dropout_key=None):
  """Negative log-likelihood of what was masked, in nats.

  Only the masked places are read out, some at a time where they are many; where
  sequences are split, each device reads out its share of them.

  Args:
    model: a `Longformer` with the head 'masked_lm'.
    tokens: int [batch, length], or a shard.
    places: int [batch, masked], of the whole sequence.
    targets: int [batch, masked].
    dropout_key: turns dropout on.

  Returns:
    float32 [batch, masked].
  """
  hidden = model.encode(tokens, dropout_key=dropout_key)
  hidden = shards.deal(shards.rows_at(hidden, places))
  size = max(1, LOGITS // (model.vocab_size * len(tokens)))

  def losses(hidden, targets):
    logits = model.head(hidden, None, model.embedding.embedding[...])
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logsumexp(logits, axis=-1) - chosen

  found = in_pieces(losses, size, hidden, shards.deal(targets))
  return shards.gather(found)[:, : targets.shape[1]]


def _pieces(text: bytes):
  """A text in pieces that end where a word does."""
  text = text.decode('utf-8', 'replace')
  start = 0
  while start < len(text):
    space = re.compile(r'\s').search(text, start + PIECE)
    end = space.start() if space else len(text)
    yield text[start:end]
    start = end
