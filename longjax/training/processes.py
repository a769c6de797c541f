"""Runs of many processes, on JAX's own distributed runtime.

Every process runs the same program and owns some of the devices. They find each
other through a coordinator, the first of them, which also notices when one of
them is gone: then all end, and the same command goes on from the last
checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax

from longjax.training.metrics import say
from longjax.training.preemption import Preempted

# A process that has not been heard of for so long is taken for dead.
HEARTBEAT_SECONDS = 20
# What another process may take to say why it failed.
_GRACE_SECONDS = 5
_FAILED = 'longjax/failed'


def start(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
  """Joins the other processes; to be called before anything else of JAX.

  What is left out is found in the environment, where the processes run under
  SLURM, Open MPI, Kubernetes or on a TPU pod.

  Args:
    coordinator: 'host:port' of process 0; a free port of a host that all reach.
    processes: how many there are.
    process: which of them this is, from 0.

  Raises:
    ValueError: arguments that do not fit, or that the environment lacks.
  """
  if coordinator and not coordinator.rpartition(':')[2].isdigit():
    raise ValueError(f'coordinator {coordinator!r} is not as host:1234')
  if processes and process >= processes:
    raise ValueError(f'process {process} is not one of {processes} processes')
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      None if process < 0 else process,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as e:
    raise ValueError(
      f'cannot join the other processes: {" ".join(str(e).split())} (give '
      '--coordinator=host:port, --processes and --process where the '
      'environment does not say)'
    ) from None


def _client():
  # The key-value store of the coordinator has no public name yet.
  from jax._src import distributed

  return distributed.global_state.client


def check_same(name: str, settings) -> None:
  """Compares what all processes were told.

  Args:
    name: what it is, for the message.
    settings: a dataclass or a mapping that JSON can hold.

  Raises:
    ValueError: in every process, naming the first key that differs.
  """
  if jax.process_count() == 1:
    return
  if dataclasses.is_dataclass(settings):
    settings = dataclasses.asdict(settings)
  mine = json.loads(json.dumps(settings, default=str))
  client, place = _client(), f'longjax/{name}'
  client.key_value_set(f'{place}/{jax.process_index()}', json.dumps(mine))
  # The first one's; waits for it.
  first = json.loads(client.blocking_key_value_get(f'{place}/0', 60_000))
  verdict = difference(first, mine, name)
  if verdict:
    verdict += f' (process 0 and process {jax.process_index()})'
  client.key_value_set(f'{place}/verdict/{jax.process_index()}', verdict or '-')
  for number in range(jax.process_count()):
    found = client.blocking_key_value_get(f'{place}/verdict/{number}', 60_000)
    if found != '-':
      raise ValueError(f'processes were told different things: {found}')


def difference(a, b, name: str) -> str | None:
  """The first key in which two nested JSON values differ, with both values."""
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    for key in [*a, *(key for key in b if key not in a)]:
      if key not in a or key not in b:
        return f'{name}.{key} is there and not there'
      found = difference(a[key], b[key], f'{name}.{key}')
      if found:
        return found
    return None
  if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
    parts = (
      difference(x, y, f'{name}[{i}]')
      for i, (x, y) in enumerate(zip(a, b, strict=True))
    )
    return next(filter(None, parts), None)
  return None if a == b else f'{name} is {a!r} and {b!r}'


@contextlib.contextmanager
def ending_together(
  exit_code: Callable[[BaseException], int],
) -> Iterator[None]:
  """One process' failure ends all others, which say why.

  Others that wait for this one would wait for ever: it tells them through the
  coordinator and leaves at once, without saying good-bye to anybody. Those that
  lost it by no fault of its own hear of it from their own collective, or from
  the coordinator's heartbeats.

  Args:
    exit_code: prints what is to be said of an exception, and returns the exit
      code.
  """
  if jax.process_count() == 1:
    yield
    return
  watch = _Watch()
  try:
    yield
  except Preempted:
    watch.stop()  # All are, and have saved.
    raise
  except BaseException as error:
    watch.stop()
    code = 1
    with contextlib.suppress(OSError):  # Nobody may be listening.
      code = exit_code(error)
    watch.tell(f'{type(error).__name__}: {error}')
    _leave(code)
  watch.stop()


def _leave(code):
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


class _Watch:
  """Ends this process when another one says that it failed."""

  def __init__(self):
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self):
    while not self._stopped.wait(1):
      cause = self.cause()
      if cause:
        with contextlib.suppress(OSError):
          say(
            f'error: {cause}: this process ends, too; run the same command '
            'again to go on from the last checkpoint'
          )
        _leave(1)

  @staticmethod
  def cause() -> str | None:
    """What another process failed of, if one said so."""
    try:
      found = _client().key_value_dir_get(_FAILED)
    except Exception:
      return None
    return min(value for _, value in found) if found else None

  def tell(self, text):
    """Tells the others, unless one of them said so first."""
    own, text = jax.process_index(), ' '.join(text.split())[:500]
    with contextlib.suppress(Exception):
      _client().key_value_set(
        f'{_FAILED}/{own}', f'process {own} failed ({text})'
      )
    # The coordinator's process keeps the store: it leaves last.
    if jax.process_index() == 0:
      threading.Event().wait(_GRACE_SECONDS)

  def stop(self):
    self._stopped.set()
