"""Every setting of a run, with its default and its meaning.

`train_and_evaluate` takes these as a nested mapping: an ml_collections
`ConfigDict` (what `configs/` makes), or a plain dictionary. A key that is not
here is refused with the nearest one that is.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


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


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """See `longjax.training.optimizer.make_optimizer`; clip_norm 0 for none."""

  name: str = 'adamw'
  weight_decay: float = 0.01
  clip_norm: float = 0.25
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Bits per character by overlapping windows.

  Attributes:
    length, stride: of the windows, in characters.
    batch_size: windows at a time; does not change the result.
    every: steps between validations; 0 for none.
    validation_characters, test_characters: score only so many first characters
      of the split; 0 for all.
  """

  length: int = 1024
  stride: int = 512
  batch_size: int = 8
  every: int = 0
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
class Settings:
  """A run.

  Attributes:
    seed: of the initial parameters, the order of the data, dropout.
    data, optimizer, evaluation, sampling: see the classes above.
    model: keyword arguments of `longjax.DecoderLM` besides vocab_size, patterns
      and rngs; dtypes by name ('bfloat16').
    pattern: the kind of attention pattern of all layers: 'sliding_window',
      'dilated', 'fixed_sparse', 'lambda' or 'full'; its sizes are the stages'.
    stages: see `longjax.training.stages.Stage`; a mapping for each.
    micro_batches: parts into which a batch is cut, one after the other, to
      save memory (gradient accumulation).
    ema_decay: of the moving average of the parameters, which is then what is
      evaluated; 0 for none.
    log_every: steps between lines of metrics.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many are kept.
    tensorboard: whether to write TensorBoard's event files too.
    report: whether to end with a comparison with Markov models, a sample and
      pictures.
  """

  seed: int = 0
  data: Data = dataclasses.field(default_factory=Data)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pattern: str = 'sliding_window'
  stages: tuple[Mapping[str, Any], ...] = ()
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  micro_batches: int = 1
  ema_decay: float = 0.0
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  log_every: int = 50
  checkpoint_every: int = 1000
  keep_checkpoints: int = 2
  tensorboard: bool = True
  report: bool = False

  def __post_init__(self):
    for name in (
      'micro_batches',
      'log_every',
      'checkpoint_every',
      'keep_checkpoints',
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f'config.{name} must be >= 1, got {getattr(self, name)}'
        )
    if not 0 <= self.ema_decay < 1:
      raise ValueError(
        f'config.ema_decay must lie in [0, 1), got {self.ema_decay}'
      )


def make_settings(config: Mapping) -> Settings:
  """Checks a nested mapping of settings.

  Raises:
    ValueError: for a key that there is not, naming the nearest one.
  """
  if hasattr(config, 'to_dict'):
    config = config.to_dict()
  return _make(Settings, config, 'config')


def nearest(key: str, known) -> str:
  """'did you mean ...?' for a misspelt key."""
  close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
  return f'did you mean {close[0]!r}?'


def _make(cls, values, where):
  if isinstance(values, cls):
    return values
  fields = {field.name: field for field in dataclasses.fields(cls)}
  made = {}
  for key, value in values.items():
    if key not in fields:
      raise ValueError(
        f'unknown key {key!r} in {where}: {nearest(key, fields)}'
      )
    kind = fields[key].type
    if dataclasses.is_dataclass(kind):
      value = _make(kind, value, f'{where}.{key}')
    made[key] = value
  return cls(**made)
