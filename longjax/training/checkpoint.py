"""Checkpoints: everything a run needs to go on bit for bit, through orbax.

A checkpoint has the parts of the training state (`params`, `opt_state` and,
where there is a moving average, `ema`) and a small JSON `run` (step, stage,
seed, state of the data iterator, counters, and every array's shape). Arrays are
stored under plain names in flat dictionaries, so a checkpoint can be read
without the code that wrote it. orbax writes into a temporary folder that it
renames when all is there: a killed save leaves nothing behind that looks like a
checkpoint.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import logging
from orbax import checkpoint as orbax

from longjax.training.metrics import say


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found."""

  step: int
  state: dict
  run: dict


def flatten(tree) -> dict[str, jax.Array]:
  """A pytree as {'a/0/b': array}, for storing and for naming differences."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in paths
  }


def _unflatten(like, flat: Mapping):
  return jax.tree_util.tree_unflatten(
    jax.tree_util.tree_structure(like), [flat[name] for name in flatten(like)]
  )


class Checkpoints:
  """The checkpoints of one work folder, newest kept.

  Args:
    folder: where; made when missing.
    keep: how many to keep.
    read_only: write nothing, not even the folder.
    say: where one-line messages go (a failed restore that was got over).

  Raises:
    CheckpointError: when the folder cannot be made or written to.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int = 2,
    read_only: bool = False,
    say: Callable[[str], None] = say,
  ):
    self.folder = pathlib.Path(folder).absolute()
    self._say = say
    if not read_only:
      self._check_writable()
    # It would warn of every folder that is only read.
    with _in_our_words():
      self._manager = orbax.CheckpointManager(
        self.folder,
        options=orbax.CheckpointManagerOptions(
          max_to_keep=None if read_only else keep,
          create=not read_only,
          read_only=read_only,
          # A run waits for its checkpoint: a full disk is known at once.
          enable_async_checkpointing=False,
        ),
      )

  def _check_writable(self):
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      probe = self.folder / f'.writable.{os.getpid()}'
      probe.touch()
      probe.unlink()
    except OSError as e:
      raise CheckpointError(
        f'cannot write to the work folder {self.folder.parent}: {e.strerror}'
      ) from e

  def steps(self) -> tuple[int, ...]:
    """The steps there are checkpoints of, in order."""
    return tuple(sorted(self._manager.all_steps()))

  def save(self, step: int, state: Mapping, run: Mapping) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
      step: optimizer steps done.
      state: part name -> pytree of arrays.
      run: what JSON can hold.

    Raises:
      CheckpointError: when it cannot be written (a full disk, say); earlier
        checkpoints are left as they are.
    """
    if step in self.steps():
      return
    parts = {name: flatten(tree) for name, tree in state.items()}
    run = {**run, 'shapes': {name: _shapes(p) for name, p in parts.items()}}
    try:
      with _in_our_words():
        self._manager.save(
          step,
          args=orbax.args.Composite(
            run=orbax.args.JsonSave(run),
            **{name: orbax.args.StandardSave(p) for name, p in parts.items()},
          ),
        )
    # Storage below orbax reports a full disk in errors of several types.
    except (OSError, ValueError, RuntimeError) as e:
      for part in (self.folder / str(step), *self.folder.glob(f'{step}.*')):
        shutil.rmtree(part, ignore_errors=True)
      self._manager.reload()
      full = getattr(e, 'errno', None) == errno.ENOSPC
      reason = 'no space left on the disk' if full else first_line(e)
      kept = ', '.join(map(str, self.steps())) or 'none'
      raise CheckpointError(
        f'cannot save the checkpoint of step {step} in {self.folder}: {reason} '
        f'(earlier checkpoints are intact: {kept})'
      ) from e

  def restore(self, like: Mapping, step: int | None = None) -> Restored | None:
    """The newest checkpoint that can be read, or None where there is none.

    Args:
      like: the parts to read, as in `save`: arrays, or shapes with shardings.
      step: this one only.

    Raises:
      CheckpointError: for a checkpoint of another architecture (naming the
        first array that differs), or when none can be read.
    """
    steps = self.steps()
    if step is not None and step not in steps:
      raise CheckpointError(
        f'no checkpoint of step {step} in {self.folder}: there are '
        f'{", ".join(map(str, steps)) or "none"}'
      )
    damaged = []
    for candidate in [step] if step is not None else reversed(steps):
      where = f'the checkpoint of step {candidate} in {self.folder}'
      try:
        run = self._read(candidate, run=orbax.args.JsonRestore()).run
        for part, tree in like.items():
          _check_shapes(where, part, run['shapes'].get(part, {}), tree)
        read = self._read(
          candidate,
          **{
            part: orbax.args.StandardRestore(_abstract(flatten(tree)))
            for part, tree in like.items()
          },
        )
      except CheckpointError:
        raise
      # A damaged file surfaces as whatever its reader happens to raise.
      except Exception as e:
        damaged.append(f'{where} is damaged ({first_line(e)})')
        self._say(damaged[-1])
        continue
      state = {
        part: _unflatten(tree, read[part]) for part, tree in like.items()
      }
      return Restored(candidate, state, run)
    if damaged:
      raise CheckpointError(f'{damaged[0]}, and no other one can be read')
    return None

  def _read(self, step, **parts):
    with _in_our_words():
      return self._manager.restore(step, args=orbax.args.Composite(**parts))

  def close(self) -> None:
    self._manager.close()


@contextlib.contextmanager
def _in_our_words():
  """Mutes orbax's threads: the first of their errors is raised here as well.

  The others follow from it, among them complaints from destructors and of
  coroutines that were never awaited, since the one before them failed.
  """
  verbosity, hook = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = lambda unraisable: None
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'coroutine .* never awaited')
      yield
  finally:
    sys.unraisablehook = hook
    logging.set_verbosity(verbosity)


def first_line(error: BaseException) -> str:
  """The first line of an error's text, or its type where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _shapes(flat) -> dict[str, list]:
  return {name: list(np.shape(array)) for name, array in flat.items()}


def _abstract(flat):
  return {
    name: jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=array.sharding
    )
    for name, array in flat.items()
  }


def _check_shapes(where, part, stored, tree):
  """Raises for the first array whose shape differs, in this model's order."""
  wanted = _shapes(flatten(tree))

  def show(shapes, name):
    return f'has shape {tuple(shapes[name])}' if name in shapes else 'is absent'

  for name in [*wanted, *stored]:
    if stored.get(name) != wanted.get(name):
      raise CheckpointError(
        f'{where} is of another architecture: {part}/{name} '
        f'{show(stored, name)} there and {show(wanted, name)} here'
      )
