"""Predicting each next character (token) of a text."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax import data, evaluation
from longjax.models import DecoderLM
from longjax.training import settings as settings_lib
from longjax.training.forward import Apply
from longjax.training.loss import target_losses
from longjax.training.metrics import track
from longjax.training.stages import Stage
from longjax.training.tasks.base import Task

# Arguments of a model that a config gives by the name of a dtype.
_DTYPES = ('dtype', 'param_dtype')


@dataclasses.dataclass(frozen=True)
class Data:
  """What to read; see `longjax.data.load`.

  Attributes:
    name: 'enwik8', 'text8', 'python_source', 'text' or 'pg19'.
    path: a local file or folder; '' for the data set's own place.
    vocab: 'bytes', 'compact' or what else the data set offers; '' for its own.
    data_dir: where prepared data sets are kept; '' for the default.
    loader: 'grain', or 'numpy' where grain is not installed.
    min_document_bytes: leave shorter files out, of python_source or a folder.
  """

  name: str = 'python_source'
  path: str = ''
  vocab: str = ''
  data_dir: str = ''
  loader: str = 'grain'
  min_document_bytes: int = 0

  def load(self) -> data.Corpus:
    """The text."""
    optional = {
      name: getattr(self, name)
      for name in ('path', 'vocab', 'data_dir', 'min_document_bytes')
      if getattr(self, name)
    }
    return data.load(self.name, **optional)


@dataclasses.dataclass(frozen=True)
class Evaluation(settings_lib.Evaluation):
  """Bits per character by overlapping windows.

  Attributes:
    length, stride: of the windows, in characters.
    validation_characters, test_characters: score only so many first characters
      of the split; 0 for all.
  """

  length: int = 1024
  stride: int = 512
  validation_characters: int = 0
  test_characters: int = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How --mode=sample continues a prompt; top_k 0 and top_p 1 keep all."""

  prompt: str = '\n'
  num_tokens: int = 300
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """A run of language modelling.

  Attributes:
    data, evaluation, sampling: see the classes above.
    model: keyword arguments of `longjax.DecoderLM` besides vocab_size, patterns
      and rngs.
    pattern: the kind of attention pattern of all layers: 'sliding_window',
      'dilated', 'fixed_sparse', 'lambda' or 'full'; its sizes are the stages'.
  """

  data: Data = dataclasses.field(default_factory=Data)
  pattern: str = 'sliding_window'
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
  sampling: Sampling = dataclasses.field(default_factory=Sampling)


def model_keywords(model: Mapping, not_by_hand: tuple[str, ...]) -> dict:
  """The settings of a model as its keyword arguments.

  Args:
    model: `config.model`; dtypes by name.
    not_by_hand: keywords that the task sets.

  Raises:
    ValueError: one of those is given.
  """
  model = {**model}
  for name in not_by_hand:
    if name in model:
      raise ValueError(f'config.model.{name} is not set by hand: drop it')
  for name in _DTYPES:
    if name in model:
      model[name] = jnp.dtype(model[name])
  return model


class LanguageModelling(Task):
  """See `longjax.training.tasks.base.Task`.

  Attributes:
    corpus: the text, see `longjax.data.Corpus`.
  """

  Settings = Settings
  scores = ('bits_per_character',)
  curves = ('bits_per_character',)
  unit = 'characters'
  sequences = ('tokens', 'targets')

  def __init__(self, settings: Settings, workdir=None):
    super().__init__(settings, workdir)
    self.corpus = settings.data.load()
    self.title = self.corpus.name
    self.description = f'{self.corpus.name}, {self.corpus.description}'
    self._model = model_keywords(
      settings.model, ('vocab_size', 'patterns', 'rngs')
    )
    if 'num_layers' not in self._model:
      raise ValueError('config.model lacks the key num_layers')

  def make_model(
    self, stage: Stage, rngs: nnx.Rngs, patterns=None
  ) -> nnx.Module:
    return DecoderLM(
      vocab_size=self.corpus.vocab_size,
      patterns=patterns
      or stage.layer_patterns(self.settings.pattern, self._model['num_layers']),
      rngs=rngs,
      **self._model,
    )

  def make_batches(self, stage: Stage, number: int) -> data.Batches:
    """Batches of 'tokens' and 'targets', int32 [rows, length] each."""
    row, rows, part, parts = self.place
    batches = data.Batches(
      self.corpus.train,
      stage.length,
      stage.batch_size,
      seed=self.settings.seed + number,
      process_index=row,
      process_count=rows,
      part=part,
      parts=parts,
      loader=self.settings.data.loader,
    )
    return _WithTargets(batches)

  def lengths(self) -> dict[str, int]:
    return super().lengths() | {
      'config.evaluation.length': self.settings.evaluation.length
    }

  def loss(self, model: nnx.Module, batch: Mapping, dropout_key):
    """Mean negative log-likelihood in nats; all parts weigh the same."""
    losses = target_losses(
      model, batch['tokens'], batch['targets'], dropout_key=dropout_key
    )
    return losses.mean(), None

  def tokens(self, batch: Mapping) -> int:
    return batch['targets'].size

  def metrics(self, loss: float) -> dict[str, float]:
    return {'bits_per_character': loss / math.log(2)}

  def news(self, line: Mapping[str, float]) -> str:
    return f'{line["train/bits_per_character"]:.3f} bits/char'

  def score(
    self, apply: Apply, tokens: np.ndarray, *, progress=None
  ) -> evaluation.BitsPerCharacter:
    """Bits per character of a text; see `longjax.evaluation`."""
    protocol = self.settings.evaluation
    return evaluation.bits_per_character(
      apply(target_losses, sequences=True),
      tokens,
      vocab_size=self.corpus.vocab_size,
      length=protocol.length,
      stride=protocol.stride,
      batch_size=protocol.batch_size,
      progress=progress,
    )

  def validate(self, apply: Apply) -> dict:
    limit = self.settings.evaluation.validation_characters
    tokens = self.corpus.validation[: limit or None]
    return dataclasses.asdict(self.score(apply, tokens))

  def test(self, apply: Apply, folder: pathlib.Path) -> dict:
    """The score, the protocol (length, stride, characters, windows), the text,
    and whether it is the whole split.
    """
    del folder
    limit = self.settings.evaluation.test_characters
    tokens = self.corpus.test[: limit or None]
    score = self.score(
      apply,
      tokens,
      progress=lambda batches: track(
        batches, 'test', enabled=jax.process_index() == 0
      ),
    )
    return {
      **dataclasses.asdict(score),
      'split': 'test',
      'whole_split': len(tokens) == len(self.corpus.test),
      'data': self.corpus.name,
      'description': self.corpus.description,
      'split_sha256': self.corpus.sha256['test'],
    }

  def report(self, stage, before, after, workdir) -> None:
    from longjax.training.report import report

    report(self, stage, before, after, workdir)

  def sample(self, model: nnx.Module) -> tuple[bytes, bytes]:
    from longjax import generation

    wanted = self.settings.sampling
    prompt = self.corpus.encode(wanted.prompt)
    if not len(prompt):
      raise ValueError(
        'config.sampling.prompt is empty: give a character or more'
      )
    tokens = generation.sample(
      model,
      prompt,
      wanted.num_tokens,
      temperature=wanted.temperature,
      top_k=wanted.top_k or None,
      top_p=wanted.top_p if wanted.top_p < 1 else None,
      seed=wanted.seed,
    )
    return wanted.prompt.encode(), self.corpus.decode(tokens)


class _WithTargets:
  """`data.Batches` as {'tokens', 'targets'}, which may be split alike."""

  def __init__(self, batches: data.Batches):
    self._batches = batches
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    tokens = next(self._batches)['tokens']
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}

  @property
  def epoch(self) -> int:
    return self._batches.epoch
