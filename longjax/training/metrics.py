"""What a run reports: JSON lines, TensorBoard, a progress bar, a plot."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping

METRICS_FILE = 'metrics.jsonl'


class NonFiniteError(RuntimeError):
  """The loss or the gradient became NaN or infinite; the message is a line."""


def say(line: str) -> None:
  """A line for whoever watches the run, on stderr."""
  print(line, file=sys.stderr, flush=True)


class Metrics:
  """Writes metrics to `metrics.jsonl` and, where installed, to TensorBoard.

  Every line is one JSON object with its "step". A run that is resumed from
  step s drops the lines after s that the killed run had written, so no step
  appears twice.

  Args:
    workdir: where to write.
    step: the step resumed from, 0 for a fresh run.
    tensorboard: whether to write event files as well.
    enabled: False for every process but the first, which then writes nothing.
    say: where to say that TensorBoard's writer is not installed.
  """

  def __init__(
    self, workdir, step: int, *, tensorboard=True, enabled=True, say=say
  ):
    self._file = self._board = None
    if not enabled:
      return
    self.path = pathlib.Path(workdir) / METRICS_FILE
    kept = [
      r
      for r in read_metrics(workdir)
      # What is written after the last step is written again.
      if 0 < r['step'] <= step and not any(k.startswith('test/') for k in r)
    ]
    scratch = self.path.with_suffix('.tmp')
    scratch.write_text(''.join(json.dumps(r) + '\n' for r in kept))
    scratch.replace(self.path)
    self._file = self.path.open('a')
    if tensorboard:
      try:
        from tensorboardX import SummaryWriter
      except ImportError:
        say('tensorboardX is not installed: metrics go to metrics.jsonl only')
      else:
        self._board = SummaryWriter(
          str(pathlib.Path(workdir) / 'tensorboard'), purge_step=step + 1
        )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line; numbers only."""
    if not self._file:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    if self._board:
      for name, value in values.items():
        if value is not None:
          self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._board:
      self._board.close()


def read_metrics(workdir) -> list[dict]:
  """The lines of a work folder's metrics, without a half-written last one."""
  path = pathlib.Path(workdir) / METRICS_FILE
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


class Meter:
  """Losses and speed of the steps since the last line of metrics.

  Looking at a step's loss waits for the device. So steps are handed in as they
  are dispatched and looked at one later, unless something needs them now.

  Attributes:
    counters: the state, for checkpoints: tokens (by the name of `unit`) and
      seconds of training so far, and the sum and number of losses since the
      last line.
  """

  def __init__(
    self, schedule, counters: Mapping | None = None, unit: str = 'tokens'
  ):
    self._schedule = schedule
    self._unit = unit
    self.counters = dict(
      counters or {unit: 0, 'seconds': 0.0, 'loss_sum': 0.0, 'losses': 0}
    )
    self._in_flight = []
    self._interval = (self.counters[unit], self.counters['seconds'])
    self._clock = None
    self._last = {}

  def start(self) -> None:
    """Starts the clock, again after time that is not training's."""
    self._clock = time.perf_counter()

  def dispatched(self, step: int, outputs: Mapping, tokens: int) -> None:
    """Step number `step` (from 1) is on its way; looks at those before it."""
    self.settle()
    self._in_flight.append((step, outputs))
    self.counters[self._unit] += tokens

  def settle(self) -> None:
    """Waits for all steps on their way and books them.

    Raises:
      NonFiniteError: naming the step and its learning rate.
    """
    for step, outputs in self._in_flight:
      values = {name: float(value) for name, value in outputs.items()}
      rate = float(self._schedule(step - 1))
      for name, value in values.items():
        if not math.isfinite(value):
          raise NonFiniteError(
            f'the {name.replace("_", " ")} is {value} at step {step} '
            f'(learning rate {rate:.3g})'
          )
      self.counters['loss_sum'] += values['loss']
      self.counters['losses'] += 1
      self._last = {**values, 'learning_rate': rate}
    self._in_flight = []
    now = time.perf_counter()
    self.counters['seconds'] += now - self._clock
    self._clock = now

  def summary(self) -> dict[str, float]:
    """The line of metrics since the last one; `settle` first."""
    counters = self.counters
    tokens = counters[self._unit] - self._interval[0]
    seconds = counters['seconds'] - self._interval[1]
    loss = counters['loss_sum'] / counters['losses']
    counters['loss_sum'], counters['losses'] = 0.0, 0
    self._interval = (counters[self._unit], counters['seconds'])
    return {
      'train/loss': loss,
      'train/gradient_norm': self._last['gradient_norm'],
      'train/learning_rate': self._last['learning_rate'],
      'train/tokens_per_second': tokens / seconds,
      f'train/{self._unit}': counters[self._unit],
      'train/seconds': counters['seconds'],
      'train/memory_gib': memory_gib(),
    }


class Progress:
  """Progress with time left: a bar on a terminal, otherwise a line at times.

  Args:
    total: steps in all.
    done: steps done before this process began.
    description: what is being done.
    enabled: False for every process but the first.
  """

  def __init__(self, total, done=0, description='training', enabled=True):
    self._total, self._done, self._first = total, done, done
    self._description = description
    self._started = time.perf_counter()
    self._enabled = enabled
    self._bar = None
    if enabled and sys.stderr.isatty() and not os.environ.get('CI'):
      try:
        from tqdm import tqdm
      except ImportError:
        return
      self._bar = tqdm(
        total=total,
        initial=done,
        desc=description,
        dynamic_ncols=True,
        file=sys.stderr,
      )

  def update(self, text: str | None = None) -> None:
    """One more step done; `text` is its news, if any."""
    self._done += 1
    if self._bar is not None:
      if text:
        self._bar.set_postfix_str(text, refresh=False)
      self._bar.update()
    elif text:
      self.say(
        f'{self._description} {self._done}/{self._total}  {text}  '
        f'{duration(self._left())} left'
      )

  def _left(self) -> float:
    elapsed = time.perf_counter() - self._started
    rate = elapsed / max(self._done - self._first, 1)
    return rate * (self._total - self._done)

  def say(self, line: str) -> None:
    """A line on stderr that does not break the bar."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    else:
      say(line)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def track(batches, description, enabled=True):
  """Iterates with a progress bar on a terminal, quietly elsewhere."""
  progress = Progress(len(batches), description=description, enabled=enabled)
  try:
    for batch in batches:
      yield batch
      progress.update()
  finally:
    progress.close()


def duration(seconds: float) -> str:
  """'42s', '3:05' or '2:03:04'."""
  seconds = int(seconds)
  if seconds < 60:
    return f'{seconds}s'
  minutes, seconds = divmod(seconds, 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'


def memory_gib() -> float | None:
  """Peak memory so far in GiB: the device's, on a CPU the process's own."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 2**30
  try:
    import resource
  except ImportError:  # not on Windows
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Kilobytes on Linux, bytes on macOS.
  return peak / (2**30 if sys.platform == 'darwin' else 2**20)


def show(figures: Mapping, names: Iterable[str]) -> str:
  """'bits per character 1.9512, accuracy 0.5000'."""
  return ', '.join(
    f'{name.replace("_", " ")} {figures[name]:.4f}' for name in names
  )


def plot_loss(workdir, path, names=('loss',), *, title='') -> bool:
  """Draws figures of training, validation and test over steps, a panel each.

  Args:
    workdir: where the metrics are.
    path: of the picture.
    names: of the figures, as in the metrics behind 'train/'.
    title: of the picture.

  Returns:
    False if it cannot.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    return False
  figure = Figure(figsize=(7, 1 + 3 * len(names)), layout='constrained')
  records = read_metrics(workdir)
  panels = figure.subplots(len(names), squeeze=False)[:, 0]
  for figure_name, axes in zip(names, panels, strict=True):
    for part, style in (('train', '-'), ('validation', 'o-'), ('test', 's')):
      name = f'{part}/{figure_name}'
      points = [(r['step'], r[name]) for r in records if name in r]
      if points:
        axes.plot(*zip(*points, strict=True), style, label=part, markersize=4)
    axes.set_xlabel('step')
    axes.set_ylabel(figure_name.replace('_', ' '))
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  return True
