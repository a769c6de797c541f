"""The settings that every run has, whatever its task.

`train_and_evaluate` takes settings as a nested mapping: an ml_collections
`ConfigDict` (what `configs/` makes), or a plain dictionary. `task` names the
task, which adds its own (see `longjax.training.tasks`). A key that is not there
is refused with the nearest one that is.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from longjax.training import tasks


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """See `longjax.training.optimizer.make_optimizer`; clip_norm 0 for none."""

  name: str = 'adamw'
  weight_decay: float = 0.01
  clip_norm: float = 0.25
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  only: str = ''


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What the loop wants to know of evaluation; tasks add to it.

  Attributes:
    batch_size: rows at a time; does not change the result.
    every: steps between validations; 0 for none.
  """

  batch_size: int = 8
  every: int = 0


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How a run is laid over the devices of all processes.

  Attributes:
    data: devices along the batch's rows; -1 for those left.
    seq: devices along the sequence.
    split_parameters: parameters and the optimizer's state are split over all
      devices, and put together for each step only.
  """

  data: int = -1
  seq: int = 1
  split_parameters: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
  """A run.

  Attributes:
    task: one of `longjax.training.tasks.TASKS`.
    seed: of the initial parameters, the order of the data, dropout.
    model: keyword arguments of the task's model; dtypes by name ('bfloat16').
    stages: see `longjax.training.stages.Stage`; a mapping for each.
    optimizer, mesh, evaluation: see the classes above.
    micro_batches: parts into which a batch is cut, one after the other, to
      save memory (gradient accumulation).
    ema_decay: of the moving average of the parameters, which is then what is
      evaluated; 0 for none.
    log_every: steps between lines of metrics.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many are kept.
    tensorboard: whether to write TensorBoard's event files too.
    report: whether to end with the task's comparisons, samples and pictures.
  """

  task: str = tasks.DEFAULT
  seed: int = 0
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stages: tuple[Mapping[str, Any], ...] = ()
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  micro_batches: int = 1
  ema_decay: float = 0.0
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
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

  Returns:
    The `Settings` of the task that `config['task']` names.

  Raises:
    ValueError: for a task or a key that there is not, naming the nearest one.
  """
  if isinstance(config, Settings):
    return config
  if hasattr(config, 'to_dict'):
    config = config.to_dict()
  return _make(default_settings(config.get('task', tasks.DEFAULT)), config)


def default_settings(task: str = tasks.DEFAULT) -> Settings:
  """The settings of a task, all of them at their defaults."""
  return dataclasses.replace(tasks.find(task).Settings(), task=task)


def nearest(key: str, known) -> str:
  """'did you mean ...?' for a misspelt key."""
  close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
  return f'did you mean {close[0]!r}?'


def _make(default, values, where='config'):
  if isinstance(values, type(default)):
    return values
  made = {}
  known = [field.name for field in dataclasses.fields(default)]
  for key, value in values.items():
    if key not in known:
      raise ValueError(f'unknown key {key!r} in {where}: {nearest(key, known)}')
    old = getattr(default, key)
    if dataclasses.is_dataclass(old):
      value = _make(old, value, f'{where}.{key}')
    made[key] = value
  return dataclasses.replace(default, **made)
