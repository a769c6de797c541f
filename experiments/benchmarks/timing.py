"""What the GPU workers share: cases held ready, and timed.

How time is taken: calls are put into the device's queue one after the other,
over several sets of inputs in turn, and the host waits for the last. Divided by
the calls this is the device's time as long as the host is ahead of it; the
share of the time that the host spent filling the queue is recorded too, and a
figure where it nears 1 is the host's, not the device's. The same clock serves
JAX, which offers no events, and PyTorch. Besides, `profile` gives each kernel's
own time where the driver's profiler can be used.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from experiments.benchmarks import cases, process

# Input sets in turn, so that none stays in the cache (60 MB on an H200).
SETS = 2


@dataclasses.dataclass
class Prepared:
  """A case ready to run.

  Attributes:
    runs: {mode: function of a set of inputs}, asynchronous.
    inputs: sets of inputs.
    check: returns {name: error}; raises ArithmeticError if one is too large.
    memory: {mode: most bytes in use, one set of inputs included}; maybe empty.
    profile: function of (run, inputs) -> [(kernel, milliseconds)].
  """

  runs: dict[str, Callable]
  inputs: Sequence[tuple]
  check: Callable[[], dict]
  memory: Callable[[], dict]
  profile: Callable


def synchronized_seconds(run, inputs, calls, synchronize):
  """(seconds for each call, share of them in which the host was busy)."""
  started = time.perf_counter()
  for number in range(calls):
    result = run(*inputs[number % len(inputs)])
  queued = time.perf_counter()
  synchronize(result)
  ended = time.perf_counter()
  return (ended - started) / calls, (queued - started) / (ended - started)


def serve(prepare, synchronize, rates, release=None, **ready):
  """Answers `setup`, `time`, `profile`, `drop` and `rates`.

  Args:
    prepare: (who, case, reference) -> Prepared.
    synchronize: waits for a result.
    rates: () -> {name: rate} measured on the device.
    release: gives unused memory back to the device.
  """
  held, estimates = {}, {}

  def setup(who, case, reference=None):
    started = time.perf_counter()
    case = cases.Case.from_json(case)
    key = who, case.name
    prepared = prepare(who, case, reference)
    compiled = time.perf_counter()
    errors = prepared.check()
    for mode, run in prepared.runs.items():
      seconds = []
      # What takes long is known after one call.
      while len(seconds) < 3 and sum(seconds) < 0.2:
        seconds.append(
          synchronized_seconds(run, prepared.inputs, 1, synchronize)[0]
        )
      estimates[key, mode] = statistics.median(seconds)
    held[key] = prepared
    return {
      'modes': list(prepared.runs),
      'errors': errors,
      'memory': prepared.memory(),
      'compile_seconds': round(compiled - started, 2),
      'check_seconds': round(time.perf_counter() - compiled, 2),
    }

  def timed(who, name, mode, seconds):
    prepared = held[who, name]
    calls = round(seconds / estimates[(who, name), mode])
    calls = max(1, min(100, calls))
    each, host_share = synchronized_seconds(
      prepared.runs[mode], prepared.inputs, calls, synchronize
    )
    return {'seconds': each, 'host_share': host_share, 'calls': calls}

  def profile(who, name, mode):
    prepared = held[who, name]
    kernels = prepared.profile(prepared.runs[mode], prepared.inputs[0])
    return {'kernels': [(kernel[:80], ms) for kernel, ms in kernels]}

  def drop(who, name):
    held.pop((who, name), None)
    if release is not None:
      release()

  process.serve(
    {
      'setup': setup,
      'time': timed,
      'profile': profile,
      'drop': drop,
      'rates': rates,
    },
    **ready,
  )
