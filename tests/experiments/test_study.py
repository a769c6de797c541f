"""Studies that workers share, on SQLite and on PostgreSQL."""

import contextlib
import csv
import json
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import optuna
import pytest
from optuna.trial import TrialState

from experiments import study as studies
from experiments import study_report
from tests.experiments.study_worker import make_plan, objective, suggest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def postgresql():
  """The URL of a PostgreSQL server of our own."""
  programs = {
    name: shutil.which(name)
    or next(pathlib.Path('/usr/lib/postgresql').glob(f'*/bin/{name}'), None)
    for name in ('initdb', 'postgres')
  }
  if None in programs.values():
    pytest.skip('PostgreSQL is not installed: no initdb and postgres')
  import psycopg

  # Where every user may go; the server refuses to be root's.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='longjax_postgresql_'))
  who = {}
  if os.getuid() == 0:
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get('postgres') or names['nobody']
    os.chown(folder, user.pw_uid, user.pw_gid)
    who = {'user': user.pw_uid, 'group': user.pw_gid}
  (folder / 'password').write_text('secret')
  (folder / 'password').chmod(0o644)
  subprocess.run(
    [
      programs['initdb'],
      f'--pgdata={folder}/data',
      '--username=me',
      f'--pwfile={folder}/password',
      '--auth=scram-sha-256',
      '--encoding=UTF8',
      '--locale=C',
      '--no-sync',
    ],
    check=True,
    stdout=subprocess.DEVNULL,
    cwd=folder,
    **who,
  )
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with (folder / 'log').open('w') as log:
    server = subprocess.Popen(
      [
        programs['postgres'],
        *('-D', folder / 'data', '-h', '127.0.0.1', '-p', str(port)),
        *('-k', folder, '-F'),
      ],
      stdout=log,
      stderr=log,
      cwd=folder,
      **who,
    )
  url = f'postgresql://me:secret@127.0.0.1:{port}/postgres'
  deadline = time.monotonic() + 60
  try:
    while True:
      try:
        psycopg.connect(url).close()
        break
      except psycopg.OperationalError:
        if server.poll() is not None or time.monotonic() > deadline:
          pytest.fail((folder / 'log').read_text())
        time.sleep(0.1)
    yield url
  finally:
    server.send_signal(signal.SIGINT)  # at once, without waiting for clients
    server.wait(timeout=60)
    shutil.rmtree(folder)


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
  if request.param == 'sqlite':
    return f'sqlite:///{tmp_path}/study.db'
  return request.getfixturevalue('postgresql')


def start(url, trials, seconds):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'tests.experiments.study_worker'),
      *(url, str(trials), str(seconds)),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_a_killed_worker_loses_one_trial_which_is_tried_again(url):
  with contextlib.ExitStack() as stack:
    slow = stack.enter_context(start(url, 8, 60))
    stack.callback(slow.kill)
    word, number, x = slow.stdout.readline().split()
    assert word == 'start'
    # Two at once: a ticket is taken once, by whoever comes first.
    others = [stack.enter_context(start(url, 8, 0)) for _ in range(2)]
    slow.kill()
    for other in others:
      out, _ = other.communicate(timeout=120)
      assert other.returncode == 0, out

  with opened(url) as storage:
    study = optuna.load_study(study_name='s', storage=storage)
    assert studies.is_complete(study) and studies.progress(study) == (8, 8)
    rows = study_report.rows(study)
  [lost] = [row for row in rows if row['state'] == 'lost']
  assert (lost['trial'], lost['x']) == (int(number), float(x))
  # All others once, and the lost one again with the same parameters.
  [again] = [
    row
    for row in rows
    if row['attempt_at'] == lost['trial'] and row is not lost
  ]
  assert again['x'] == lost['x'] and again['state'] != 'lost'
  assert len(rows) == 9 and len({row['x'] for row in rows}) == 8
  _, points = make_plan(8)
  assert sorted(p['x'] for p in points) == sorted({row['x'] for row in rows})


@contextlib.contextmanager
def opened(url, heartbeat=60):
  """A storage whose connections are closed: left open they are warned of."""
  storage = studies.open_storage(url, heartbeat)
  try:
    yield storage
  finally:
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture
def storage(tmp_path):
  with opened(f'sqlite:///{tmp_path}/study.db') as storage:
    yield storage


def run(storage, plan, points, objective=objective, **options):
  said = []
  study = studies.begin(storage, plan, points)
  studies.work(storage, study, plan, objective, say=said.append, **options)
  return study, said


def test_a_study_and_its_report(storage, tmp_path):
  plan, points = make_plan(24)
  ended = []
  study, _ = run(storage, plan, points, ended=ended.append)
  assert [trial.number for trial in ended] == list(range(24))
  states = {trial.state for trial in ended}
  assert states == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
  [failed] = [t for t in ended if t.state == TrialState.FAIL]
  error = failed.user_attrs['error']
  assert error.startswith('ValueError: x is too large: 0.9')
  assert 'more lines' not in error
  assert error in study_report.line(study, failed)

  values = study_report.write_report(study, tmp_path, {'command': 'c'})
  with (tmp_path / 'trials.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['trial'] for row in rows] == [str(n) for n in range(24)]
  assert [row['error'] for row in rows if row['error']] == [error]
  complete = [row for row in rows if row['state'] == 'complete']
  best = min(complete, key=lambda row: float(row['value']))
  assert values['best']['value'] == float(best['value'])
  assert values['best']['params']['x'] == float(best['x'])
  assert values['importances']['x'] > values['importances']['kind']
  assert values['states']['complete'] == len(complete)
  assert values == json.loads((tmp_path / 'study.json').read_text())
  for name in ('history', 'importances', 'parallel_coordinates'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000


def test_the_same_study_again_goes_on_and_may_be_longer(storage):
  plan, points = make_plan(4)
  run(storage, plan, points)
  study, _ = run(storage, plan, points)
  assert len(study.trials) == 4
  plan, points = make_plan(6)
  study, _ = run(storage, plan, points)
  assert [t.params['x'] for t in study.trials] == [p['x'] for p in points]
  assert studies.progress(study) == (6, 6)


def test_who_is_told_to_stop_gives_the_trial_back(storage):
  class Stop(BaseException):
    pass

  def stopped(trial):
    x, _ = suggest(trial)
    trial.report(x, 0)
    raise Stop

  plan, points = make_plan(2)
  with pytest.raises(Stop):
    run(storage, plan, points, stopped)
  study = optuna.load_study(study_name='s', storage=storage)
  states = [t.state for t in study.trials]
  waiting = TrialState.WAITING
  assert states == [TrialState.FAIL, waiting, waiting]
  again = study.trials[2]
  assert again.params == study.trials[0].params
  assert again.intermediate_values == study.trials[0].intermediate_values
  assert studies.first_number(again) == 0
  study, _ = run(storage, plan, points)
  assert [row['state'] for row in study_report.rows(study)] == [
    'lost',
    'complete',
    'complete',
  ]


def test_who_dies_before_the_first_heartbeat_is_missed_too(tmp_path):
  plan, points = make_plan(1)
  with opened(f'sqlite:///{tmp_path}/study.db', heartbeat=1) as storage:
    # Takes the ticket and is never heard of.
    with pytest.warns(UserWarning, match='Heartbeat'):
      studies.begin(storage, plan, points).ask()
    study, said = run(storage, plan, points, poll=0.2)
    assert said == ['1 trial(s) left, all with other workers']
    assert [row['state'] for row in study_report.rows(study)] == [
      'lost',
      'complete',
    ]


def test_ctrl_c_is_no_failure(storage):
  def interrupted(trial):
    raise KeyboardInterrupt

  plan, points = make_plan(1)
  with pytest.raises(SystemExit) as error:
    run(storage, plan, points, interrupted)
  assert error.value.code == 130
  study = optuna.load_study(study_name='s', storage=storage)
  assert study.trials[-1].state == TrialState.WAITING


def test_tpe_depends_on_the_seed_and_the_trial_only(storage):
  plan, points = make_plan(3, 'one', 'tpe')
  one, _ = run(storage, plan, points)
  plan, points = make_plan(3, 'two', 'tpe')
  two, _ = run(storage, plan, points)
  found = [[t.params['x'] for t in study.trials] for study in (one, two)]
  assert found[0] == found[1]
  assert len(set(found[0])) == 3


def test_a_ticket_added_twice_is_used_once(storage):
  plan, points = make_plan(2)
  study = studies.begin(storage, plan, points)
  # As by two machines that lengthen a study at the same moment.
  study.enqueue_trial(points[1], user_attrs={'ticket': 1})
  studies.work(storage, study, plan, objective, say=lambda line: None)
  assert len(study_report.rows(study)) == 2
  assert studies.progress(study) == (2, 2)


def test_grid():
  def suggest(trial):
    trial.suggest_categorical('kind', ['a', 'b'])
    trial.suggest_int('layers', 2, 6, step=2)
    trial.suggest_float('rate', 0.1, 0.3, step=0.1)

  space, _ = studies.explore(suggest, 0)
  points = studies.grid(space)
  assert len(points) == 18
  assert points[0] == {'kind': 'a', 'layers': 2, 'rate': 0.1}
  assert {p['layers'] for p in points} == {2, 4, 6}


@pytest.mark.parametrize(
  ('suggest', 'message'),
  [
    (
      lambda trial: trial.suggest_float('rate', 0.1, 1.0),
      "needs choices or a step for 'rate', which is any value of 0.1 to 1.0",
    ),
    (
      lambda trial: [trial.suggest_int(f'{i}', 0, 9) for i in range(5)],
      'has 100,000 points: take random or tpe',
    ),
  ],
)
def test_no_grid(suggest, message):
  space, _ = studies.explore(suggest, 0)
  with pytest.raises(studies.StudyError, match=message):
    studies.grid(space)


def test_an_empty_space():
  with pytest.raises(studies.StudyError, match='suggests nothing'):
    studies.explore(lambda trial: None, 0)


def other_suggest(trial):
  trial.suggest_categorical('kind', ['a', 'b'])
  trial.suggest_float('x', -2, 1)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (dict(suggest=other_suggest), r'in use by another sweep: space.x is .*-2'),
    (dict(config={'steps': 4}), 'config.steps is 3 there and 4 here; choose'),
    (dict(sampler='tpe'), 'sampler is random there and tpe here'),
    (
      dict(sampler='tpe', config={'steps': 4}),
      r'config.steps is 3 there and 4 here \(and 1 more\)',
    ),
  ],
)
def test_a_name_in_use(other, message, storage):
  studies.begin(storage, *make_plan(2))
  with pytest.raises(studies.StudyError, match=message) as error:
    studies.begin(storage, *make_plan(2, **other))
  assert '\n' not in str(error.value)


def test_a_name_in_use_by_somebody_else(storage):
  optuna.create_study(study_name='s', storage=storage)
  with pytest.raises(
    studies.StudyError, match='s is in use by a study that is'
  ):
    studies.begin(storage, *make_plan(2), wait=0)


@pytest.mark.parametrize(
  ('url', 'message'),
  [
    (
      'postgresql://me:secret@127.0.0.1:1/none',
      r'the storage postgresql://me:\*\*\*@127.0.0.1:1/none: .*refused',
    ),
    ('sqlite:////no/such/folder/a.db', 'unable to open database file'),
    ('studies', 'cannot reach the storage studies: Could not parse'),
    ('mysql://me:secret@host/db', 'needs a driver that is not installed'),
  ],
)
def test_unreachable_storage(url, message):
  with pytest.raises(studies.StudyError, match=message) as error:
    studies.open_storage(url, 60)
  assert 'secret' not in str(error.value) and '\n' not in str(error.value)
