"""The training loop, from top to bottom."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from longjax.training import metrics as metrics_lib
from longjax.training import stages as stages_lib
from longjax.training.checkpoint import CheckpointError, Checkpoints
from longjax.training.devices import make_devices
from longjax.training.forward import Apply
from longjax.training.optimizer import make_optimizer
from longjax.training.preemption import Preempted, StopRequests
from longjax.training.profile import Profile
from longjax.training.settings import Settings, make_settings
from longjax.training.state import make_train_step, merge_for, split
from longjax.training.tasks import make_task


def train_and_evaluate(
  config: Mapping,
  workdir: str | os.PathLike,
  *,
  on_validation: Callable[[int, Mapping], None] | None = None,
  profile: bool = False,
) -> dict:
  """Trains for a task, or goes on training, and scores the test split.

  Where the work folder holds checkpoints the run goes on from the newest that
  can be read, and ends with the parameters, bit for bit, of a run that was
  never interrupted. The folder gets `config.json`, `metrics.jsonl`,
  `checkpoints/`, `tensorboard/`, `loss.png` and `result.json`.

  Args:
    config: see `longjax.training.settings.Settings` and the task's own; a
      ConfigDict or a nested dictionary.
    workdir: folder of the run.
    on_validation: gets the step and the figures of every validation; what it
      raises ends the run.
    profile: whether to write a trace of a few steps into `profile/`.

  Returns:
    What `result.json` holds: the test score and how it was measured.

  Raises:
    ValueError: for a setting that cannot be, before anything is computed.
    CheckpointError: when the folder cannot be written, the disk is full, or the
      checkpoint there is of another architecture or damaged.
    NonFiniteError: when the loss or the gradient is no longer a number.
    Preempted: after SIGTERM or SIGINT, once the state is saved.
  """
  settings = make_settings(config)
  stages = stages_lib.make_stages(settings.stages)
  starts = stages_lib.first_steps(stages)
  workdir = pathlib.Path(workdir)
  is_first = jax.process_index() == 0

  # ┌─────────────────────────────────────────────────────────────────────────┐
  # │ Devices, data, model, optimizer                                         │
  # └─────────────────────────────────────────────────────────────────────────┘
  devices = make_devices(settings)
  for number, stage in enumerate(stages):
    devices.check_divides(
      f'stage {number} batch_size', stage.batch_size, settings.micro_batches
    )
  devices.check_divides('evaluation batch_size', settings.evaluation.batch_size)
  checkpoints = Checkpoints(
    workdir / 'checkpoints', keep=settings.keep_checkpoints
  )
  task = make_task(settings, workdir)
  devices.check_sequences(task)
  task.place = devices.place
  # The module of every stage is made here, though only one is needed now: a
  # mistake in the last stage should not wait for days.
  merges = [
    merge_for(lambda rngs, stage=stage: task.make_model(stage, rngs))
    for stage in stages
  ]
  schedule = stages_lib.learning_rate_schedule(stages)
  optimizer = make_optimizer(schedule, **dataclasses.asdict(settings.optimizer))
  state = _initial_state(settings, task, stages[0], optimizer, devices)
  num_parameters = sum(p.size for p in state['params'].values())

  # ┌─────────────────────────────────────────────────────────────────────────┐
  # │ Restore                                                                 │
  # └─────────────────────────────────────────────────────────────────────────┘
  step, seed, data_state, counters = 0, settings.seed, None, None
  restored = checkpoints.restore(state)
  if restored:
    step, state, run = restored.step, restored.state, restored.run
    seed, counters = run['seed'], run['counters']
    data_state = _data_state(run, step, stages)
  if is_first:
    (workdir / 'config.json').write_text(
      json.dumps(dataclasses.asdict(settings), indent=2) + '\n'
    )

  # ┌─────────────────────────────────────────────────────────────────────────┐
  # │ Reporting                                                               │
  # └─────────────────────────────────────────────────────────────────────────┘
  progress = metrics_lib.Progress(starts[-1], done=step, enabled=is_first)
  say = progress.say
  say(f'data: {task.description}')
  say(
    f'{num_parameters:,} parameters, {starts[-1]} steps in {len(stages)} '
    f'stage(s), {devices.describe()}'
  )
  if restored:
    say(f'going on from the checkpoint of step {step}')
  metrics = metrics_lib.Metrics(
    workdir,
    step,
    tensorboard=settings.tensorboard,
    enabled=is_first,
    say=say,
  )
  meter = metrics_lib.Meter(schedule, counters, task.unit)

  def save():
    checkpoints.save(
      step,
      state,
      {
        'step': step,
        'stage': number,
        'seed': seed,
        'data': batches.get_state(),
        'counters': meter.counters,
      },
    )

  with contextlib.ExitStack() as on_exit:
    on_exit.callback(checkpoints.close)
    on_exit.callback(metrics.close)
    on_exit.callback(progress.close)
    stop = on_exit.enter_context(StopRequests())
    trace = Profile(workdir / 'profile' if profile else None, meter, say)
    on_exit.callback(trace.close)

    # ┌───────────────────────────────────────────────────────────────────────┐
    # │ Train                                                                 │
    # └───────────────────────────────────────────────────────────────────────┘
    for number, stage in enumerate(stages):
      if step >= starts[number + 1]:
        continue
      say(_describe(number, stage, len(stages)))
      train_step = jax.jit(
        make_train_step(
          task.loss,
          merges[number],
          optimizer,
          seed=seed,
          micro_batches=settings.micro_batches,
          ema_decay=settings.ema_decay,
          sum_over_parts=functools.partial(
            devices.sum_over_parts, sequences=task.sequences
          ),
        ),
        donate_argnums=0,
      )
      functions = {}
      batches = task.make_batches(stage, number)
      if data_state is not None:
        batches.set_state(data_state)
        data_state = None

      try:
        compiled = {}
        while step < starts[number + 1]:
          rows = next(batches)
          batch = devices.shard(rows, task.sequences)
          shapes = _shapes(rows)
          if shapes not in compiled:
            if compiled:
              meter.settle()
            compiled[shapes] = train_step.lower(
              state, batch, np.int32(step)
            ).compile()
            meter.start()
          state, outputs = compiled[shapes](state, batch, np.int32(step))
          step += 1
          meter.dispatched(
            step, outputs, task.tokens(rows) * jax.process_count()
          )
          trace.stepped()

          ends = step == starts[number + 1]
          news = None
          if ends or step % settings.log_every == 0:
            meter.settle()
            line = {
              **meter.summary(),
              'train/stage': number,
              'train/epoch': batches.epoch,
            }
            further = task.metrics(line['train/loss'])
            line |= {f'train/{name}': x for name, x in further.items()}
            metrics.write(step, line)
            news = _news(task, line)
          progress.update(news)
          stop.check(step)

          if _is_due(step, settings.evaluation.every):
            meter.settle()
            scores = task.validate(
              Apply(
                merges[number],
                averaged(state),
                devices,
                check=stop.check,
                compiled=functions,
              )
            )
            say(
              f'step {step}: validation '
              + metrics_lib.show(scores, task.scores)
            )
            metrics.write(
              step,
              {f'validation/{name}': scores[name] for name in task.scores},
            )
            if on_validation is not None:
              on_validation(step, scores)
            meter.start()
          if ends or step % settings.checkpoint_every == 0:
            meter.settle()
            save()
            meter.start()
      except Preempted as e:
        meter.settle()
        save()
        say(f'{e}: step {step} is saved in {checkpoints.folder}')
        raise
      except metrics_lib.NonFiniteError as e:
        good = max(checkpoints.steps(), default=None)
        kept = (
          'there is no checkpoint before it'
          if good is None
          else f'the last good checkpoint is of step {good} in '
          f'{checkpoints.folder}'
        )
        raise metrics_lib.NonFiniteError(f'{e}: stopped; {kept}') from None

    # ┌───────────────────────────────────────────────────────────────────────┐
    # │ Final evaluation                                                      │
    # └───────────────────────────────────────────────────────────────────────┘
    progress.close()
    after = Apply(merges[-1], averaged(state), devices, check=stop.check)
    result = {
      'step': step,
      'parameters': num_parameters,
      **task.test(after, workdir),
    }
    say(f'test {metrics_lib.show(result, task.scores)}')
    metrics.write(step, {f'test/{name}': result[name] for name in task.scores})
    if is_first:
      (workdir / 'result.json').write_text(json.dumps(result, indent=2) + '\n')
      title = f'{task.title}, {num_parameters:,} parameters'
      if not metrics_lib.plot_loss(
        workdir, workdir / 'loss.png', task.curves, title=title
      ):
        say('matplotlib is not installed: no loss.png')
    if settings.report and jax.process_count() > 1:
      say('no report: one process can make it, by the same command')
    elif settings.report:
      first = _initial_state(settings, task, stages[0], optimizer, devices)
      before = Apply(merges[-1], first['params'], devices, check=stop.check)
      task.report(stages[-1], before, after, workdir)
    return result


def averaged(state: Mapping) -> dict:
  """The parameters to evaluate: their moving average where there is one."""
  return state.get('ema', state['params'])


def _initial_state(settings: Settings, task, stage, optimizer, devices) -> dict:
  """The state before the first step."""

  def make():
    # The structure is made anew inside the trace; only arrays leave it.
    _, params = split(task.make_model(stage, nnx.Rngs(settings.seed)))
    state = {'params': params, 'opt_state': optimizer.init(params)}
    if settings.ema_decay:
      state['ema'] = jax.tree.map(lambda x: x.copy(), params)
    return state

  shardings = devices.shardings(jax.eval_shape(make))
  state = jax.jit(make, out_shardings=shardings)()
  for name, array in task.pretrained().items():
    for part in {'params', 'ema'} & state.keys():
      old = state[part][name]
      state[part][name] = devices.copy(np.asarray(array, old.dtype), old)
  return state


def _data_state(run: Mapping, step: int, stages) -> dict | None:
  """Where in its data the restored stage stands; None at a stage's start.

  Raises:
    CheckpointError: when the stages of the config are no longer those the
      checkpoint came from.
  """
  starts = stages_lib.first_steps(stages)
  stage = stages_lib.stage_of(stages, step)
  if stage == run['stage']:
    return run['data']
  if stage == run['stage'] + 1 and step == starts[stage]:
    return None
  raise CheckpointError(
    f'the checkpoint of step {step} is in stage {run["stage"]}, but with the '
    f'stages of this config step {step} is in stage {stage}: they were changed'
  )


def _shapes(rows) -> tuple:
  """The shapes of a batch, for which a step is compiled."""
  return tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(rows))


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _describe(number: int, stage, num_stages: int) -> str:
  text = (
    f'stage {number + 1}/{num_stages}: length {stage.length}, batch size '
    f'{stage.batch_size}, learning rate {stage.learning_rate:.3g}, '
    f'{stage.steps} steps'
  )
  window = stage.window_beyond_length()
  if window:
    text += (
      f'; its widest window {window} exceeds the length {stage.length}: such '
      'layers see all of the sequence before them'
    )
  return text


def _news(task, line: Mapping) -> str:
  memory = line['train/memory_gib']
  return (
    f'{task.news(line)}  '
    f'{line["train/tokens_per_second"]:,.0f} {task.unit}/s  '
    f'lr {line["train/learning_rate"]:.2e}  '
    f'grad {line["train/gradient_norm"]:.2f}'
    + (f'  {memory:.1f} GiB' if memory else '')
  )
