"""Whole models on a CPU: longjax against Hugging Face, in one run.

  python -m experiments.benchmarks.cpu_models --out=cpu_models.json

Longformer-base with a classifier (its first token global) and LED-base (256
target tokens), float32, no dropout, one sequence without padding: a forward
pass, and a training step (loss, gradients with each layer computed again,
AdamW). Both get the same weights, from a folder that transformers writes; loss,
logits and gradients are compared first, and nothing is timed if they differ.
Processes, turns and memory as in cpu_attention.py. Linux only.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np

from experiments import stamp
from experiments.benchmarks import turns

HF, LONGJAX = 'Hugging Face', 'longjax'
MODES = ('forward', 'training step')
# (model, layers of the encoder and, of LED, of the decoder, tokens).
CASES = (
  ('longformer', 12, 4096),
  ('longformer', 4, 16384),
  ('led', 6, 4096),
  ('led', 4, 16384),
)
BASE = {
  'features': 768,
  'heads': 12,
  'mlp_features': 3072,
  'vocab_size': 50265,
  'window': {'longformer': 512, 'led': 1024},  # keys on both sides
  'target_length': 256,
}
# Of the largest entry.
TOLERANCES = {'logits': 1e-4, 'loss': 1e-4, 'gradient': 1e-3}
SPEED, MEMORY = 2, 0.5


class Benchmark:
  """The models, as Hugging Face writes them to a folder of their own."""

  def __init__(
    self, *, folder, hf_python, python=sys.executable, sizes=BASE, seed=0
  ):
    self._folder, self._sizes, self._seed = folder, sizes, seed
    self._hf_python, self._python = hf_python, python

  def start(self, who):
    if who == HF:
      return turns.Worker('hf_models_worker.py', self._hf_python)
    return turns.Worker('longjax_models_worker.py', self._python)

  def spec(self, case, mode):
    model, layers, length = case
    return {
      **self._sizes,
      'window': self._sizes['window'][model],
      'model': model,
      'layers': layers,
      'length': length,
      'mode': mode,
      'seed': self._seed,
      'folder': str(pathlib.Path(self._folder, f'{model}_{layers}_{length}')),
    }

  def write_models(self, cases):
    """Has Hugging Face write each model that is not there yet."""
    for case in cases:
      with self.start(HF) as worker:
        worker('setup', **self.spec(case, 'write'))


def compare(expected, actual):
  """{name: difference, of the largest entry}; RuntimeError above TOLERANCES."""
  differences = {}
  for name, want in expected.items():
    got = actual[name]
    unit = max(np.abs(want).max(), 1e-30)
    difference = float(np.abs(got - want).max() / unit)
    tolerance = TOLERANCES[name]
    turns.check_difference(name, difference, tolerance)
    differences[name] = difference
  return differences


def check_numerics(benchmark, case):
  """Compares what both compute of one case."""
  found = {}
  for mode in MODES:
    results = {}
    for who in (HF, LONGJAX):
      with benchmark.start(who) as worker:
        worker('setup', **benchmark.spec(case, mode), check=True)
        results[who] = turns.saved(worker)
    found |= compare(results[HF], results[LONGJAX])
  return found


def measure_memory(benchmark, who, case, mode):
  with benchmark.start(who) as worker:
    found = turns.peak_memory(worker, **benchmark.spec(case, mode))
  return {'who': who, 'case': list(case), 'mode': mode, **found}


def measure_times(benchmark, cases, repeats):
  """Times everything, in turns; returns (timings, versions)."""
  timings = []
  for case in cases:
    for mode in MODES:
      with benchmark.start(HF) as hf, benchmark.start(LONGJAX) as own:
        workers = {HF: hf, LONGJAX: own}
        for worker in workers.values():
          worker('setup', **benchmark.spec(case, mode))
        runs = {
          who: lambda worker=worker: worker('run')
          for who, worker in workers.items()
        }
        for who, answers in turns.take_turns(runs, repeats).items():
          timings.append(
            turns.timing(answers, who=who, case=list(case), mode=mode)
          )
        versions = hf.ready['versions'] | own.ready['versions']
  return timings, versions


def judge(record):
  """The ratios that matter, each beside what it should be."""
  ratios = []
  for case in record['cases']:
    for mode in MODES:
      for what, records, value in (
        ('time', 'timings', 'median_seconds'),
        ('peak memory', 'memory', 'peak_bytes'),
      ):
        theirs, ours = (
          turns.find(record[records], value, who, case, mode)
          for who in (HF, LONGJAX)
        )
        if what == 'time':
          name, ratio = f'{HF} / {LONGJAX}', theirs / ours
          target, holds = f'>= {SPEED}', ratio >= SPEED
        else:
          name, ratio = f'{LONGJAX} / {HF}', ours / theirs
          target, holds = f'<= {MEMORY}', ratio <= MEMORY
        ratios.append(
          {
            'name': f'{what}, {label(case)}, {mode}: {name}',
            'ratio': ratio,
            'target': target,
            'holds': holds,
          }
        )
  return ratios


def label(case):
  model, layers, length = case
  return f'{model}, {layers} layers, n={length}'


def report(record):
  """Returns the record as text: a table, then the ratios."""
  columns = [(case, mode) for case in record['cases'] for mode in MODES]
  rows = [[''] + [f'{label(case)} {mode}' for case, mode in columns]]
  for name, records, value, scale in (
    ('time (s)', 'timings', 'median_seconds', 1),
    ('CPU time (s)', 'timings', 'median_cpu_seconds', 1),
    ('peak memory (MB)', 'memory', 'peak_bytes', 1e-6),
  ):
    for who in (HF, LONGJAX):
      cells = [
        turns.find(record[records], value, who, *column) for column in columns
      ]
      rows.append([f'{who}, {name}', *(f'{scale * x:.2f}' for x in cells)])
  # A case a line: they are too many for columns.
  lines = turns.table([list(row) for row in zip(*rows, strict=True)])
  return '\n'.join([*lines, *turns.verdicts(record['ratios'])])


def parse_case(text):
  model, *numbers = text.split(',')
  if model not in BASE['window'] or len(numbers) != 2:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not like longformer,12,4096 or led,6,4096: model, layers, '
      'tokens'
    )
  try:
    layers, length = map(int, numbers)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'{text!r}: layers and tokens are whole numbers'
    ) from None
  window = BASE['window'][model]
  if layers < 1 or length < window or length % window:
    raise argparse.ArgumentTypeError(
      f'{text!r}: at least 1 layer, and tokens in multiples of {window}'
    )
  return model, layers, length


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, help='JSON file to write; none by default')
  turns.add_pythons(parser, "Python with longjax's libraries and safetensors")
  add('--cases', type=parse_case, nargs='+', default=list(CASES))
  add('--repeats', type=int, default=5)
  add('--seed', type=int, default=0)
  args = parser.parse_args(arguments)
  turns.check_paths(parser, args)
  if args.repeats < 1:
    parser.error(f'--repeats must be at least 1, got {args.repeats}')
  return args


def main(arguments=None):
  args = parse(arguments)
  record = {
    **stamp.stamp(
      stamp.command('experiments.benchmarks.cpu_models', arguments),
      device=stamp.cpu(),
    ),
    'seed': args.seed,
    'sizes': BASE,
    'cases': [list(case) for case in args.cases],
    'repeats': args.repeats,
  }
  print(json.dumps(record, indent=2))
  with tempfile.TemporaryDirectory() as folder:
    benchmark = Benchmark(
      folder=folder,
      hf_python=args.hf_python,
      python=args.python,
      seed=args.seed,
    )
    benchmark.write_models(args.cases)
    record['numerics'] = {}
    for case in args.cases:
      found = check_numerics(benchmark, case)
      record['numerics'][label(case)] = found
      print(f'{label(case)}: {found}', flush=True)
    record['memory'] = [
      measure_memory(benchmark, who, case, mode)
      for case in args.cases
      for mode in MODES
      for who in (HF, LONGJAX)
    ]
    record['timings'], versions = measure_times(
      benchmark, args.cases, args.repeats
    )
  record['versions'] |= versions
  record['ratios'] = judge(record)
  print(report(record))
  if args.out:
    args.out.write_text(json.dumps(record, indent=2) + '\n')
    print(f'written to {args.out}')


if __name__ == '__main__':
  main()
