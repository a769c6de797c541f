"""Decoding with LongNet's cache far into a text: equal to one pass over it, and
as dear at position 100,000 as at 10,000.

  python -m experiments.benchmarks.longnet_decoding --out=DIR

First a small model (the paper's segments, to 32,768) reads 100,000 tokens in
chunks, decodes some more, and is compared with one pass over all of them; then
steps of a model of 4 layers of 768 are timed at both positions, taking turns.
For the times the caches hold zeros: what a step costs depends on no value. DIR
gets decoding.json.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import stamp
from longjax import DecoderLM
from longjax.models.longnet import schedule

POSITIONS = (10_000, 100_000)
CHUNK = 2_000
DECODED = 8
TOLERANCE = 1e-4


def make_model(**sizes):
  return DecoderLM(
    256,
    patterns=schedule(32768),
    position='rope',
    rngs=nnx.Rngs(0),
    **sizes,
  )


def largest_difference() -> float:
  """Of logits, relative to the largest; at the last tokens before, and the
  first after, each position, read in chunks and decoded."""
  model = make_model(num_layers=1, features=16, num_heads=2)
  graphdef, state = nnx.split(model)
  length = max(POSITIONS) + DECODED
  tokens = np.random.default_rng(0).integers(0, 256, (1, length))

  @jax.jit
  def whole(state, rows):
    model = nnx.merge(graphdef, state)
    return model.read_out(model.hidden(tokens)[:, rows])

  @jax.jit
  def step(state, tokens, cache):
    return nnx.merge(graphdef, state)(tokens, cache=cache)

  rows = np.concatenate([p + np.arange(DECODED) for p in POSITIONS])
  expected = whole(state, rows)
  cache, at, found = model.init_cache(1), 0, []
  for position in POSITIONS:
    while at < position:
      _, cache = step(state, tokens[:, at : at + CHUNK], cache)
      at += CHUNK
    for _ in range(DECODED):
      logits, cache = step(state, tokens[:, at : at + 1], cache)
      found.append(logits)
      at += 1
    # Back to where chunks go on.
    if position != max(POSITIONS):
      rest = CHUNK - DECODED
      _, cache = step(state, tokens[:, at : at + rest], cache)
      at += rest
  difference = jnp.abs(jnp.concatenate(found, 1) - expected).max()
  return float(difference / jnp.abs(expected).max())


def step_times(repeats: int, steps: int) -> dict:
  """{position: seconds of a step, one for each repeat}."""
  sizes = dict(num_layers=4, features=768, num_heads=12)
  model = make_model(**sizes)
  graphdef, state = nnx.split(model)

  @jax.jit
  def decode(state, token, cache):
    def one(carry, _):
      token, cache = carry
      logits, cache = nnx.merge(graphdef, state)(token, cache=cache)
      return (logits.argmax(-1), cache), None

    (token, _), _ = jax.lax.scan(one, (token, cache), None, length=steps)
    return token

  cache = model.init_cache(1)
  token = jnp.zeros((1, 1), jnp.int32)
  caches = {
    position: dataclasses.replace(cache, lengths=cache.lengths + position)
    for position in POSITIONS
  }
  jax.block_until_ready(decode(state, token, cache))
  times = {position: [] for position in POSITIONS}
  for _ in range(repeats):
    for position, cache in caches.items():
      start, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(decode(state, token, cache))
      times[position].append(
        {
          'seconds': (time.perf_counter() - start) / steps,
          'cpu_seconds': (time.process_time() - cpu) / steps,
        }
      )
  return times


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add('--repeats', type=int, default=7)
  add('--steps', type=int, default=16)
  args = parser.parse_args(argv)
  difference = largest_difference()
  print(f'largest difference {difference:.2g} of the largest logit', flush=True)
  if not difference <= TOLERANCE:
    parser.error(f'decoding differs from one pass by {difference:.2g}')
  times = step_times(args.repeats, args.steps)
  results = [
    {
      'position': position,
      **{
        name: round(statistics.median(t[name] for t in taken), 5)
        for name in ('seconds', 'cpu_seconds')
      },
      'all': taken,
    }
    for position, taken in times.items()
  ]
  record = {
    **stamp.stamp(
      stamp.command('experiments.benchmarks.longnet_decoding', argv)
    ),
    'largest_difference': difference,
    'results': results,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / 'decoding.json').write_text(json.dumps(record, indent=2) + '\n')
  for result in results:
    print(
      f'position {result["position"]:,}: {result["seconds"]:.4f} s a token '
      f'({result["cpu_seconds"]:.4f} of CPU)'
    )


if __name__ == '__main__':
  main()
