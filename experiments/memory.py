"""Peak memory of a LongNet training step against length, read off the compiler.

  python -m experiments.memory --device=h200 --lengths=131072,1048576 --out=DIR
  python -m experiments.memory --device=v5p --schedule=geometric --out=DIR
  python -m experiments.memory --plot --out=DIR

The step (forward, backward, AdamW) of LongNet's 125M model (12 layers of 768,
12 heads, bytes, RoPE, bfloat16 activations, float32 weights) on one sequence is
compiled ahead of time for one device that need not be there; nothing is run.
DIR gets memory.json, to which lines are added, and memory.png.

Schedules: 'paper' has section 4.2's segments, to 32,768. 'geometric' has
2048 * 4^k with ratio 4^k, to the length of the sequence: every token reaches
every segment's end, and each has 2048 keys.
"""

import argparse
import functools
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
from flax import nnx

from configs import longnet_stack
from experiments import stamp, targets
from longjax import DecoderLM, Dilated
from longjax.models.longnet import schedule
from longjax.nn.memory import POLICIES
from longjax.training.devices import Devices
from longjax.training.loss import target_losses
from longjax.training.optimizer import make_optimizer
from longjax.training.state import make_train_step, split

GIB = 2**30
CONFIG = '125m,bytes,rope'
SCHEDULES = ('paper', 'geometric')


def make_pattern(kind: str, length: int) -> Dilated:
  if kind == 'paper':
    return schedule(length)
  segments = [2048]
  while 4 * segments[-1] < length:
    segments.append(4 * segments[-1])
  if segments[-1] < length:
    segments.append(length)
  return Dilated(segments, tuple(w // 2048 for w in segments))


def model_keywords(**options) -> dict:
  """Those of `DecoderLM` but patterns and rngs, with the config's defaults."""
  keywords = longnet_stack.get_config(CONFIG).model.to_dict() | {
    'vocab_size': 256,
    'mlp_piece': 8192,
    'scan_layers': True,
    'remat': 'block',
  }
  keywords |= options
  return keywords | {'dtype': jnp.dtype(keywords['dtype'])}


def training_step(
  length: int, pattern: Dilated, devices: Devices | None = None, **options
):
  """(step, its abstract arguments) of one sequence of `length` tokens.

  Args:
    length, pattern: of the sequence.
    devices: that the sequence is split over; None for one.
    **options: of the model, besides those of configs/longnet_stack.py.
  """
  config = longnet_stack.get_config(CONFIG)
  keywords = model_keywords(**options)

  def make():
    return DecoderLM(**keywords, patterns=pattern, rngs=nnx.Rngs(0))

  merge, params = split(nnx.eval_shape(make))
  optimizer = make_optimizer(
    lambda step: config.stages[0]['learning_rate'], **config.optimizer
  )

  def loss(model, batch, dropout_key):
    del dropout_key
    losses = target_losses(model, batch['tokens'], batch['targets'])
    return losses.mean(), None

  state = {
    'params': params,
    'opt_state': jax.eval_shape(optimizer.init, params),
  }
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  batch = {'tokens': tokens, 'targets': tokens}
  add = None
  if devices is not None:
    add = functools.partial(devices.sum_over_parts, sequences=tuple(batch))

    def lay(tree, shardings):
      return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings,
      )

    state = lay(state, devices.shardings(state))
    batch = lay(batch, devices.batch_shardings(batch, tuple(batch)))
  step = jax.ShapeDtypeStruct((), jnp.int32)
  f = make_train_step(loss, merge, optimizer, seed=0, sum_over_parts=add)
  return f, (state, batch, step)


def compiled_peak(device: str, length: int, kind: str, **options) -> dict:
  """What the compiler says; 'error' where the program does not fit."""
  f, arguments = training_step(length, make_pattern(kind, length), **options)
  found = {'device': device, 'length': length, 'schedule': kind, **options}
  start = time.monotonic()
  try:
    compiled = targets.compile_for(device, f, *arguments, donate_argnums=0)
  except jax.errors.JaxRuntimeError as error:
    found['error'] = first_of(error)
  else:
    memory = compiled.memory_analysis()
    found['peak_gib'] = round(memory.peak_memory_in_bytes / GIB, 2)
  found['compile_s'] = round(time.monotonic() - start, 1)
  return found


def first_of(error: Exception) -> str:
  """What a compiler's error says first; of TPUs, how much memory is needed."""
  needed = re.search(r'Used [\d.]+\w of [\d.]+\w hbm', str(error))
  return needed[0] if needed else str(error).splitlines()[0]


def plot(lines: list[dict], path: pathlib.Path):
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  groups = {}
  for line in lines:
    if 'peak_gib' in line:
      name = ', '.join(
        str(line[key]) for key in ('device', 'schedule', 'remat')
      )
      if line.get('remat_blocks', 1) > 1:
        name += f', inputs of 1 in {line["remat_blocks"]} blocks'
      groups.setdefault(name, []).append((line['length'], line['peak_gib']))
  for name, points in groups.items():
    axes.plot(*zip(*sorted(points), strict=True), 'o-', label=name)
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='tokens in the sequence',
    ylabel='peak memory of a step, GiB',
    title='LongNet, 12 layers of 768, compiled for one device',
  )
  axes.grid(True, alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add('--device', choices=targets.KINDS, default='h200')
  add('--lengths', default='131072', help='with commas between')
  add('--schedule', choices=SCHEDULES, default='paper')
  add('--remat', choices=tuple(POLICIES), default='block')
  add('--remat_blocks', type=int, default=1)
  add('--implementation', default='xla')
  add('--plot', action='store_true', help='only draw what is there')
  args = parser.parse_args(argv)
  try:
    lengths = [int(length) for length in args.lengths.split(',')]
  except ValueError:
    parser.error(f'--lengths must be whole numbers, got {args.lengths!r}')
  if min(lengths) < 2048:
    parser.error(f'--lengths must be at least 2048, got {min(lengths)}')
  args.out.mkdir(parents=True, exist_ok=True)
  record = args.out / 'memory.json'
  lines = json.loads(record.read_text()) if record.exists() else []
  for length in [] if args.plot else lengths:
    line = compiled_peak(
      args.device,
      length,
      args.schedule,
      remat=args.remat,
      remat_blocks=args.remat_blocks,
      implementation=args.implementation,
    )
    # Nothing runs on the device that is compiled for: that is the line's own.
    line['stamp'] = stamp.stamp(
      stamp.command('experiments.memory', argv), device=stamp.cpu()
    )
    print(json.dumps(line), flush=True)
    lines.append(line)
    record.write_text(json.dumps(lines, indent=2) + '\n')
  plot(lines, args.out / 'memory.png')


if __name__ == '__main__':
  main()
