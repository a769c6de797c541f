"""Sweeps: search spaces of configs, workers, errors of the command line."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import ml_collections
import pytest

from experiments import record, stamp, sweep
from experiments import study as studies
from longjax.training.settings import make_settings
from tests.training.helpers import write_text

ROOT = pathlib.Path(__file__).resolve().parents[2]

CONFIG = """
from configs import common


def get_config(arg=None):
  config = common.make_config()
  config.data.update(name='text', path={path!r}, loader='numpy')
  config.model = dict(
    num_layers=1, features=8, num_heads=1, dropout_rate=0.1,
    implementation='reference',
  )
  config.stages = (
    dict(length=16, batch_size=4, steps=4, learning_rate=3e-3, windows=8),
  )
  config.evaluation.update(
    length=16, stride=8, batch_size=8, every=2, validation_characters=100,
    test_characters=100,
  )
  config.checkpoint_every = 2
  config.tensorboard = False
  return config


def sweep(trial, config):
  config.stages[0]['learning_rate'] = trial.suggest_float('rate', 1e-4, 1e-1)
  {more}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  write_text(folder / 'text.txt')
  return folder


def write(folder, name, more='pass'):
  path = folder / f'{name}.py'
  path.write_text(CONFIG.format(path=str(folder / 'text.txt'), more=more))
  return path


@pytest.fixture(scope='module')
def parts(folder):
  """(sweep, config) of a file."""

  def load(name, more='pass'):
    path = write(folder, name, more)
    spec = {}
    exec(compile(path.read_text(), str(path), 'exec'), spec)
    return spec['sweep'], spec['get_config']()

  return load


def plan(suggest, config, **more):
  options = dict(
    trials=2,
    sampler='random',
    seed=0,
    name='s',
    pruner='none',
    direction='minimize',
    metric='bits_per_character',
  )
  return sweep.make_plan(suggest, config, **(options | more))


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (
      "config.model.droput_rate = trial.suggest_float('d', 0, 1)",
      "'droput_rate', which the config lacks: did you mean 'dropout_rate'",
    ),
    (
      "config.optimizer.lr = trial.suggest_float('d', 0, 1)",
      "names 'lr', which the config lacks: did you mean ",
    ),
    (
      "config.update(windows=trial.suggest_int('d', 1, 2))",
      "names 'windows', which the config lacks",
    ),
    (
      "config.stages[0]['window'] = trial.suggest_int('d', 1, 2)",
      "unknown key 'window' in stage 0: did you mean 'windows'",
    ),
    (
      "config.stages[0]['steps'] = trial.suggest_int('d', 3, 9)",
      'config.evaluation.every=2 must divide the [3579] steps',
    ),
    ('config.evaluation.every = 0', 'every=0 must divide the 4 steps: a trial'),
  ],
)
def test_a_space_that_cannot_be(more, message, parts):
  suggest, config = parts('wrong', more)
  before = config.to_json()
  with pytest.raises(ValueError, match=message) as error:
    plan(suggest, config)
  assert '\n' not in str(error.value)
  assert config.to_json() == before


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(trials=0), '--trials is missing'),
    (dict(sampler='grid'), '--trials=2: with --sampler=grid there are as many'),
    (dict(sampler='grid', trials=0), "needs choices or a step for 'rate'"),
  ],
)
def test_a_number_of_trials_that_cannot_be(options, message, parts):
  with pytest.raises(studies.StudyError, match=message):
    plan(*parts('right'), **options)


def test_points(parts):
  suggest, config = parts('right')
  drawn, points = plan(suggest, config, trials=30)
  assert len(points) == 30 and len({p['rate'] for p in points}) == 30
  assert drawn.space.keys() == {'rate'}
  assert plan(suggest, config, trials=30)[1] == points
  assert plan(suggest, config, trials=30, seed=1)[1] != points
  assert plan(suggest, config, sampler='tpe')[1] == [{}, {}]
  suggest, config = parts(
    'grid', "config.seed = trial.suggest_int('seed', 0, 2)"
  )
  only_seeds = lambda trial, config: trial.suggest_int('seed', 0, 2)  # noqa: E731
  _, points = plan(only_seeds, config, sampler='grid', trials=0)
  assert points == [{'seed': 0}, {'seed': 1}, {'seed': 2}]


def test_a_trial_gets_its_own_config(parts):
  suggest, config = parts('right')
  with studies.quiet():
    trial = studies.optuna.trial.FixedTrial({'rate': 0.05})
  chosen = sweep.apply(suggest, trial, config)
  assert isinstance(chosen, ml_collections.ConfigDict)
  assert make_settings(chosen).stages[0]['learning_rate'] == 0.05
  assert config.stages[0]['learning_rate'] == 3e-3


def test_the_sweep_of_text8_windows():
  from configs import text8_windows

  config = text8_windows.get_config('sweep')
  drawn, points = plan(text8_windows.sweep, config, trials=24)
  assert drawn.space.keys() == {'windows', 'learning_rate', 'dropout'}
  assert {p['windows'] for p in points} == set(text8_windows.WINDOWS)


def test_no_search_space(folder):
  path = folder / 'without.py'
  path.write_text('def get_config(arg=None):\n  pass\n')
  with pytest.raises(studies.StudyError, match='has no search space: define'):
    sweep.load_sweep(f'{path}:small')


@pytest.mark.parametrize(
  ('cores', 'workers', 'expected'),
  [
    ([0, 1], 1, [[0, 1]]),
    ([0, 1], 2, [[0], [1]]),
    ([4, 5, 6, 7, 8], 2, [[4, 5, 6], [7, 8]]),
    ([0, 1], 3, [[0], [1], [0]]),
  ],
)
def test_cores_are_shared_out(cores, workers, expected):
  assert sweep.shares(cores, workers) == expected


def start(config, workdir, *args, one_core=False):
  command = [
    *(sys.executable, '-m', 'experiments.sweep', f'--config={config}'),
    *(f'--workdir={workdir}', '--study=s', *args),
  ]
  if one_core:
    command = ['taskset', '-c', str(min(os.sched_getaffinity(0))), *command]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ
    | {
      'JAX_COMPILATION_CACHE_DIR': str(config.parent / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_workers_on_one_core(folder, tmp_path):
  config = write(
    folder,
    'right',
    "config.model.features = trial.suggest_categorical('features', [8, 9])",
  )
  workdir = tmp_path / 'runs'
  process = start(
    config,
    workdir,
    *('--parallel=2', '--trials=3', '--sampler=random', '--pruner=none'),
    one_core=True,
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert 'warning: --parallel=2 is above the 1 core(s) here' in err
  with (workdir / 'trials.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['trial'] for row in rows] == ['0', '1', '2']
  assert {row['features'] for row in rows} == {'8', '9'}
  for row in rows:
    trained = workdir / 'trials' / f'{int(row["trial"]):04}'
    if row['features'] == '9':
      # No pairs for the rotation: that trial fails, and says why.
      assert row['state'] == 'fail' and row['error'], row
      continue
    settings = json.loads((trained / 'config.json').read_text())
    assert settings['stages'][0]['learning_rate'] == float(row['rate'])
    lines = (trained / 'metrics.jsonl').read_text().splitlines()
    name = 'validation/bits_per_character'
    scores = [line[name] for line in map(json.loads, lines) if name in line]
    assert len(scores) == 2 and float(row['value']) == scores[-1]
  best = json.loads(out)
  assert best['value'] == min(float(r['value']) for r in rows if r['value'])
  study = json.loads((workdir / 'study.json').read_text())
  assert study['best'] == best and '--parallel=2' in study['command']
  # What every trial ran at, beside the report's own stamp.
  [begun] = stamp.read_starts(workdir)
  assert begun['command'] == study['command']

  summary = '{study.json/best/value:.3f} bits/char'
  folder = tmp_path / '2026-11-21_s'
  found = record.make(workdir, folder, summary=summary, title='S', seed=0)
  assert found == []
  assert (folder / 'trials.csv').exists()
  assert not (folder / 'study.db').exists()


@pytest.mark.full
def test_told_to_stop_it_gives_its_trial_back(folder, tmp_path):
  config = write(folder, 'long', "config.stages[0]['steps'] = 4000")
  process = start(config, tmp_path, '--trials=1')
  for line in process.stderr:
    if 'validation' in line:
      process.send_signal(signal.SIGTERM)
      break
  process.communicate(timeout=120)
  assert process.returncode == 143
  storage = studies.open_storage(f'sqlite:///{tmp_path}/study.db', 60)
  trials = studies.optuna.load_study(study_name='s', storage=storage).trials
  storage.remove_session()
  storage.engine.dispose()
  assert [t.state.name for t in trials] == ['FAIL', 'WAITING']
  assert trials[1].intermediate_values


def test_one_line_for_a_mistake(folder, tmp_path):
  config = write(folder, 'right')
  process = start(
    config, tmp_path, '--trials=1', '--storage=postgresql://a:b@127.0.0.1:1/c'
  )
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1 and not out
  assert err.startswith('error: cannot reach the storage postgresql://a:***@12')
  assert err.count('\n') == 1
