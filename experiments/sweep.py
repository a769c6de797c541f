"""Sweeps: the same run with many settings, in a study that workers share.

  python -m experiments.sweep --config=configs/text8_windows.py:sweep \
    --config.data.path=TEXT8_OR_A_PREFIX --study=windows \
    --workdir=runs/sweep --trials=24 --parallel=2

The config's file says what is tried, beside `get_config`:

  def sweep(trial, config):
    config.optimizer.b2 = trial.suggest_float('b2', 0.9, 0.99)

where `trial` is optuna's and `config` what `get_config` made, locked: a key
that it lacks is refused. --sampler is tpe, random or grid (of choices and
stepped ranges; --trials is then the grid's own). A trial is scored by the last
validation of --metric, never by the test split, and pruned by --pruner when the
median of the others at the same step is better.

The study lies in WORKDIR/study.db, or where --storage says: with
--storage=postgresql://USER:PASSWORD@HOST/NAME the same command joins it on any
number of machines. --parallel=n starts n workers here, each with its share of
the cores (devices other than CPUs are not shared out: start a worker for each,
with CUDA_VISIBLE_DEVICES). The command given again goes on where the study was,
and --trials may then be more. A worker that is killed loses the trial it was
at, which another one, or it itself when started again, takes up at its last
checkpoint after three times --heartbeat seconds.

WORKDIR gets trials/<number>/, the work folder of each trial, worker_<i>.log of
each parallel worker and, at the end, trials.csv, study.json (the plan, the
best trial, importances) and history.png, importances.png and
parallel_coordinates.png.

Exit code: as main.py's; 1 also where workers were lost and trials are left.
"""

import copy
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import optuna
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import cli, stamp, study_report
from experiments import study as studies
from longjax import training
from longjax.training.settings import make_settings, nearest
from longjax.training.stages import first_steps, make_stages

FLAGS = flags.FLAGS


def define_flags():
  config_flags.DEFINE_config_file(
    'config', None, 'File of the config and of sweep(), with its argument.'
  )
  flags.DEFINE_string('workdir', None, 'Folder of the study.')
  flags.DEFINE_string('study', None, 'Name of the study.')
  flags.DEFINE_string('storage', '', "SQLAlchemy's URL; '' for a file.")
  flags.DEFINE_integer('trials', 0, 'How many trials.', lower_bound=0)
  flags.DEFINE_enum('sampler', 'tpe', studies.SAMPLERS, 'Who chooses.')
  flags.DEFINE_enum('pruner', 'median', studies.PRUNERS, 'Who gives up.')
  flags.DEFINE_string('metric', 'bits_per_character', 'Of validation.')
  flags.DEFINE_enum('direction', 'minimize', studies.DIRECTIONS, 'The better.')
  flags.DEFINE_integer('seed', 0, 'Of the choices.')
  flags.DEFINE_integer('parallel', 1, 'Workers here.', lower_bound=1)
  flags.DEFINE_integer('heartbeat', 60, 'Seconds.', lower_bound=1)
  flags.DEFINE_integer('worker', -1, 'Set by --parallel.')
  flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


# The search space of a config.


def load_sweep(config_file: str):
  """The function `sweep` of a config's file.

  Raises:
    StudyError: where the file has none.
  """
  path = config_file.partition(':')[0]
  found = runpy.run_path(path).get('sweep')
  if found is None:
    raise studies.StudyError(
      f'{path} has no search space: define sweep(trial, config) in it'
    )
  return found


def apply(sweep, trial, config: ConfigDict) -> ConfigDict:
  """The config of a trial.

  Raises:
    StudyError: for a key that the config lacks.
    ValueError: for a setting that cannot be.
  """
  chosen = copy.deepcopy(config)
  known = _lock(chosen)
  try:
    sweep(trial, chosen)
  except (KeyError, AttributeError) as error:
    key = re.search(r"""["'](\w+)["']""", str(error).replace('\\', ''))
    if key is None:
      raise
    raise studies.StudyError(
      f'the search space names {key[1]!r}, which the config lacks: '
      f'{nearest(key[1], known)}'
    ) from None
  settings = make_settings(chosen)
  make_stages(settings.stages)
  return chosen


def _lock(config) -> list[str]:
  """Locks a config and what it has, the model too; all of its keys."""
  config.lock()
  known = list(config)
  for value in config.values():
    if isinstance(value, ConfigDict):
      known += _lock(value)
  return known


def check_validated(config: ConfigDict) -> None:
  """Raises StudyError unless the last step is validated."""
  settings = make_settings(config)
  steps = first_steps(make_stages(settings.stages))[-1]
  every = settings.evaluation.every
  if not every or steps % every:
    raise studies.StudyError(
      f'config.evaluation.every={every} must divide the {steps} steps: a trial '
      'is scored by the validation of its last one'
    )


def make_plan(
  sweep, config: ConfigDict, *, trials: int, sampler: str, seed: int, **more
):
  """(plan, points) of `experiments.study.begin`; tries the space out.

  Raises:
    StudyError, ValueError: for a space or a config that cannot be.
  """
  check_validated(config)
  if sampler == 'grid' and trials:
    raise studies.StudyError(
      f"--trials={trials}: with --sampler=grid there are as many as the grid's"
    )
  if sampler != 'grid' and not trials:
    raise studies.StudyError('--trials is missing: how many trials?')
  space, points = studies.explore(
    lambda trial: check_validated(apply(sweep, trial, config)), seed, trials
  )
  if sampler == 'grid':
    points = studies.grid(space)
  elif sampler == 'tpe':
    points = [{}] * trials
  plan = studies.Plan(
    sampler=sampler,
    seed=seed,
    space=studies.describe(space),
    config=config.to_dict(),
    **more,
  )
  return plan, points


# A trial.


def train(trial, sweep, config: ConfigDict, workdir: pathlib.Path, metric: str):
  """Trains a trial in its folder; its value."""
  before = studies.frozen(trial.study, trial)
  folder = workdir / 'trials' / f'{studies.first_number(before):04}'
  reported = set(before.intermediate_values)
  name = f'validation/{metric}'

  def validated(step, figures):
    if metric not in figures:
      raise studies.StudyError(
        f'--metric={metric} is not validated: {", ".join(sorted(figures))} are'
      )
    if step not in reported:
      trial.report(figures[metric], step)
    if trial.should_prune():
      raise optuna.TrialPruned

  try:
    training.train_and_evaluate(
      apply(sweep, trial, config), folder, on_validation=validated
    )
  except optuna.TrialPruned:
    shutil.rmtree(folder / 'checkpoints', ignore_errors=True)
    raise
  # Also of a trial that was lost after its last step.
  return [r[name] for r in training.read_metrics(folder) if name in r][-1]


# Workers.


def shares(cores: list[int], workers: int) -> list[list[int]]:
  """The cores of each worker; where there are too few, one that it shares."""
  if workers >= len(cores):
    return [[cores[i % len(cores)]] for i in range(workers)]
  each, more = divmod(len(cores), workers)
  found, start = [], 0
  for worker in range(workers):
    end = start + each + (worker < more)
    found.append(cores[start:end])
    start = end
  return found


def _cores():
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def run_workers(count: int, workdir: pathlib.Path, study, say) -> list[str]:
  """Starts workers and waits for them; how those that were lost ended."""
  command = [sys.executable, '-m', 'experiments.sweep', *sys.argv[1:]]
  processes, logs = [], []
  for worker in range(count):
    logs.append((workdir / f'worker_{worker}.log').open('a'))
    processes.append(
      subprocess.Popen(
        [*command, f'--worker={worker}'],
        stdout=logs[-1],
        stderr=subprocess.STDOUT,
      )
    )

  def forward(number, frame):
    for process in processes:
      process.send_signal(number)

  before = {
    n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)
  }
  told = set()
  try:
    while any(process.poll() is None for process in processes):
      told |= _news(study, told, say)
      time.sleep(0.5)
    _news(study, told, say)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    for log in logs:
      log.close()
  return [
    f'worker {worker} ended with code {process.returncode}'
    for worker, process in enumerate(processes)
    if process.returncode
  ]


def _news(study, told, say):
  new = [t for t in studies.trials_of(study) if t.number not in told]
  for trial in new:
    say(study_report.line(study, trial))
  return {t.number for t in new}


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def main(argv):
  if argv[1:]:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  logging.set_verbosity(logging.FATAL)
  for name in ('study', 'workdir'):
    if not FLAGS[name].value:
      raise studies.StudyError(f'--{name} is missing')
  is_worker, cores = FLAGS.worker >= 0, _cores()
  if is_worker and hasattr(os, 'sched_setaffinity'):
    # Before JAX makes its threads, of which there is one for each core.
    os.sched_setaffinity(0, shares(cores, FLAGS.parallel)[FLAGS.worker])
  config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
  sweep = load_sweep(config_flags.get_config_filename(FLAGS['config']))
  plan, points = make_plan(
    sweep,
    config,
    trials=FLAGS.trials,
    sampler=FLAGS.sampler,
    seed=FLAGS.seed,
    name=FLAGS.study,
    pruner=FLAGS.pruner,
    direction=FLAGS.direction,
    metric=FLAGS.metric,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  url = FLAGS.storage or f'sqlite:///{workdir.absolute() / "study.db"}'
  storage = studies.open_storage(url, FLAGS.heartbeat)
  study = studies.begin(storage, plan, points)
  if FLAGS.worker == 0 or FLAGS.parallel == 1:
    # Not the process that waits for workers: asked for its device, JAX would
    # take what they need of it.
    command = stamp.command('experiments.sweep').removesuffix(' --worker=0')
    stamp.write_start(workdir, command)
  if is_worker or FLAGS.parallel == 1:
    studies.work(
      storage,
      study,
      plan,
      lambda trial: train(trial, sweep, config, workdir, plan.metric),
      say=say,
      ended=lambda trial: say(study_report.line(study, trial)),
    )
    lost = []
  else:
    if FLAGS.parallel > len(cores):
      say(
        f'warning: --parallel={FLAGS.parallel} is above the {len(cores)} '
        'core(s) here: workers share them'
      )
    lost = run_workers(FLAGS.parallel, workdir, study, say)
  if is_worker:
    return
  for line in lost:
    say(line)
  if not studies.is_complete(study):
    done, wanted = studies.progress(study)
    raise studies.StudyError(
      f'{done} of {wanted} trials are done: give the command again for the rest'
    )
  values = study_report.write_report(
    study, workdir, stamp.stamp(stamp.command('experiments.sweep'))
  )
  print(json.dumps(values.get('best'), indent=2))


def _main(argv):
  try:
    main(argv)
  except training.Preempted as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
  except KeyboardInterrupt:
    sys.exit(130)
  except studies.LOST as error:
    cli.fail(1, f'the storage was lost: {studies.lost_reason(error)}')
  except (ValueError, OSError, ImportError) as error:
    cli.fail(1, str(error))


if __name__ == '__main__':
  define_flags()
  app.run(_main, flags_parser=cli.parse_flags)
