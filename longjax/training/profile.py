"""A trace of a few training steps by JAX's profiler."""

import pathlib
from collections.abc import Callable

import jax

from longjax.training.metrics import Meter

# Steps before the trace, in which things are compiled and caches filled.
FIRST = 3
STEPS = 5


class Profile:
  """Traces a few steps of this process, once.

  The folder can be read by TensorBoard's profiler and by XProf
  (`xprof --logdir FOLDER`), on a machine with their packages.

  Args:
    folder: where the trace goes; None for none.
    meter: of the run; waits for steps, so that the trace has whole ones, and
      does not count the time that tracing takes.
    say: takes a line on what was done.
  """

  def __init__(self, folder: pathlib.Path | None, meter: Meter, say: Callable):
    self._folder, self._meter, self._say = folder, meter, say
    self._steps = 0
    self._running = False

  def stepped(self) -> None:
    """To be called after every step."""
    self._steps += 1
    if self._folder is None:
      return
    if self._steps == FIRST:
      self._meter.settle()
      jax.profiler.start_trace(str(self._folder))
      self._running = True
      self._meter.start()
    elif self._steps == FIRST + STEPS:
      self._meter.settle()
      self.close()
      self._meter.start()

  def close(self) -> None:
    """Ends a trace that is running."""
    if not self._running:
      return
    jax.profiler.stop_trace()
    self._running = False
    self._say(
      f'a trace of {self._steps - FIRST} steps is in {self._folder}: see it '
      f'with xprof --logdir {self._folder}'
    )
