"""Runs training steps of a small LongNet on one long sequence, on this CPU.

  python -m experiments.benchmarks.longnet_step --out=DIR

4 layers of 128, 4 heads, bytes (made up), float32, segments of 2048 * 4^k with
ratios 4^k. DIR gets step.json: seconds of the clock and of CPU for each step,
and the most memory the process ever had, libraries included.
"""

import argparse
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import stamp
from experiments.memory import make_pattern, training_step
from longjax import DecoderLM
from longjax.models.longnet import longnet
from longjax.training.optimizer import make_optimizer
from longjax.training.state import split

SIZES = dict(num_layers=4, features=128, num_heads=4, mlp_features=512)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add('--length', type=int, default=2**17)
  add('--steps', type=int, default=2)
  args = parser.parse_args(argv)
  if args.length < 2048:
    parser.error(f'--length must be at least 2048, got {args.length}')
  pattern = make_pattern('geometric', args.length)
  options = dict(SIZES, dtype=jnp.float32, position='rope', vocab_size=256)
  step, _ = training_step(args.length, pattern, **options)
  model = DecoderLM(
    **longnet('125m', **options), patterns=pattern, rngs=nnx.Rngs(0)
  )
  _, params = split(model)
  optimizer = make_optimizer(
    lambda step: 6e-4, name='adamw', weight_decay=0.01, clip_norm=2.0, b2=0.98
  )
  state = {'params': params, 'opt_state': optimizer.init(params)}
  tokens = np.random.default_rng(0).integers(0, 256, (1, args.length + 1))
  batch = {'tokens': jnp.asarray(tokens, jnp.int32)}
  compiled = (
    jax.jit(step, donate_argnums=0).lower(state, batch, np.int32(0)).compile()
  )
  temporary = compiled.memory_analysis().temp_size_in_bytes
  taken = []
  for number in range(args.steps):
    wall, cpu = time.perf_counter(), time.process_time()
    state, outputs = compiled(state, batch, np.int32(number))
    loss = float(outputs['loss'])
    taken.append(
      {
        'seconds': round(time.perf_counter() - wall, 2),
        'cpu_seconds': round(time.process_time() - cpu, 2),
        'loss': round(loss, 4),
      }
    )
    print(taken[-1], flush=True)
  record = {
    **stamp.stamp(stamp.command('experiments.benchmarks.longnet_step', argv)),
    'length': args.length,
    'temporary_gib': round(temporary / 2**30, 2),
    # Linux counts in KiB.
    'peak_rss_gib': round(
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
    ),
    'steps': taken,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'step.json').write_text(json.dumps(record, indent=2) + '\n')
  print(json.dumps(record, indent=2))


if __name__ == '__main__':
  main()
