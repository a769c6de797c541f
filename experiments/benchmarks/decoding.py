"""Decoding far into a text on a CPU: LM-Infinite's cache against a whole one.

  python -m experiments.benchmarks.decoding --out=FOLDER
  python -m experiments.benchmarks.decoding --out=FOLDER --model=stories260K.bin

One token after the other from a model (a folder in Hugging Face's format, a
llama2.c .bin, or a random LLaMA of --layers and so on) whose text is already
2,048, 8,192 or 32,768 tokens long. The same weights attend to the first
--start and the last --window keys (LM-Infinite), or to all of them.

First both are checked, on a prompt that is read in chunks, against one pass of
the dense definition, and nothing is timed if they differ. Peak memory is that
of a fresh process for each figure, libraries included (they are listed too).
Repeats take turns, so that both see the same machine. For speed and memory
the caches hold made-up keys: what a token costs depends on no value. Linux
only.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

import numpy as np

from experiments import stamp
from experiments.benchmarks import turns

BOUNDED, WHOLE = 'LM-Infinite', 'whole cache'
TOLERANCE = 1e-4  # of the largest logit


class Benchmark:
  """The model, and the ways to start who decodes."""

  def __init__(self, *, model, sizes, window, start, tokens, seed):
    self._spec = {
      'model': None if model is None else str(pathlib.Path(model).resolve()),
      'sizes': sizes,
      'seed': seed,
      'tokens': tokens,
    }
    self.window, self._start = window, start

  def start(self):
    return turns.Worker('decoding_worker.py', sys.executable)

  def spec(self, who, length, check=False):
    window = self.window if who == BOUNDED else None
    return self._spec | {
      'window': window,
      'start': self._start,
      'length': length,
      'check': check,
    }


def difference(logits, wanted):
  """Of the largest logit; RuntimeError above the tolerance."""
  found = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
  if not found <= TOLERANCE:
    raise RuntimeError(
      f'logits differ by {found:.2g} of the largest from the definition, '
      f'allowed is {TOLERANCE:.2g}: nothing was timed'
    )
  return found


def check_numerics(benchmark, length):
  """{who: difference from the dense definition}, on a prompt of `length`."""
  found = {}
  with benchmark.start() as worker:
    for who in (BOUNDED, WHOLE):
      worker('setup', who, **benchmark.spec(who, length, check=True))
      found[who] = difference(**turns.saved(worker, who))
      worker('drop', who)
  return found


def measure_memory(benchmark, who, length):
  """Peak bytes of a fresh process that decodes after `length` tokens."""
  with benchmark.start() as worker:
    peak = turns.peak_memory(worker, who, **benchmark.spec(who, length))
    cache = int(turns.saved(worker, who)['cache_bytes'])
  return {'who': who, 'length': length, **peak, 'cache_bytes': cache}


def measure_times(benchmark, lengths, repeats, tokens):
  """Times both at each length, in turns; returns (timings, versions)."""
  timings = []
  with benchmark.start() as worker:
    for length in lengths:
      runs = {}
      for who in (BOUNDED, WHOLE):
        worker('setup', who, **benchmark.spec(who, length))
        runs[who] = lambda who=who: worker('run', who)
      for who, answers in turns.take_turns(runs, repeats).items():
        timings.append(timing(who, length, tokens, answers))
        worker('drop', who)
    return timings, worker.ready['versions']


def timing(who, length, tokens, answers):
  """A record of the answers to some runs: seconds for each token."""
  answers = [{k: v / tokens for k, v in answer.items()} for answer in answers]
  return turns.timing(answers, who=who, length=length)


def column(records, value, who):
  """[value at each length] of one of the two."""
  return [record[value] for record in records if record['who'] == who]


def judge(record):
  """{name: ratio}: how both grow, and one against the other."""
  lengths, ratios = record['lengths'], {}
  for name, records, value in (
    ('time', record['timings'], 'median_seconds'),
    ('CPU time', record['timings'], 'median_cpu_seconds'),
    ('cache', record['memory'], 'cache_bytes'),
    ('peak memory', record['memory'], 'peak_bytes'),
  ):
    figures = {who: column(records, value, who) for who in (BOUNDED, WHOLE)}
    for length, bounded, whole in zip(lengths, *figures.values(), strict=True):
      ratios[f'{name}, n={length}: {WHOLE} / {BOUNDED}'] = whole / bounded
    for who, values in figures.items():
      ratios[f'{name}, {who}: n={lengths[-1]} / n={lengths[0]}'] = (
        values[-1] / values[0]
      )
  return ratios


def report(record):
  """Returns the record as text: a table, then the ratios."""
  lines = [f'{"":<32}' + ''.join(f'{f"n={n}":>10}' for n in record['lengths'])]
  for name, records, value, unit in (
    ('ms per token', record['timings'], 'median_seconds', 1e-3),
    ('CPU ms per token', record['timings'], 'median_cpu_seconds', 1e-3),
    ('cache, MB', record['memory'], 'cache_bytes', 1e6),
    ('peak memory, MB', record['memory'], 'peak_bytes', 1e6),
  ):
    for who in (BOUNDED, WHOLE):
      cells = [f'{x / unit:>10.2f}' for x in column(records, value, who)]
      lines.append(f'{f"{who}, {name}":<32}' + ''.join(cells))
  imports = statistics.median(
    m['after_imports_bytes'] for m in record['memory']
  )
  lines.append(f'(memory after the imports alone: {imports / 1e6:.0f} MB)')
  lines += [f'{name}: {ratio:.2f}' for name, ratio in record['ratios'].items()]
  return '\n'.join(lines)


def draw(record, path):
  """Writes a picture: time of a token (dashed: processor time) and memory
  against the text's length."""
  from matplotlib import figure

  canvas = figure.Figure(figsize=(9, 3.6), layout='constrained')
  all_axes = canvas.subplots(1, 3)
  for axes, label, records, value, unit in zip(
    all_axes,
    (
      'ms per token (dashed: processor)',
      'cache (MB)',
      'peak memory (MB)',
    ),
    (record['timings'], record['memory'], record['memory']),
    ('median_seconds', 'cache_bytes', 'peak_bytes'),
    (1e-3, 1e6, 1e6),
    strict=True,
  ):
    for who, color in ((BOUNDED, 'C0'), (WHOLE, 'C1')):
      values = np.array(column(records, value, who)) / unit
      axes.plot(record['lengths'], values, color, marker='o', label=who)
      if axes is all_axes[0]:
        values = np.array(column(records, 'median_cpu_seconds', who)) / unit
        axes.plot(record['lengths'], values, color, linestyle='--')
    axes.set_xscale('log', base=2)
    axes.set(xlabel='tokens in the text', ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
  axes.legend()
  canvas.savefig(path, dpi=150)


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--out', type=pathlib.Path, help='folder for results.json and decoding.png'
  )
  parser.add_argument(
    '--model', type=pathlib.Path, help='folder or .bin; a random LLaMA if none'
  )
  for name, value in (
    ('layers', 8),
    ('features', 512),
    ('heads', 8),
    ('kv_heads', 8),
    ('mlp_features', 1408),
    ('vocabulary', 4096),
  ):
    parser.add_argument(
      f'--{name}', type=int, default=value, help='of the random LLaMA'
    )
  parser.add_argument('--window', type=int, default=512, help='L')
  parser.add_argument('--start', type=int, default=10, help='G')
  parser.add_argument(
    '--lengths', type=int, nargs='+', default=[2048, 8192, 32768]
  )
  parser.add_argument('--tokens', type=int, default=32, help='in each repeat')
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(arguments)
  if args.model and not args.model.exists():
    parser.error(f'--model {args.model}: no such file or folder')
  if args.out and not args.out.is_dir():
    parser.error(f'--out {args.out}: no such folder')
  args.lengths = sorted(args.lengths)
  if args.lengths[0] < args.window + args.start:
    parser.error(
      f'length {args.lengths[0]} is less than window {args.window} and start '
      f'{args.start}: both caches would hold the same'
    )
  for name in ('window', 'tokens', 'repeats'):
    if getattr(args, name) < 1:
      parser.error(f'--{name} {getattr(args, name)}: at least 1 is needed')
  cores = len(os.sched_getaffinity(0))
  if not 1 <= args.threads <= cores:
    parser.error(f'--threads {args.threads}: this machine has {cores} cores')
  return args


def main(arguments=None):
  args = parse(arguments)
  # The workers, and the thread pools in them, inherit the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  os.environ.pop('NPROC', None)
  sizes = {
    'vocab_size': args.vocabulary,
    'num_layers': args.layers,
    'features': args.features,
    'num_heads': args.heads,
    'num_kv_heads': args.kv_heads,
    'mlp_features': args.mlp_features,
  }
  benchmark = Benchmark(
    model=args.model,
    sizes=sizes,
    window=args.window,
    start=args.start,
    tokens=args.tokens,
    seed=args.seed,
  )
  record = {
    **stamp.stamp(
      stamp.command('experiments.benchmarks.decoding', arguments),
      device=stamp.cpu(),
    ),
    'threads': args.threads,
    'seed': args.seed,
    'model': sizes if args.model is None else args.model.name,
    'window': args.window,
    'start': args.start,
    'lengths': args.lengths,
    'tokens': args.tokens,
    'repeats': args.repeats,
  }
  print(json.dumps(record, indent=2))
  length = 2 * args.window + args.start
  record['numerics'] = {
    'length': length,
    'difference': check_numerics(benchmark, length),
  }
  print(f'logits after {length} tokens: {record["numerics"]["difference"]}')
  record['memory'] = [
    measure_memory(benchmark, who, length)
    for who in (BOUNDED, WHOLE)
    for length in args.lengths
  ]
  record['timings'], versions = measure_times(
    benchmark, args.lengths, args.repeats, args.tokens
  )
  record['versions'] |= versions
  record['ratios'] = judge(record)
  print(report(record))
  if args.out:
    text = json.dumps(record, indent=2) + '\n'
    (args.out / 'results.json').write_text(text)
    draw(record, args.out / 'decoding.png')


if __name__ == '__main__':
  main()
