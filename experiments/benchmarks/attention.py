"""longjax's GPU kernels against everybody else's, in one run.

  python -m experiments.benchmarks.attention --record=FOLDER

Cases and their order are in cases.py. Before a case is timed, an
implementation's outputs and gradients are compared with float32 ones
(numerics.py); who differs is not timed. Each implementation runs in one of four
processes, which take turns; timing.py says how time is taken. What fails,
refuses or hangs is recorded with its reason, and the run goes on. FOLDER gets
results.json after each case, and a README.md with the table and the verdict on
each target of the project. `--rehearse` runs tiny cases on a CPU.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import sys
import tempfile
import threading
import time

from experiments import stamp
from experiments.benchmarks import cases, process, report
from experiments.benchmarks.cases import MODES
from experiments.benchmarks.process import ROOT, Failed, Hangs, Process

MODULES = {
  'mosaic': 'experiments.benchmarks.jax_worker',
  'jax': 'experiments.benchmarks.jax_worker',
  'flex': 'experiments.benchmarks.torch_worker',
  'torch': 'experiments.benchmarks.torch_worker',
}
ROLE = {who: role for role, names in cases.WORKERS.items() for who in names}
# A kernel or a compiler that hangs.
SETUP_SECONDS, TIMING_SECONDS = 120, 60
# After so many hangs an implementation is not asked again.
MOST_HANGS = 2
# Enough of one implementation in one mode of a case.
MOST_SECONDS = 2.0
# Above this, a case has the device's memory for itself.
HEAVY_BYTES = 8e9


def input_bytes(case) -> float:
  return 8.0 * case.batch * case.length * case.heads * case.size


def batches(todo, lanes):
  """Cases that are set up side by side; heavy ones alone."""
  batch = []
  for case in todo:
    heavy = input_bytes(case) * 2 > HEAVY_BYTES
    if batch and (heavy or len(batch) == lanes):
      yield batch
      batch = []
    batch.append(case)
    if heavy:
      yield batch
      batch = []
  if batch:
    yield batch


class Lane:
  """One process for each role; they set up one case at a time."""

  def __init__(self, pythons, environment, scratch, log, hangs, without):
    self._reference = os.path.join(scratch, f'{id(self)}.npz')
    self._without_profiler = set()  # roles; asked once
    self._hangs = hangs  # {implementation: how often}, of all lanes
    self._without = without
    self.roles = {
      role: Process(pythons[module], module, environment=environment, log=log)
      for role, module in MODULES.items()
    }

  def set_up(self, case, record):
    """Sets up every implementation, each role in a thread of its own."""
    names = [
      who
      for who in (cases.MOSAIC, *case.rivals())
      if not (self._without and re.search(self._without, who))
    ]

    def one_role(role):
      for who in names:
        if ROLE[who] == role:
          self._set_up(who, case, record)

    threads = [
      threading.Thread(target=one_role, args=(role,)) for role in self.roles
    ]
    if case.family == 'layer':
      # Hugging Face's layer in float32 is the reference of the others.
      pathlib.Path(self._reference).unlink(missing_ok=True)
      one_role('torch')
      threads.pop()
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  def _set_up(self, who, case, record):
    entry = record.setdefault(who, {})
    if self._hangs.get(who, 0) >= MOST_HANGS:
      entry['failed'] = f'not asked again after {MOST_HANGS} hangs'
      return
    try:
      entry.update(
        self.roles[ROLE[who]](
          'setup',
          within=SETUP_SECONDS,
          who=who,
          case=case.to_json(),
          reference=self._reference,
        )
      )
    except Hangs as hang:
      self._hangs[who] = self._hangs.get(who, 0) + 1
      entry['failed'] = str(hang)
    except Failed as failure:
      self.fail(who, entry, failure)

  def fail(self, who, entry, failure):
    """Notes the reason; what CUDA has broken is ended."""
    entry['failed'] = str(failure)
    if re.search('CUDA_ERROR|CUDA error|illegal|misaligned', str(failure)):
      self.roles[ROLE[who]].close()

  def drop(self, case, record):
    for who in record:
      self._quietly(who, 'drop', who=who, name=case.name)

  def _quietly(self, who, do, /, **request):
    try:
      return self.roles[ROLE[who]](do, within=TIMING_SECONDS, **request)
    except Failed as failure:
      return {'failed': str(failure)}

  def take_turns(self, case, record, repeats, seconds):
    """Times all that are set up, in turns; who begins changes."""
    for mode in MODES:
      answers = {
        who: []
        for who, entry in record.items()
        if mode in entry.get('modes', ())
      }
      spent = dict.fromkeys(answers, 0.0)
      for turn in range(repeats):
        names = list(answers)
        first = turn % max(1, len(names))
        for who in names[first:] + names[:first]:
          if spent[who] > MOST_SECONDS:
            continue
          try:
            answer = self.roles[ROLE[who]](
              'time',
              within=TIMING_SECONDS,
              who=who,
              name=case.name,
              mode=mode,
              seconds=seconds,
            )
          except Failed as failure:
            self.fail(who, record[who], failure)
            del answers[who]
            continue
          spent[who] += answer['seconds'] * answer['calls']
          answers[who].append(answer)
      for who, given in answers.items():
        record[who][mode] = {
          'seconds': statistics.median(a['seconds'] for a in given),
          'all_seconds': [a['seconds'] for a in given],
          'host_share': statistics.median(a['host_share'] for a in given),
          'calls': given[0]['calls'],
        }

  def profile(self, case, record):
    """Each kernel's time in ours and in the fastest rival, if it can be had."""
    for mode in MODES:
      timed = {
        who: entry[mode]['seconds']
        for who, entry in record.items()
        if mode in entry
      }
      ours = timed.pop(cases.MOSAIC, None)
      chosen = [cases.MOSAIC] if ours is not None else []
      if timed:
        chosen.append(min(timed, key=timed.get))
      for who in chosen:
        if ROLE[who] in self._without_profiler:
          continue
        answer = self._quietly(
          who, 'profile', who=who, name=case.name, mode=mode
        )
        record[who].setdefault('profile', {})[mode] = answer
        if 'failed' in answer:
          self._without_profiler.add(ROLE[who])

  def close(self):
    for worker in self.roles.values():
      worker.close()


def measure_rates(lane):
  """Rates of this device now, by each library; failures with the reason."""
  found = {}
  for role in ('jax', 'torch'):
    try:
      found[role] = lane.roles[role]('rates', within=TIMING_SECONDS)
      found[role] |= lane.roles[role].ready
    except Failed as failure:
      found[role] = {'failed': str(failure)}
  return found


class Record:
  """The folder's results.json and README.md."""

  def __init__(self, folder, resumed=None):
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    self.values = {'runs': [], 'cases': {}}
    if resumed:
      self.values = json.loads(pathlib.Path(resumed).read_text())

  def write(self):
    values = self.values
    self._write('results.json', json.dumps(values, indent=1) + '\n')
    self._write('README.md', report.text(values))

  def _write(self, name, text):
    # Whole or not at all: the run may be ended at any moment.
    temporary = self._folder / f'.{name}'
    temporary.write_text(text)
    temporary.replace(self._folder / name)


def run(args, record, todo):
  """Times the cases; returns how many were left for want of time."""
  deadline = time.monotonic() + args.budget_seconds
  environment = process.environment(args.rehearse) | {
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
  }
  pythons = {MODULES['jax']: args.python, MODULES['torch']: args.torch_python}
  log_path = pathlib.Path(args.record) / 'workers.log'
  with (
    open(log_path, 'ab') as log,
    tempfile.TemporaryDirectory() as scratch,
  ):
    hangs = {}
    lanes = [
      Lane(pythons, environment, scratch, log, hangs, args.without)
      for _ in range(args.lanes)
    ]
    try:
      left, last = list(todo), 0.0
      for batch in batches(todo, args.lanes):
        started = time.monotonic()
        if started + last > deadline:
          break
        if batch[0] is todo[0]:
          record.values['runs'][-1]['rates'] = measure_rates(lanes[0])
          record.write()
        if not time_batch(args, record, batch, lanes, deadline):
          break
        left = left[len(batch) :]
        last = time.monotonic() - started
      return [case.name for case in left]
    finally:
      for lane in lanes:
        lane.close()


def time_batch(args, record, batch, lanes, deadline):
  """Sets cases up side by side and times one after the other.

  Returns False, and records nothing, if the time was up before the timing.
  """
  entries = [
    {
      'run': len(record.values['runs']) - 1,
      'case': case.to_json(),
      'pairs': cases.pairs(case),
      'results': {},
    }
    for case in batch
  ]
  started = time.monotonic()
  threads = [
    threading.Thread(target=lane.set_up, args=(case, entry['results']))
    for lane, case, entry in zip(lanes, batch, entries, strict=False)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  ready = time.monotonic()
  if ready > deadline:
    return False
  for lane, case, entry in zip(lanes, batch, entries, strict=False):
    lane.take_turns(case, entry['results'], args.repeats, args.seconds)
    record.values['cases'][case.name] = entry
    record.write()
    print(report.lines(case.name, entry), flush=True)
  for lane, case, entry in zip(lanes, batch, entries, strict=False):
    if not args.no_profile:
      lane.profile(case, entry['results'])
    lane.drop(case, entry['results'])
  record.write()
  if any(input_bytes(case) * 2 > HEAVY_BYTES for case in batch):
    # XLA does not give memory back.
    for lane in lanes:
      lane.close()
  print(
    f'  (set up in {ready - started:.0f} s, timed in '
    f'{time.monotonic() - ready:.0f} s)',
    flush=True,
  )
  return True


def default_torch_python():
  goldens = ROOT / '.venv-goldens' / 'bin' / 'python'
  return goldens if goldens.exists() else pathlib.Path(sys.executable)


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--record', required=True, help='folder to write')
  add('--resume', help='results.json whose cases are kept and not run again')
  add('--only', default='', help='regular expression that case names match')
  add('--without', help='regular expression of implementations to leave out')
  add('--budget-seconds', type=float, default=math.inf)
  add('--repeats', type=int, default=5, help='turns of each implementation')
  add('--seconds', type=float, default=0.06, help='of each turn')
  add('--lanes', type=int, default=3, help='cases set up side by side')
  add('--python', type=pathlib.Path, default=pathlib.Path(sys.executable))
  add('--torch-python', type=pathlib.Path, default=default_torch_python())
  add('--no-profile', action='store_true', help='no times of single kernels')
  add('--list', action='store_true', help='print the cases and end')
  add('--rehearse', action='store_true', help='tiny cases, on a CPU')
  args = parser.parse_args(arguments)
  for name in ('repeats', 'lanes'):
    if getattr(args, name) < 1:
      parser.error(f'--{name} {getattr(args, name)}: at least 1')
  if args.rehearse:
    args.lanes, args.repeats, args.seconds = 1, min(args.repeats, 2), 0.001
  if args.resume and not pathlib.Path(args.resume).is_file():
    parser.error(f'--resume {args.resume}: no such file')
  return args


def main(arguments=None):
  args = parse(arguments)
  known = cases.rehearsal_cases() if args.rehearse else cases.all_cases()
  record = Record(args.record, args.resume)
  todo = [
    case
    for case in known
    if re.search(args.only, case.name)
    and case.name not in record.values['cases']
  ]
  if args.list:
    for case in todo:
      flops = cases.useful_flops(case, MODES[0])
      print(
        f'{case.name}: batch {case.batch}, {flops / 1e12:.3g} TFLOP forward'
      )
    return
  record.values['runs'].append(
    {
      # The workers say which GPU.
      **stamp.stamp(
        stamp.command('experiments.benchmarks.attention', arguments),
        device=stamp.cpu(),
      ),
      'repeats': args.repeats,
      'seconds': args.seconds,
      'rehearsal': args.rehearse,
    }
  )
  left = run(args, record, todo)
  record.values['runs'][-1]['not_reached'] = left
  record.write()
  print(report.text(record.values))
  print(f'written to {args.record}')


if __name__ == '__main__':
  main()
