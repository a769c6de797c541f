"""What the tasks of a `longjax.Longformer` share: its sizes, its tokens."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from longjax.data import bpe
from longjax.interop import load_pretrained, load_tokenizer, read_config
from longjax.interop import longformer as folders
from longjax.interop.tokenizers import JSONTokenizer
from longjax.models import Longformer
from longjax.training import settings as settings_lib
from longjax.training.stages import PATTERNS, Stage
from longjax.training.state import split
from longjax.training.tasks.base import Task
from longjax.training.tasks.language_modelling import model_keywords

NOT_BY_HAND = (
  'vocab_size',
  'patterns',
  'rngs',
  'head',
  'num_labels',
  'pad_token',
  'separator_token',
)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """A run of an encoder.

  Attributes:
    model: keyword arguments of `longjax.Longformer` besides those that the task
      knows; of a pretrained model those that differ.
    pretrained: a folder to begin from, of a Longformer or a RoBERTa; see
      `longjax.interop.load_pretrained`.
    pattern: 'sliding_window', 'dilated' or 'full', its sizes are the stages';
      '' for the pretrained model's own.
  """

  pretrained: str = ''
  pattern: str = ''


class EncoderTask(Task):
  """The model of such a task; see `longjax.training.tasks.base.Task`.

  Attributes:
    head: of the model, one of `longjax.models.heads.HEADS`.
  """

  head: str

  def set_sizes(self, special: Mapping[str, int], vocab_size: int, **sizes):
    """To be called by __init__: what the data say of the model.

    Args:
      special: numbers of `bpe.SPECIAL`, by name.
      vocab_size: how many tokens there are.
      **sizes: further keywords of `Longformer` (num_labels).

    Raises:
      ValueError: the tokens are not the pretrained model's, or there is not
        enough to make a model from.
    """
    settings = self.settings
    given = model_keywords(settings.model, NOT_BY_HAND)
    self._given = given | sizes
    keywords = {
      'vocab_size': vocab_size,
      'pad_token': special['<pad>'],
      'separator_token': special['</s>'],
    }
    if settings.pretrained:
      fits = keywords
      keywords = folder_keywords(settings.pretrained)
      for name, number in fits.items():
        # RoBERTa's table has rows that are no token's.
        if keywords[name] != number and not (
          name == 'vocab_size' and number < keywords[name]
        ):
          raise ValueError(
            f'the data have {name} {number}, but the model in '
            f'{settings.pretrained} {keywords[name]}: they are not its own '
            'tokens'
          )
    elif not settings.pattern:
      raise ValueError(
        "config.pattern is '', which is a pretrained model's own: name one of "
        "'sliding_window', 'dilated' and 'full', or give config.pretrained"
      )
    self._keywords = keywords | self._given
    for name in ('num_layers', 'features', 'num_heads', 'max_positions'):
      if name not in self._keywords:
        raise ValueError(
          f'config.model lacks the key {name}, and there is no '
          'config.pretrained'
        )

  @property
  def max_globals(self) -> int:
    """The most global tokens in a row; 0 for a model that has none."""
    return self._keywords.get('max_globals', 64)

  def make_model(
    self, stage: Stage, rngs: nnx.Rngs, patterns=None
  ) -> nnx.Module:
    keywords = {**self._keywords}
    if stage.length > keywords['max_positions']:
      raise ValueError(
        f"stage length {stage.length} is beyond the model's "
        f'{keywords["max_positions"]} positions: `python -m '
        'longjax.interop.convert` makes a longer model'
      )
    if patterns is not None:
      keywords['patterns'] = patterns
    elif self.settings.pattern:
      keywords['patterns'] = stage.layer_patterns(
        self.settings.pattern, keywords['num_layers'], causal=False
      )
    else:
      for name in {n for names in PATTERNS.values() for n in names}:
        if getattr(stage, name) is not None:
          raise ValueError(
            f'stage key {name!r} without config.pattern: the patterns are the '
            "pretrained model's own"
          )
    return Longformer(head=self.head, rngs=rngs, **keywords)

  def pretrained(self) -> dict[str, Any]:
    if not self.settings.pretrained:
      return {}
    other = {**self._given}
    for name in ('dtype', 'param_dtype'):
      other.pop(name, None)
    model = load_pretrained(
      self.settings.pretrained,
      head=self.head,
      dtype=jnp.float32,
      seed=self.settings.seed,
      **other,
    )
    return {name: np.asarray(x) for name, x in split(model)[1].items()}


def folder_keywords(folder: str) -> dict:
  """Keywords of the `Longformer` in a folder.

  Raises:
    ValueError, FileNotFoundError: it has none.
  """
  config = read_config(folder)
  model_type = config.get('model_type', 'roberta')
  if model_type not in ('longformer', 'roberta'):
    raise ValueError(
      f'config.pretrained {folder} is a {model_type}: an encoder is wanted '
      '(longformer, roberta)'
    )
  return folders.read(config)


def find_tokenizer(
  path: str, settings: Settings, vocab_size: int, texts, workdir
):
  """The tokenizer of a run.

  Args:
    path: a file or folder, see `longjax.interop.load_tokenizer`; '' for that of
      the pretrained model, or else a byte-level BPE that is trained once and
      kept in the run.
    settings: of the run.
    vocab_size: of a BPE that is trained.
    texts: () -> texts to train it on.
    workdir: folder of the run.

  Raises:
    ValueError, FileNotFoundError: there is none, or it is of another kind.
  """
  where = path or settings.pretrained
  if not where:
    where = pathlib.Path(workdir) / 'tokenizer' / 'tokenizer.json'
    if jax.process_index() == 0 and not where.exists():
      bpe.train(texts(), vocab_size, where)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('the tokenizer is trained')
  tokenizer = load_tokenizer(where)
  if not isinstance(tokenizer, JSONTokenizer):
    raise ValueError(
      f'{where} is no tokenizer.json, nor vocab.json with merges.txt'
    )
  return tokenizer


def special_tokens(tokenizer) -> dict[str, int]:
  """Numbers of `bpe.SPECIAL`; ValueError if one is missing."""
  return {name: tokenizer.token(name) for name in bpe.SPECIAL}
