"""How much memory and arithmetic a config takes, before anything runs.

  python -m experiments.estimate --config=configs/enwik8_longformer.py:small
  python -m experiments.estimate --config=configs/demo.py --device=h200:8

For a stage's training step (the last stage's by default): parameters and
optimizer state, which are exact; what else is held at once (activations,
gradients, what the backward pass needs), counted from the traced program by
`experiments.activations` in seconds; and the peak, read off the compiler, which
may take minutes (--nocompile leaves it out). All for each device of a kind that
need not be there: h200, v5e, v5p, v6e, several as h200:8 or v5p:2x2x1, laid out
as `config.mesh` says. The count follows XLA's rules on GPUs: for one H200 it
was 0.72 to 1.05 of the compiler's figure on five small configs, those of
tests/experiments/test_estimate.py. A TPU's compiler may need less.

With language models no data are read: --vocab_size says how many symbols there
are. With other tasks the data are, and the first batch is what is measured.

Exit code: 2 for a mistake on the command line or in the config, 1 where the
step does not fit or the compilers of `make setup` are missing.
"""

import argparse
import dataclasses
import runpy
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import activations, flops, memory, targets
from longjax.sharding.mesh import DATA, SEQ
from longjax.training import stages as stages_lib
from longjax.training import tasks
from longjax.training.devices import Devices
from longjax.training.optimizer import make_optimizer
from longjax.training.settings import Settings, make_settings
from longjax.training.state import make_train_step, split

LANGUAGE_MODELLING = 'language_modelling'


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step and what it takes, as shapes.

  Attributes:
    f: (state, batch, number of the step) -> (state, outputs).
    state, batch: with shapes and dtypes, and where they lie.
    mesh: of the devices.
  """

  f: Callable
  state: dict
  batch: dict
  mesh: jax.sharding.Mesh

  @property
  def arguments(self):
    return self.state, self.batch, jax.ShapeDtypeStruct((), jnp.int32)

  def tracing(self):
    """As for the devices, which this machine need not have."""
    return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

  def compile(self) -> jax.stages.Compiled:
    with self.tracing():
      step = jax.jit(self.f, donate_argnums=0)
      return step.lower(*self.arguments).compile()

  def activation_bytes(self) -> int:
    """What is held besides the arguments, see `experiments.activations`."""
    with self.tracing():
      return activations.peak(self.f, *self.arguments)


def make_step(
  settings: Settings, number: int, devices: list, vocab_size: int
) -> Step:
  """The step of stage `number`, laid out over devices.

  Raises:
    ValueError: for settings that cannot be, as in training.
  """
  stages = stages_lib.make_stages(settings.stages)
  stage = stages[number]
  placed = Devices(
    {DATA: settings.mesh.data, SEQ: settings.mesh.seq},
    split_parameters=settings.mesh.split_parameters,
    devices=devices,
  )
  placed.check_divides('batch_size', stage.batch_size, settings.micro_batches)
  if settings.task == LANGUAGE_MODELLING:
    settings = dataclasses.replace(settings, data=_NoText(vocab_size))
  task = tasks.make_task(settings)
  placed.check_sequences(task)
  merge, params = split(
    nnx.eval_shape(lambda: task.make_model(stage, nnx.Rngs(0)))
  )
  optimizer = make_optimizer(
    stages_lib.learning_rate_schedule(stages),
    **dataclasses.asdict(settings.optimizer),
  )
  state = {
    'params': params,
    'opt_state': jax.eval_shape(optimizer.init, params),
  }
  if settings.ema_decay:
    state['ema'] = params
  if settings.task == LANGUAGE_MODELLING:
    tokens = jax.ShapeDtypeStruct((stage.batch_size, stage.length), jnp.int32)
    batch = {'tokens': tokens, 'targets': tokens}
  else:
    batch = next(task.make_batches(stage, number))

  def lay(tree, shardings):
    return jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      tree,
      shardings,
    )

  f = make_train_step(
    task.loss,
    merge,
    optimizer,
    seed=settings.seed,
    micro_batches=settings.micro_batches,
    ema_decay=settings.ema_decay,
    sum_over_parts=lambda sums: placed.sum_over_parts(
      sums, sequences=task.sequences
    ),
  )
  return Step(
    f,
    lay(state, placed.shardings(state)),
    lay(batch, placed.batch_shardings(batch, task.sequences)),
    placed.mesh,
  )


class _NoText:
  """In place of `config.data`: what a model has to know of a text."""

  def __init__(self, vocab_size):
    self._corpus = types.SimpleNamespace(
      name='', description='', vocab_size=vocab_size
    )

  def load(self):
    return self._corpus


def bytes_per_device(tree) -> int:
  """Of arrays, or shapes, that lie on devices; of each device its part."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
  """What a compiled program holds besides its arguments, at most."""
  found = compiled.memory_analysis()
  return found.peak_memory_in_bytes - found.argument_size_in_bytes


def describe(
  config, *, stage: int, device: str, vocab_size: int, compile_it: bool
) -> str:
  settings = make_settings(config)
  stages = stages_lib.make_stages(settings.stages)
  if not 1 <= stage <= len(stages):
    raise ValueError(f'--stage={stage} is not one of 1 to {len(stages)}')
  kind, _, shape = device.partition(':')
  devices = (
    targets.devices(device) if shape else [*targets.mesh(kind).devices.flat]
  )
  step = make_step(settings, stage - 1, devices, vocab_size)
  one = stages[stage - 1]
  count = sum(x.size for x in step.state['params'].values())
  counted = step.activation_bytes()
  params = bytes_per_device(step.state['params'])
  held = bytes_per_device(step.state)
  lines = [
    f'stage {stage} of {len(stages)}: length {one.length:,}, batch size '
    f'{one.batch_size}, on {len(devices)} x {kind}; for each device',
    f'parameters           {_show(params)}  {count:,} in all, exact',
    f'optimizer state      {_show(held - params)}  exact'
    + (', with the moving average' if settings.ema_decay else ''),
    f'activations          {_show(counted)}  counted, with gradients',
    f'all of these         {_show(held + counted)}',
  ]
  if compile_it:
    start = time.monotonic()
    compiled = step.compile()
    beside = compiled_bytes(compiled)
    lines.append(
      f'peak                 {_show(held + beside)}  by the compiler (in '
      f'{time.monotonic() - start:.0f} s): activations {beside / 2**30:,.3f} '
      f'GiB, of which {counted / beside:.2f} were counted'
    )
  if settings.task == LANGUAGE_MODELLING:
    forward = flops.of_config(config, one.length, vocab_size, stage - 1).total
    lines.append(
      f'{forward / 1e9:,.3f} GFLOP forward for a sequence, '
      f'{3 * forward * one.batch_size / 1e12:,.3f} TFLOP a step in all'
    )
  return '\n'.join(lines)


def _show(size):
  return f'{size / 2**30:10,.3f} GiB'


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--config', required=True, help='a file, with its argument after :')
  add('--stage', type=int, help='the last one by default')
  add('--device', default='h200', help='h200, v5e, v5p, v6e; h200:8')
  add('--vocab_size', type=int, default=256)
  add('--nocompile', action='store_true', help='without the peak')
  args = parser.parse_args(argv)
  if args.vocab_size < 1:
    parser.error(f'--vocab_size must be at least 1, got {args.vocab_size}')
  path, _, argument = args.config.partition(':')
  try:
    config = runpy.run_path(path)['get_config'](argument)
    if 'stages' not in config:
      raise ValueError('this config trains nothing')
    stage = len(config.stages) if args.stage is None else args.stage
    print(
      describe(
        config,
        stage=stage,
        device=args.device,
        vocab_size=args.vocab_size,
        compile_it=not args.nocompile,
      )
    )
  except (OSError, ValueError, KeyError, NotImplementedError) as error:
    parser.error(f'{args.config}: {" ".join(str(error).split())}')
  except RuntimeError as error:  # JAX's too
    parser.exit(1, f'error: {memory.first_of(error)}\n')


if __name__ == '__main__':
  main()
