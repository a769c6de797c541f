"""Leaving a run politely when the machine wants to have it back."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
  """A signal asked the run to end; its state has been saved.

  Not an Exception, like KeyboardInterrupt: no handler of errors may hold it.

  Attributes:
    exit_code: 128 + the signal's number, as shells report it: 143 for SIGTERM.
  """

  def __init__(self, number: int):
    super().__init__(f'stopped by {signal.Signals(number).name}')
    self.exit_code = 128 + number


class StopRequests:
  """Notes SIGTERM and SIGINT instead of dying of them, while entered.

  The run asks `check()` where its state is whole. A second signal acts at once,
  as if nobody listened. Outside the main thread signals cannot be caught, and
  nothing is changed.

  With many processes they must all stop after the same step: SIGTERM of any is
  noted by JAX's preemption service, and SIGINT is left alone.
  """

  def __init__(self):
    self._received = None
    self._before = {}

  def __enter__(self):
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._receive)
    return self

  def _receive(self, number, frame):
    self._received = number
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def __exit__(self, *error):
    self._restore()

  def check(self, step: int | None = None) -> None:
    """Raises `Preempted` if a signal has come.

    Args:
      step: optimizer steps done, where this is said after each; with many
        processes only then is anything raised, in all of them.
    """
    if self._received is not None:
      raise Preempted(self._received)
    if step is not None and jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        raise Preempted(signal.SIGTERM)
