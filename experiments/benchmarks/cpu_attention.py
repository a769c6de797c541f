"""Longformer's attention on a CPU: longjax against Hugging Face, in one run.

  python -m experiments.benchmarks.cpu_attention --out=cpu_attention.json

The layer is q, k and v projections and two-sided sliding-window attention over
[1, n, 12 heads, 64] in float32, 256 keys on each side: exactly what
transformers' LongformerSelfAttention computes. Both get the same weights and
inputs, outputs and gradients are compared first, and nothing is timed if they
differ. Each implementation runs in a process of its own, Hugging Face's in the
environment that `make goldens` builds; repeats take turns, so that both see
the same machine. Peak memory is that of a fresh process for each figure,
libraries included (they are listed too). Linux only.
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np

from experiments import stamp
from experiments.benchmarks import turns

MODES = ('forward', 'forward+backward')
HF, LONGJAX, FULL = 'Hugging Face', 'longjax', 'full attention'
ALONE = {  # longjax without the projections: keys on each side
  'attention alone, 64 keys': 64,
  'attention alone, 512 keys': 512,
}
NARROW, WIDE = ALONE
OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest entry of its kind


class Benchmark:
  """The shape of the problem, and the ways to start who computes it."""

  def __init__(
    self, *, heads, head_dim, side, seed, hf_python, python=sys.executable
  ):
    self._spec = {
      'heads': heads,
      'head_dim': head_dim,
      'side': side,
      'seed': seed,
      'attention': 'window',
      'projections': True,
    }
    self._hf_python, self._python = hf_python, python

  def start(self, who):
    if who == HF:
      return turns.Worker('hf_longformer_worker.py', self._hf_python)
    return turns.Worker('longjax_worker.py', self._python)

  def spec(self, who, length, mode):
    spec = self._spec | {'length': length, 'mode': mode}
    if who == FULL:
      spec |= {'attention': 'full'}
    if who in ALONE:
      spec |= {'side': ALONE[who], 'projections': False}
    return spec

  def full_attention_fits(self, length):
    """Whether logits, weights and one more such matrix fit into memory."""
    needed = 3 * 4 * self._spec['heads'] * length**2
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return needed < free


def compare(expected, actual):
  """Returns {name: difference}; raises RuntimeError above the tolerances.

  The difference of the output is absolute, that of a gradient relative to the
  largest entry of its kind: hidden states, weights or biases (the gradient of
  the keys' bias alone is 0 but for rounding).
  """

  def kind(name):
    return name.split('.')[-1]

  units = {}
  for name, want in expected.items():
    units[kind(name)] = max(units.get(kind(name), 0), np.abs(want).max())
  differences = {}
  for name, want in expected.items():
    tolerance, unit = OUTPUT_TOLERANCE, 1.0
    if name != 'output':
      tolerance, unit = GRADIENT_TOLERANCE, units[kind(name)]
    difference = float(np.abs(actual[name] - want).max() / unit)
    turns.check_difference(name, difference, tolerance)
    differences[name] = difference
  return differences


def check_numerics(benchmark, length):
  """Compares output and gradients of longjax with Hugging Face's."""
  results = {}
  for who in (HF, LONGJAX):
    with benchmark.start(who) as worker:
      worker('setup', **benchmark.spec(who, length, 'forward+backward'))
      results[who] = turns.saved(worker)
  return compare(results[HF], results[LONGJAX])


def measure_memory(benchmark, who, length, mode):
  with benchmark.start(who) as worker:
    found = turns.peak_memory(worker, **benchmark.spec(who, length, mode))
  return {'who': who, 'length': length, 'mode': mode, **found}


def measure_times(benchmark, lengths, repeats):
  """Times everything, in turns; returns (timings, versions)."""
  timings = []
  with benchmark.start(HF) as hf, benchmark.start(LONGJAX) as own:
    for length in lengths:
      for mode in MODES:
        runs = {}
        for who in (HF, LONGJAX, FULL, *ALONE):
          if who == FULL and not benchmark.full_attention_fits(length):
            continue
          worker = hf if who == HF else own
          worker('setup', who, **benchmark.spec(who, length, mode))
          runs[who] = lambda worker=worker, who=who: worker('run', who)
        for who, answers in turns.take_turns(runs, repeats).items():
          timings.append(
            turns.timing(answers, who=who, length=length, mode=mode)
          )
          (hf if who == HF else own)('drop', who)
    return timings, hf.ready['versions'] | own.ready['versions']


def judge(record):
  """Returns the ratios that matter, each beside what it should be."""
  lengths = record['lengths']
  ratios = []

  def seconds(who, length, mode):
    return turns.find(record['timings'], 'median_seconds', who, length, mode)

  def peak(who, length, mode):
    return turns.find(record['memory'], 'peak_bytes', who, length, mode)

  def add(name, ratio, target, holds):
    ratios.append(
      {'name': name, 'ratio': ratio, 'target': target, 'holds': holds}
    )

  for mode, speed in zip(MODES, (4, 5), strict=True):
    for n in lengths:
      case = f'{mode}, n={n}'
      ratio = seconds(HF, n, mode) / seconds(LONGJAX, n, mode)
      name = f'time, {case}: {HF} / {LONGJAX}'
      add(name, ratio, f'>= {speed}', ratio >= speed)
      ratio = peak(LONGJAX, n, mode) / peak(HF, n, mode)
      name = f'peak memory, {case}: {LONGJAX} / {HF}'
      add(name, ratio, '<= 0.5', ratio <= 0.5)
      ratio = seconds(NARROW, n, mode) / seconds(WIDE, n, mode)
      add(f'time, {case}: {NARROW} / {WIDE}', ratio, '<= 0.5', ratio <= 0.5)
    short, long = min(lengths), max(lengths)
    if short < long:
      # 4.6 for four times the length.
      most = round(1.15 * long / short, 2)
      for name, figure in (('time', seconds), ('peak memory', peak)):
        ratio = figure(LONGJAX, long, mode) / figure(LONGJAX, short, mode)
        name = f'{name}, {mode}: {LONGJAX} n={long} / n={short}'
        add(name, ratio, f'<= {most}', ratio <= most)
  return ratios


def report(record):
  """Returns the record as text: a table, then the ratios."""
  columns = [(length, mode) for length in record['lengths'] for mode in MODES]
  rows = [[''] + [f'n={length} {mode}' for length, mode in columns]]
  timed = (HF, LONGJAX, FULL, *ALONE)
  for name, records, value, scale, group in (
    ('time (ms)', 'timings', 'median_seconds', 1e3, timed),
    # Of all threads; says more than the time if the machine is shared.
    ('CPU time (ms)', 'timings', 'median_cpu_seconds', 1e3, timed),
    ('peak memory (MB)', 'memory', 'peak_bytes', 1e-6, (HF, LONGJAX, FULL)),
  ):
    for who in group:
      cells = [
        turns.find(record[records], value, who, *column) for column in columns
      ]
      rows.append(
        [f'{who}, {name}']
        + ['-' if cell is None else f'{scale * cell:.1f}' for cell in cells]
      )
  lines = turns.table(rows)
  imports = {
    entry['who']: entry['after_imports_bytes'] for entry in record['memory']
  }
  lines.append(
    '(memory after the imports alone: '
    + ', '.join(f'{who} {1e-6 * n:.0f} MB' for who, n in imports.items())
    + '; "-": too large for this machine)'
  )
  return '\n'.join([*lines, *turns.verdicts(record['ratios'])])


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--out', type=pathlib.Path, help='JSON file to write; none by default'
  )
  turns.add_pythons(
    parser,
    "Python with longjax's libraries; where JAX's CUDA plugin is also "
    'installed, as for the tests, it alone takes 86 MB of memory',
  )
  parser.add_argument('--lengths', type=int, nargs='+', default=[4096, 16384])
  parser.add_argument('--side', type=int, default=256, help='keys each side')
  parser.add_argument('--heads', type=int, default=12)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(arguments)
  turns.check_paths(parser, args)
  for length in args.lengths:
    if length % (2 * args.side):
      parser.error(
        f'length {length} is no multiple of {2 * args.side}, twice the keys on '
        'each side, which is all that Hugging Face takes'
      )
  cores = len(os.sched_getaffinity(0))
  if not 1 <= args.threads <= cores:
    parser.error(f'--threads {args.threads}: this machine has {cores} cores')
  return args


def main(arguments=None):
  args = parse(arguments)
  # The workers, and the thread pools in them, inherit the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  benchmark = Benchmark(
    heads=args.heads,
    head_dim=args.head_dim,
    side=args.side,
    seed=args.seed,
    hf_python=args.hf_python,
    python=args.python,
  )
  record = {
    # This process computes nothing: versions are those of the workers.
    **stamp.stamp(
      stamp.command('experiments.benchmarks.cpu_attention', arguments),
      device=stamp.cpu(),
    ),
    'threads': args.threads,
    'seed': args.seed,
    'shape': [1, 'n', args.heads, args.head_dim],
    'keys_each_side': args.side,
    'lengths': args.lengths,
    'repeats': args.repeats,
  }
  print(json.dumps(record, indent=2))
  record['numerics'] = {
    length: check_numerics(benchmark, length) for length in args.lengths
  }
  for length, differences in record['numerics'].items():
    gradients = max(
      differences[name] for name in differences.keys() - {'output'}
    )
    print(
      f'n={length}: longjax and Hugging Face agree, output to '
      f'{differences["output"]:.1e}, gradients to {gradients:.1e} of their '
      'largest entry'
    )
  record['memory'] = [
    measure_memory(benchmark, who, length, mode)
    for who in (HF, LONGJAX, FULL)
    for length in args.lengths
    for mode in MODES
    if who != FULL or benchmark.full_attention_fits(length)
  ]
  record['timings'], versions = measure_times(
    benchmark, args.lengths, args.repeats
  )
  record['versions'] |= versions
  record['ratios'] = judge(record)
  print(report(record))
  if args.out:
    args.out.write_text(json.dumps(record, indent=2) + '\n')
    print(f'written to {args.out}')


if __name__ == '__main__':
  main()
