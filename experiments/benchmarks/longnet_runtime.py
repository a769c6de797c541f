"""Forward time against length at a constant number of tokens: LongNet's figure
5, on this machine.

  python -m experiments.benchmarks.longnet_runtime --out=DIR

`--tokens` tokens are cut into sequences of each length, so that LongNet's
attention (segments of 2048 * 4^k with ratios 4^k, to the length of the
sequence) has the same work at all lengths, but for its few more parts, and
dense causal attention twice as much at every doubling. Both run on the xla
path; dense attention is left out from where one run would take longer than
`--dense_seconds` of CPU time.

Lengths and the two kinds take turns, and medians are reported, since others may
use the machine; CPU seconds of the process (over all its threads) beside
seconds of the clock. DIR gets runtime.json and runtime.png.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

import longjax
from experiments import stamp
from experiments.memory import make_pattern

LONGNET, DENSE = 'LongNet', 'dense'


def make_run(kind: str, length: int, tokens: int, heads: int, head_dim: int):
  """A compiled forward pass, as a function of nothing."""
  pattern = (
    longjax.Full() if kind == DENSE else make_pattern('geometric', length)
  )

  def forward(q, k, v):
    return longjax.attention(q, k, v, pattern, implementation='xla')

  shape = (tokens // length, length, heads, head_dim)
  q, k, v = (
    jax.random.normal(key, shape, jnp.float32)
    for key in jax.random.split(jax.random.key(0), 3)
  )
  compiled = jax.jit(forward).lower(q, k, v).compile()
  return lambda: compiled(q, k, v).block_until_ready()


def measure(run) -> dict:
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return {
    'seconds': time.perf_counter() - wall,
    'cpu_seconds': time.process_time() - cpu,
  }


def plot(results: list[dict], path: pathlib.Path, title: str):
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for kind in (LONGNET, DENSE):
    points = [
      (r['length'], r['cpu_seconds']) for r in results if r['kind'] == kind
    ]
    if points:
      axes.plot(*zip(*points, strict=True), 'o-', label=kind)
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='length of a sequence',
    ylabel='CPU seconds of a forward pass, median',
    title=title,
  )
  axes.grid(True, alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add('--tokens', type=int, default=2**20)
  add('--lengths', default='8192,32768,131072,524288,1048576')
  add('--heads', type=int, default=1)
  add('--head_dim', type=int, default=16)
  add('--repeats', type=int, default=3)
  add('--dense_seconds', type=float, default=60)
  args = parser.parse_args(argv)
  try:
    lengths = [int(length) for length in args.lengths.split(',')]
  except ValueError:
    parser.error(f'--lengths must be whole numbers, got {args.lengths!r}')
  for length in lengths:
    if length < 2048 or args.tokens % length:
      parser.error(
        f'--lengths must be at least 2048 and divide --tokens={args.tokens}, '
        f'got {length}'
      )
  sizes = args.tokens, args.heads, args.head_dim
  runs = {(LONGNET, n): make_run(LONGNET, n, *sizes) for n in lengths}
  samples = {key: [] for key in runs}
  for repeat in range(args.repeats):
    for key, run in runs.items():
      samples[key].append(measure(run))
      print(repeat, *key, samples[key][-1], flush=True)
    if not repeat:
      # Once a length is measured, the next is known to take so much longer.
      expected, last = 0.0, None
      for length in lengths:
        if last is not None:
          expected = samples[DENSE, last][0]['cpu_seconds'] * length / last
        if expected > args.dense_seconds:
          break
        run = make_run(DENSE, length, *sizes)
        samples[DENSE, length] = [measure(run)]
        print(repeat, DENSE, length, samples[DENSE, length], flush=True)
        last = length
  results = [
    {
      'kind': kind,
      'length': length,
      'sequences': args.tokens // length,
      'repeats': len(taken),
      **{
        name: round(statistics.median(s[name] for s in taken), 2)
        for name in ('seconds', 'cpu_seconds')
      },
      'all': taken,
    }
    for (kind, length), taken in samples.items()
  ]
  record = {
    **stamp.stamp(
      stamp.command('experiments.benchmarks.longnet_runtime', argv)
    ),
    'results': results,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'runtime.json').write_text(json.dumps(record, indent=2) + '\n')
  title = f'{args.tokens:,} tokens, {args.heads} x {args.head_dim}, CPU'
  plot(results, args.out / 'runtime.png', title)


if __name__ == '__main__':
  main()
