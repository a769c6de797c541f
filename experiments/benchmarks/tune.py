"""Times the tiles of the GPU kernels and writes the table of the best.

  python -m experiments.benchmarks.tune --record=FOLDER

For each kind of call (head size; with segment ids or dropout; with a prefix met
by queries of its own; with a residue for each head) and each kernel, every tile
that the kernels take is compiled, compared with the default's results and
timed, in turns. FOLDER gets tuning.json, with all that was tried, and a table
of what beats the default, which `longjax.ops.pallas.tiling` reads once it lies
in longjax/ops/pallas/tiles/; nothing is tuned while training. `--rehearse` goes
through two tiles of a tiny call on a CPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import re
import statistics
import sys
import threading
import time

from experiments import stamp
from experiments.benchmarks import cases, timing
from experiments.benchmarks.process import (
  Failed,
  Hangs,
  Process,
  environment,
)

KERNELS = ('forward', 'dq', 'dkv')
FEATURES = ('plain', 'featured', 'prefix_q', 'residues')
RESIDUES = 4
SIZES = (128, 64, 96, 256, 32)
# A default is left for what is faster by more than the noise.
GAIN = 1.02


def workloads(rehearse):
  """{(head size, feature): case}, the most used first."""
  size = dict(tokens=128, heads=1) if rehearse else dict(tokens=65_536)
  length, width = (128, 50) if rehearse else (32_768, 2048)
  return {
    (d, feature): dataclasses.replace(
      cases.window(length, width, d, **size), name=f'D{d} {feature}'
    )
    for feature in FEATURES
    for d in SIZES
  }


def candidates(kernel, rehearse):
  """Tiles worth a try; what does not fit or compile is recorded as such."""
  if rehearse:
    return [dict(own=64, walk=walk, stages=2, groups=2) for walk in (64, 128)]
  # Forward, two warpgroups may take turns.
  kinds = [dict(groups=1), dict(groups=2)]
  if kernel == 'forward':
    kinds = [dict(groups=2, take_turns=True), dict(groups=2), dict(groups=3)]
  return [
    dict(own=64, walk=walk, stages=stages) | kind
    for kind, walk, stages in itertools.product(
      kinds, (128, 64, 96, 32), (2, 3, 4)
    )
  ]


# In the worker.


def operands(case, feature):
  """(Spec, Operands) of a causal window."""
  import jax
  import jax.numpy as jnp

  from longjax.ops.pallas import contract

  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape, case.dtype)

  b, t, h, d = case.batch, case.length, case.heads, case.size
  left, r = case.branches[0].left, 1
  ids = prefix = residues = None
  if feature == 'residues':
    residues = tuple(head % RESIDUES for head in range(h))
    t, r = t // RESIDUES, RESIDUES
  if feature == 'featured':
    ids = jnp.broadcast_to(jnp.arange(t)[:, None] // 5000, (b, t, 1))
  if feature == 'prefix_q':
    row = jnp.broadcast_to(jnp.arange(10), (b, 10))
    prefix = contract.Prefix(
      normal(b, 10, h, d), normal(b, 10, h, d), row, normal(b, t, 1, h, d)
    )
  q, k, v, dout = (normal(b, t, r, h, d) for _ in range(4))
  where = contract.where_rows(b, left=left)
  spec = contract.Spec(scale=d**-0.5, residues=residues)
  x = contract.Operands(q, k, v, where, ids, ids, None, prefix)
  return spec, x, dout


@functools.lru_cache(1)
def shared(case, kernel):
  """(Spec, inputs, the default's results) of a kernel of a kind of call."""
  import jax

  from experiments.benchmarks import jax_worker
  from longjax.ops.pallas import mosaic_gpu

  spec, x, dout = operands(case, case.name.split()[1])
  _, lse = jax_worker.compiled(functools.partial(mosaic_gpu.forward, spec), x)(
    x
  )
  # Its size matters little, and any will do to compare tiles.
  delta = jax.random.normal(jax.random.key(9), lse.shape)
  inputs = x, lse, delta, dout
  default = jax_worker.compiled(program(spec, kernel, None), *inputs)
  return spec, inputs, default(*inputs)


def program(spec, kernel, config):
  """The function of `inputs` that runs one kernel; the default's tiles if
  `config` is None."""
  from longjax.ops.pallas import mosaic_gpu, mosaic_gpu_backward
  from longjax.ops.pallas.mosaic_gpu_common import GpuConfig

  tiles = None if config is None else GpuConfig(**config)

  def run(x, lse, delta, dout):
    if kernel == 'forward':
      return mosaic_gpu.forward(spec, x, config=tiles)
    configs = None
    if tiles is not None:
      configs = list(mosaic_gpu_backward.default_configs(spec, x))
      configs[KERNELS.index(kernel) - 1] = tiles
      configs = tuple(configs)
    gradients = mosaic_gpu_backward.backward(
      spec, x, lse, delta, dout, configs=configs
    )
    # What the other kernel computes is dropped, and it with that.
    return gradients.q if kernel == 'dq' else (gradients.k, gradients.v)

  return run


def prepare(who, case, reference):
  """A kernel with some tiles, ready to run; see `timing.serve`."""
  del reference
  import jax

  from experiments.benchmarks import jax_worker, numerics

  kernel, config = json.loads(who)
  spec, inputs, default = shared(case, kernel)
  own = jax_worker.compiled(program(spec, kernel, config), *inputs)

  def check():
    results = map(jax.tree.leaves, (own(*inputs), default))
    errors = {}
    for number, pair in enumerate(zip(*results, strict=True)):
      rows = (numerics.to_numpy(y).reshape(-1, y.shape[-1]) for y in pair)
      errors[f'result {number}'] = numerics.error(*rows)
    return numerics.judge(errors)

  return timing.Prepared(
    {'run': own}, [inputs], check, dict, jax_worker.profile
  )


def work():
  import jax

  device = jax.devices()[0]
  timing.serve(
    prepare,
    jax.block_until_ready,
    dict,
    device=device.device_kind,
    jax=jax.__version__,
  )


# In the parent.


def tune(workers, case, kernel, tiles, seconds, repeats):
  """[(tiles or None for the default, median seconds or the reason why not)].

  Tiles are compiled side by side and timed one after the other.
  """
  whos = {json.dumps([kernel, config]): config for config in (None, *tiles)}
  waiting, ready, results = list(whos), {}, {}
  lock = threading.Lock()

  def compile_some(worker):
    while True:
      with lock:
        if not waiting:
          return
        who = waiting.pop(0)
      try:
        worker('setup', within=60, who=who, case=case.to_json())
        ready[who] = worker
      except Failed as failure:
        results[who] = str(failure).split('\n')[0][:200]
        if isinstance(failure, Hangs) or 'CUDA' in results[who]:
          worker.close()
          for other in [w for w in ready if ready[w] is worker]:
            del ready[other]
            results[other] = 'lost with a tile that failed on the device'

  threads = [threading.Thread(target=compile_some, args=(w,)) for w in workers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  times = {who: [] for who in ready}
  for _ in range(repeats):
    for who in list(times):
      try:
        answer = ready[who](
          'time',
          within=30,
          who=who,
          name=case.name,
          mode='run',
          seconds=seconds,
        )
        times[who].append(answer['seconds'])
      except Failed as failure:
        results[who] = str(failure)[:200]
        del times[who]
  for who, worker in ready.items():
    try:
      worker('drop', who=who, name=case.name)
    except Failed:
      pass
  results |= {who: statistics.median(given) for who, given in times.items()}
  return [(whos[who], results[who]) for who in whos]


def entry(size, feature, kernel, results):
  """What is known of one kernel of one kind of call.

  `config` is None where nothing beats the default.
  """
  timed = [(s, c) for c, s in results if not isinstance(s, str)]
  default = next((s for s, c in timed if c is None), None)
  best, config = min(timed, key=lambda pair: pair[0], default=(None, None))
  if default is not None and best * GAIN > default:
    config = None

  def microseconds(value):
    return round(1e6 * value, 2) if isinstance(value, float) else value

  return {
    'kernel': kernel,
    'head_size': size,
    'prefix_q': feature == 'prefix_q',
    'featured': feature == 'featured',
    'residues': feature == 'residues',
    'config': config,
    # Tiles, or None for the default, and microseconds or why there are none.
    'times': [[c, microseconds(s)] for c, s in results],
  }


def shipped(found):
  """The table of tiles: what beats the default."""
  better = [tiles for tiles in found['tiles'] if tiles['config'] is not None]
  return found | {'tiles': better}


def line(case, found):
  times = {json.dumps(c): t for c, t in found['times']}
  failed = [t for t in times.values() if isinstance(t, str)]
  text = (
    f'{case.name} {found["kernel"]}: {found["config"] or "the default"} '
    f'{times[json.dumps(found["config"])]}, default {times["null"]} (us), '
    f'{len(failed)} of {len(times)} failed'
  )
  return text + (f', the first: {failed[0]}' if failed else '')


def write(folder, found):
  from longjax.ops.pallas import tiling

  table = tiling.path_of(found['device']).name
  for name, values in (('tuning.json', found), (table, shipped(found))):
    (folder / name).write_text(json.dumps(values, indent=1) + '\n')


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--record', help='folder to write')
  add('--only', default='', help='regular expression, as in "D128 plain dq"')
  add('--budget-seconds', type=float, default=1e9)
  add('--workers', type=int, default=8)
  add('--repeats', type=int, default=5)
  add('--seconds', type=float, default=0.02, help='of each turn')
  add('--rehearse', action='store_true', help='two tiles, on a CPU')
  add('--worker', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if not args.worker and not args.record:
    parser.error('--record: a folder is needed')
  if args.rehearse:
    args.workers, args.seconds, args.repeats = 1, 0.001, 2
  return args


def main(arguments=None):
  args = parse(arguments)
  if args.worker:
    return work()
  folder = pathlib.Path(args.record)
  folder.mkdir(parents=True, exist_ok=True)
  table = {
    **stamp.stamp(
      stamp.command('experiments.benchmarks.tune', arguments),
      device=stamp.cpu(),
    ),
    'tiles': [],
  }
  started = time.monotonic()
  with open(folder / 'tune.log', 'ab') as log:
    workers = [
      Process(
        sys.executable,
        'experiments.benchmarks.tune',
        '--worker',
        environment=environment(args.rehearse),
        log=log,
      )
      for _ in range(args.workers)
    ]
    try:
      for (size, feature), case in workloads(args.rehearse).items():
        for kernel in KERNELS:
          if not re.search(args.only, f'{case.name} {kernel}'):
            continue
          if time.monotonic() - started > args.budget_seconds:
            print(f'no time left for {case.name} {kernel}')
            continue
          tiles = candidates(kernel, args.rehearse)
          results = tune(
            workers, case, kernel, tiles, args.seconds, args.repeats
          )
          table['tiles'].append(entry(size, feature, kernel, results))
          table |= {k: v for w in workers for k, v in w.ready.items()}
          write(folder, table)
          print(line(case, table['tiles'][-1]), flush=True)
    finally:
      for worker in workers:
        worker.close()


if __name__ == '__main__':
  sys.exit(main())
