"""A trained model at work: scoring a split, continuing a prompt."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax
from flax import nnx

from longjax.training.checkpoint import CheckpointError, Checkpoints
from longjax.training.devices import make_devices
from longjax.training.forward import Apply
from longjax.training.metrics import say, show
from longjax.training.settings import Settings, make_settings
from longjax.training.stages import make_stages
from longjax.training.state import split
from longjax.training.tasks import make_task
from longjax.training.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model out of a checkpoint.

  Attributes:
    model: the module, with the patterns of the last stage; its parameters are
      their moving average where the run kept one.
    task: what it was trained for; `task.corpus` is a language model's text.
    settings: of the run.
    step: optimizer steps it was trained for.
  """

  model: nnx.Module
  task: Task
  settings: Settings
  step: int


def load(
  config: Mapping,
  workdir: str | os.PathLike,
  checkpoint: str | os.PathLike = '',
  *,
  patterns=None,
) -> Trained:
  """The model of a run's newest readable checkpoint.

  Args:
    config: the run's, as for `train_and_evaluate`.
    workdir: its folder.
    checkpoint: another folder to take it from: a work folder, a folder of
      checkpoints, or one of those by its step ('.../checkpoints/1000').
    patterns: of the model, instead of the last stage's.

  Raises:
    CheckpointError: when there is none, or it is of another architecture.
  """
  settings = make_settings(config)
  stage = make_stages(settings.stages)[-1]
  folder, step = _find(pathlib.Path(checkpoint or workdir))
  devices = make_devices(settings)
  task = make_task(settings, folder.parent)

  def make_model(rngs):
    return task.make_model(stage, rngs, patterns)

  # Shapes only: the arrays are about to be read.
  merge, shapes = split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
  part = 'ema' if settings.ema_decay else 'params'
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.replicated)
    for name, x in shapes.items()
  }
  with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
    restored = checkpoints.restore({part: like}, step)
  if restored is None:
    raise CheckpointError(f'no checkpoint in {folder}')
  return Trained(merge(restored.state[part]), task, settings, restored.step)


def _find(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
  if path.name.isdigit() and path.is_dir():
    return path.parent, int(path.name)
  if (path / 'checkpoints').is_dir():
    return path / 'checkpoints', None
  if not path.is_dir():
    raise CheckpointError(f'no checkpoint: there is no folder {path}')
  return path, None


def evaluate(
  config: Mapping,
  workdir: str | os.PathLike,
  checkpoint: str | os.PathLike = '',
) -> dict:
  """Scores a checkpoint on the test split; see `load` and `Task.test`."""
  trained = load(config, workdir, checkpoint)
  devices = make_devices(trained.settings)
  devices.check_divides(
    'evaluation batch_size', trained.settings.evaluation.batch_size
  )
  devices.check_sequences(trained.task)
  apply = Apply(*split(trained.model), devices)
  result = trained.task.test(apply, pathlib.Path(workdir))
  say(f'test {show(result, trained.task.scores)}')
  return {'step': trained.step, **result}


def sample(
  config: Mapping,
  workdir: str | os.PathLike,
  checkpoint: str | os.PathLike = '',
) -> tuple[bytes, bytes]:
  """The prompt of `config.sampling` and how a checkpoint continues it."""
  trained = load(config, workdir, checkpoint)
  return trained.task.sample(trained.model)
