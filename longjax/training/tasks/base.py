"""What the training loop asks of a task."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from longjax.training.devices import Place
from longjax.training.forward import Apply
from longjax.training.settings import Settings
from longjax.training.stages import Stage


class Task:
  """What differs between language modelling, classification and the others.

  The loop in `longjax/training/train.py` knows a task by the attributes and
  methods here and nothing else of it. A task is made from its settings, reads
  its data then, and refuses what cannot be before anything is computed.

  Attributes:
    Settings: class of the settings, a frozen dataclass that adds the task's own
      to `longjax.training.settings.Settings`.
    scores: names of figures that `validate` and `test` both return and that go
      to the metrics as 'validation/...' and 'test/...'; the first is the one
      that matters.
    curves: names of the figures that loss.png shows.
    unit: what its tokens are called in the metrics.
    sequences: names of the arrays of a batch, then a dictionary, that may be
      split along their second axis, too, over devices; empty for a task that
      splits rows only.
    place: what of every batch this process loads; set by the loop.
    title: of pictures; the data's name.
    description: a line on the data.
  """

  Settings: type[Settings] = Settings
  scores: tuple[str, ...] = ('loss',)
  curves: tuple[str, ...] = ('loss',)
  unit: str = 'tokens'
  sequences: tuple[str, ...] = ()
  place: Place = Place()
  title: str
  description: str

  def __init__(self, settings: Settings, workdir: pathlib.Path | None = None):
    """Args:

    settings: of the run.
    workdir: its folder, where prepared data may be kept for when it goes on.
    """
    self.settings = settings
    self.workdir = workdir

  def make_model(
    self, stage: Stage, rngs: nnx.Rngs, patterns=None
  ) -> nnx.Module:
    """The module of a stage; its parameters do not depend on the stage.

    Args:
      stage: says the patterns, unless they are given.
      rngs: of the initial parameters. Called inside of a trace.
      patterns: of the model, instead of the stage's.
    """
    raise NotImplementedError

  def pretrained(self) -> dict[str, Any]:
    """Initial parameters that are not random: {dotted name: array}."""
    return {}

  def make_batches(self, stage: Stage, number: int) -> Iterator:
    """The batches of stage `number`, endless.

    Each is a pytree of NumPy arrays, this process' rows of the batch first in
    their shape. Shapes may differ from batch to batch if they are few (buckets
    of length): the loop compiles a step for each. With more than one process
    all must yield the same shapes at the same time.

    Returns:
      An iterator with `get_state()`, a small dictionary that JSON can hold,
      `set_state(state)`, after which it goes on exactly where that was taken,
      and `epoch`, how many times the data have been gone through.
    """
    raise NotImplementedError

  def lengths(self) -> dict[str, int]:
    """Of all sequences that may be split, by the setting that says it."""
    lengths = {
      f'stage {number} length': stage['length']
      for number, stage in enumerate(self.settings.stages)
    }
    longest = max(lengths.values(), default=0)
    return lengths | {
      f'config.data.buckets {length}': length
      for length in getattr(self.settings.data, 'buckets', ())
      if length < longest
    }

  def check_whole_rows(self) -> None:
    """Raises ValueError where this process is to load parts of sequences."""
    if self.place.parts > 1:
      raise ValueError(
        f'mesh axis seq goes over {self.place.parts} processes: '
        f'{self.settings.task} splits sequences over the devices of one '
        'process only'
      )

  def loss(self, model: nnx.Module, batch, dropout_key) -> tuple:
    """(mean loss, weight) of a batch or of a part of one.

    The mean over all parts is weighted by `weight`: how many targets the mean
    is of, or None where that is the same for all parts. With weight 0 the loss
    must be 0. Called inside of a trace.
    """
    raise NotImplementedError

  def tokens(self, batch) -> int:
    """How many tokens of this process' rows count for the speed."""
    raise NotImplementedError

  def metrics(self, loss: float) -> dict[str, float]:
    """Further figures of a line of metrics, from the mean loss in it."""
    del loss
    return {}

  def news(self, line: Mapping[str, float]) -> str:
    """What the progress bar says of a line of metrics."""
    return f'loss {line["train/loss"]:.3f}'

  def validate(self, apply: Apply) -> dict[str, Any]:
    """The figures of the validation split, `scores` among them.

    Args:
      apply: makes functions of the model, see `longjax.training.forward.Apply`.
    """
    raise NotImplementedError

  def test(self, apply: Apply, folder: pathlib.Path) -> dict[str, Any]:
    """What result.json says of the test split: JSON, `scores` among it.

    Args:
      apply: as for `validate`.
      folder: where files of predictions may go; only process 0 writes.
    """
    raise NotImplementedError

  def report(
    self, stage: Stage, before: Apply, after: Apply, workdir: pathlib.Path
  ) -> None:
    """With `config.report`, the end of a run: comparisons, samples, pictures.

    Args:
      stage: the last one.
      before, after: the model at its first and at its last step.
      workdir: of the run.
    """
    raise ValueError(f'config.report: {self.settings.task} has no report')

  def sample(self, model: nnx.Module) -> tuple[bytes, bytes]:
    """(prompt, continuation) as the settings ask."""
    raise ValueError(f'{self.settings.task} has nothing to sample')
