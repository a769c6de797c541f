"""A trained model at work: scoring a split, continuing a prompt."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from longjax.training.checkpoint import CheckpointError, Checkpoints
from longjax.training.devices import DataMesh
from longjax.training.metrics import say, track
from longjax.training.settings import Settings, make_settings
from longjax.training.stages import make_stages
from longjax.training.state import split
from longjax.training.tasks import LanguageModelling


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model out of a checkpoint.

  Attributes:
    model: the module, with the patterns of the last stage; its parameters are
      their moving average where the run kept one.
    task: what it was trained on; `task.corpus` is the text.
    settings: of the run.
    step: optimizer steps it was trained for.
  """

  model: nnx.Module
  task: LanguageModelling
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
    patterns: of `DecoderLM`, instead of the last stage's.

  Raises:
    CheckpointError: when there is none, or it is of another architecture.
  """
  settings = make_settings(config)
  stage = make_stages(settings.stages)[-1]
  folder, step = _find(pathlib.Path(checkpoint or workdir))
  mesh = DataMesh()
  task = LanguageModelling(settings)

  def make_model(rngs):
    return task.make_model(stage, rngs, patterns)

  # Shapes only: the arrays are about to be read.
  merge, shapes = split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
  part = 'ema' if settings.ema_decay else 'params'
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.replicated)
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
  """Scores a checkpoint on the test split; see `load` and `score_test`."""
  trained = load(config, workdir, checkpoint)
  mesh = DataMesh()
  mesh.check_divides(
    'evaluation batch_size', trained.settings.evaluation.batch_size
  )
  merge, params = split(trained.model)
  forward = make_forward(merge, mesh)
  result = score_test(
    trained.settings,
    trained.task,
    lambda tokens: forward(params, tokens),
    say=say,
  )
  return {'step': trained.step, **result}


def sample(
  config: Mapping,
  workdir: str | os.PathLike,
  checkpoint: str | os.PathLike = '',
) -> tuple[bytes, bytes]:
  """The prompt of `config.sampling` and how a checkpoint continues it."""
  trained = load(config, workdir, checkpoint)
  return continue_prompt(trained.settings, trained.task, trained.model)


def continue_prompt(settings: Settings, task, model) -> tuple[bytes, bytes]:
  """(prompt, continuation), as `settings.sampling` asks."""
  from longjax import generation

  wanted = settings.sampling
  prompt = task.corpus.encode(wanted.prompt)
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
  return wanted.prompt.encode(), task.corpus.decode(tokens)


def make_forward(merge: Callable, mesh: DataMesh) -> Callable:
  """(parameters, int32 tokens [batch, length]) -> logits, over the devices."""
  forward = jax.jit(
    lambda params, tokens: merge(params)(tokens),
    out_shardings=mesh.replicated,
  )
  return lambda params, tokens: forward(params, mesh.shard_same(tokens))


def score_test(
  settings: Settings, task, logits_fn: Callable, *, say: Callable
) -> dict:
  """The test split's score, with what is needed to compare it.

  Args:
    settings: of the run.
    task: what to score.
    logits_fn: see `longjax.evaluation.bits_per_character`.
    say: takes the result as a line.

  Returns:
    A dictionary that JSON can hold: the score, the protocol (length, stride,
    characters, windows), the text, and whether it is the whole split.
  """
  limit = settings.evaluation.test_characters
  tokens = task.corpus.test[: limit or None]
  score = task.score(
    logits_fn,
    tokens,
    progress=lambda batches: track(
      batches, 'test', enabled=jax.process_index() == 0
    ),
  )
  say(f'test {score}')
  return {
    **dataclasses.asdict(score),
    'split': 'test',
    'whole_split': len(tokens) == len(task.corpus.test),
    'data': task.corpus.name,
    'description': task.corpus.description,
    'split_sha256': task.corpus.sha256['test'],
  }
