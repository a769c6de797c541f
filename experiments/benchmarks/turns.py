"""Benchmarks on a CPU: implementations in processes of their own, in turns."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent


class Worker:
  """A benchmark process; see worker.py. Use as a context manager."""

  def __init__(self, script, python):
    environment = os.environ | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'HF_HUB_OFFLINE': '1',
    }
    self._process = subprocess.Popen(
      [python, str(HERE / script)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    self.ready = self._answer()  # versions, memory after the imports

  def __call__(self, do, name='case', **spec):
    self._process.stdin.write(
      json.dumps({'do': do, 'name': name} | spec) + '\n'
    )
    self._process.stdin.flush()
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      self.__exit__()
      raise RuntimeError(
        f'{" ".join(map(str, self._process.args))} ended with exit code '
        f'{self._process.returncode}; its error is above'
      )
    return json.loads(line)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def saved(worker: Worker, name='case') -> dict[str, np.ndarray]:
  """What a worker computes of a case that it has set up."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'results.npz')
    worker('save', name, path=path)
    with np.load(path) as file:
      return dict(file)


def check_difference(name, difference, tolerance):
  """Raises RuntimeError unless it is allowed; NaN is not."""
  if not difference <= tolerance:
    raise RuntimeError(
      f'{name} differs by {difference:.2g} between the implementations, '
      f'allowed is {tolerance:.2g}: nothing was timed'
    )


def peak_memory(worker: Worker, name='case', **spec) -> dict[str, int]:
  """Bytes of a fresh process that computes two steps of a case."""
  worker('setup', name, **spec)
  worker('run', name)
  return {
    'peak_bytes': worker('memory')['peak_bytes'],
    'after_imports_bytes': worker.ready['peak_bytes'],
  }


def take_turns(runs, repeats):
  """Calls each function `repeats` times, in turns; returns their answers.

  Who begins changes from turn to turn.
  """
  names = list(runs)
  answers = {name: [] for name in names}
  for turn in range(repeats):
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      answers[name].append(runs[name]())
  return answers


def timing(answers, **case):
  """A record of the answers to some runs: seconds passed, and computed."""
  record = dict(case)
  for key in ('seconds', 'cpu_seconds'):
    record[key] = [answer[key] for answer in answers]
    record[f'median_{key}'] = statistics.median(record[key])
  return record


def find(records, value, who, *case):
  """The `value` of one record, or None if that case was not measured.

  Args:
    records: dictionaries that begin with 'who' and the parts of a case.
    value: the key of what is wanted.
    who, *case: what they begin with.
  """
  for record in records:
    if tuple(record.values())[: 1 + len(case)] == (who, *case):
      return record[value]
  return None


def table(rows):
  """Rows of texts as lines, the first column to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    f'{row[0]:<{widths[0]}}'
    + ''.join(
      f'  {cell:>{width}}'
      for cell, width in zip(row[1:], widths[1:], strict=True)
    )
    for row in rows
  ]


def verdicts(ratios):
  """A line for each ratio: what it is, what it should be, whether it is."""
  return [
    f'{ratio["name"]}: {ratio["ratio"]:.2f} ({ratio["target"]}: '
    f'{"holds" if ratio["holds"] else "FAILS"})'
    for ratio in ratios
  ]


def add_pythons(parser, help_of_ours):
  """Flags --hf_python and --python of an argparse parser."""
  parser.add_argument(
    '--hf_python',
    type=pathlib.Path,
    default=ROOT / '.venv-goldens' / 'bin' / 'python',
    help='Python with torch and transformers',
  )
  parser.add_argument(
    '--python',
    type=pathlib.Path,
    default=pathlib.Path(sys.executable),
    help=help_of_ours,
  )


def check_paths(parser, args):
  """Ends with the parser's error where a Python or --out's folder is not."""
  if not args.hf_python.exists():
    parser.error(
      f'no Python with transformers at {args.hf_python}: run `make goldens`, '
      'or give --hf_python'
    )
  if not args.python.exists():
    parser.error(f'--python {args.python}: no such file')
  if args.out and not args.out.resolve().parent.is_dir():
    parser.error(f'--out {args.out}: no such folder')
