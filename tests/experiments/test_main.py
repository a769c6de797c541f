"""The main program, run as a user runs it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from orbax import checkpoint as orbax

from experiments import stamp
from tests.training.helpers import write_text

ROOT = pathlib.Path(__file__).resolve().parents[2]

CONFIG = """
from configs import common


def get_config(arg=None):
  config = common.make_config()
  config.data.update(name='text', path={path!r}, loader='numpy')
  config.model = dict(
    num_layers=2, features=16, num_heads=2, dropout_rate=0.1,
    implementation='reference',
  )
  config.stages = tuple(
    dict(length=length, batch_size=4, steps=80, learning_rate=3e-3, windows=8)
    for length in (16, 24)
  )
  config.evaluation.update(
    length=32, stride=16, batch_size=8, test_characters=300
  )
  config.log_every = 1
  config.checkpoint_every = 20
  config.keep_checkpoints = 20
  config.tensorboard = False
  return config
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  text = write_text(folder / 'text.txt')
  path = folder / 'tiny.py'
  path.write_text(CONFIG.format(path=str(text)))
  return path


# Starts a program in whose hands no file grows beyond 16 KiB. (A function run
# between fork and exec would do, but JAX warns of forks.)
SMALL_DISK = (
  sys.executable,
  '-c',
  'import os, resource, sys\n'
  'hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n'
  'resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))\n'
  'os.execv(sys.argv[1], sys.argv[1:])',
)


def start(config, workdir, *args, before=(), **kwargs):
  """Starts the program; a cache spares it compiling the same thing again."""
  return subprocess.Popen(
    [
      *before,
      sys.executable,
      '-m',
      'experiments.main',
      f'--config={config}',
      f'--workdir={workdir}',
      *args,
    ],
    cwd=ROOT,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(pathlib.Path(config).parent / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def run(config, workdir, *args):
  process = start(config, workdir, *args)
  out, err = process.communicate(timeout=180)
  return process.returncode, out, err


def kill_at(config, workdir, step, number):
  """Starts the program, sends a signal once it reports a step, waits."""
  process = start(config, workdir)
  seen = []
  for line in process.stderr:
    seen.append(line)
    if line.startswith(f'training {step}/'):
      process.send_signal(number)
      break
  else:
    pytest.fail(f'never reached step {step}:\n{"".join(seen)}')
  _, err = process.communicate(timeout=180)
  return process.returncode, err


def arrays(workdir, step):
  folder = workdir / 'checkpoints' / str(step)
  with orbax.StandardCheckpointer() as reader:
    return {
      f'{part}/{name}': np.asarray(x)
      for part in ('params', 'opt_state')
      for name, x in reader.restore(folder / part).items()
    }


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """A work folder, and what came out of a run nobody disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  code, out, err = run(config, workdir)
  assert code == 0, err
  return workdir, json.loads(out)


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


def test_what_a_record_needs_is_written_down(whole):
  [start] = stamp.read_starts(whole[0])
  assert start['command'].startswith('python -m experiments.main --config=')
  assert {'commit', 'date', 'device', 'versions'} <= start.keys()


def test_killed_and_restarted_is_bit_equal_to_never_killed(
  whole, config, tmp_path
):
  """SIGTERM in the first stage, SIGKILL in the second, then to the end."""
  code, err = kill_at(config, tmp_path, 30, signal.SIGTERM)
  assert code == 143, err
  saved = steps(tmp_path)[-1]
  assert 30 <= saved < 80
  assert f'stopped by SIGTERM: step {saved} is saved' in err
  assert 'Traceback' not in err

  code, err = kill_at(config, tmp_path, 110, signal.SIGKILL)
  assert code == -signal.SIGKILL
  # Nothing could be saved: at most one interval is lost.
  assert 100 <= steps(tmp_path)[-1] < 160

  code, out, err = run(config, tmp_path)
  assert code == 0, err
  assert 'going on from the checkpoint of step 1' in err
  a, b = arrays(whole[0], 160), arrays(tmp_path, 160)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  assert json.loads(out) == whole[1]

  def logged(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r['step'], r['train/loss']) for r in records if 'train/loss' in r]

  assert [step for step, _ in logged(tmp_path)] == list(range(1, 161))
  assert logged(tmp_path) == logged(whole[0])


def test_evaluate_and_sample(whole, config):
  workdir, trained = whole
  code, out, err = run(config, workdir, '--mode=evaluate')
  assert code == 0, err
  result = json.loads(out)
  assert result['step'] == 160
  assert result['bits_per_character'] == pytest.approx(
    trained['bits_per_character'], abs=1e-6
  )
  code, out, err = run(
    config,
    workdir,
    '--mode=sample',
    '--prompt=the qu',
    '--config.sampling.num_tokens=30',
  )
  assert code == 0, err
  assert out.startswith('the qu') and len(out) == len('the qu') + 30 + 1
  code, out, err = run(config, workdir, '--mode=sample', '--prompt=')
  assert (code, out) == (1, '')
  assert err.startswith('error: config.sampling.prompt is empty: give a char')
  assert len(err.splitlines()) == 1


MISTAKES = (
  ('--config.modle.features=4', 2, "'modle' in the config: did you mean 'm"),
  ('--config.stages[0].lenght=4', 2, "did you mean 'length'"),
  ('--config.seed=abc', 2, "invalid literal for int() with base 10: 'abc'"),
  ('--workdr=x', 2, "flag 'workdr'. Did you mean: workdir"),
  ('--config=configs/none.py', 2, 'cannot load the config: [Errno 2] No s'),
  ('--config.stages[7].steps=1', 2, 'index out of range'),
  (
    '--config=configs/demo.py:runlocl',
    2,
    "error: config argument 'runlocl' is not one of runlocal",
  ),
  ('--config.data.path=no_such_file', 1, 'no_such_file'),
  ('--mode=evaluate', 1, 'no folder'),
)
# The program's imports are most of what a mistake costs; each is made in a
# child of one process that has them. argv: config, workdir, mistakes.
MAKE_MISTAKES = """
import json, os, sys, tempfile, warnings
from absl import app
from experiments import cli, main

warnings.simplefilter('ignore')  # JAX's of forks: it has computed nothing yet
config, workdir, *mistakes = sys.argv[1:]
answers = []
for number, mistake in enumerate(mistakes):
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv = ['', f'--config={config}', f'--workdir={workdir}/{number}']
      sys.argv.append(mistake)
      app.run(main._main, flags_parser=cli.parse_flags)
    _, status = os.waitpid(child, 0)
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read())
    answers.append((os.waitstatus_to_exitcode(status), *texts))
print(json.dumps(answers))
"""


@pytest.fixture(scope='module')
def answers(config, tmp_path_factory):
  """{mistake: (exit code, out, err)}."""
  mistakes = [mistake for mistake, _, _ in MISTAKES]
  workdir = tmp_path_factory.mktemp('mistakes') / 'none'
  done = subprocess.run(
    [sys.executable, '-c', MAKE_MISTAKES, config, workdir, *mistakes],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert done.returncode == 0, done.stderr
  return dict(zip(mistakes, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(('mistake', 'code', 'message'), MISTAKES)
def test_mistakes_are_one_line(answers, mistake, code, message):
  got, out, err = answers[mistake]
  assert got == code, err
  assert message in err
  assert len(err.strip().splitlines()) == 1 and err.startswith('error: ')
  assert out == ''


def test_full_disk_while_saving(whole, config, tmp_path):
  """Files may not grow beyond 16 KiB: what was saved before stays."""
  pytest.importorskip('resource', reason='no file size limits here')
  shutil.copytree(
    whole[0] / 'checkpoints' / '100', tmp_path / 'checkpoints' / '100'
  )
  process = start(config, tmp_path, before=SMALL_DISK)
  _, err = process.communicate(timeout=180)
  assert process.returncode == 1, err
  last = err.strip().splitlines()[-1]
  assert last.startswith('error: cannot save the checkpoint of step 120')
  assert last.endswith('(earlier checkpoints are intact: 100)')
  assert 'Traceback' not in err
  assert steps(tmp_path) == [100]


def test_debug_shows_the_traceback(config, tmp_path):
  code, _, err = run(config, tmp_path, '--config.data.path=nothing', '--debug')
  assert code == 1 and 'Traceback' in err


def test_nothing_follows_the_error():
  """Not even of a coroutine that the error kept from being awaited."""
  program = (
    'from experiments import cli\n'
    'async def work(): pass\n'
    'cycle = []\n'
    'cycle += [cycle, work()]\n'
    'del cycle\n'
    'try: raise OSError\n'
    'except OSError: cli.fail(1, "the reason")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (1, 'error: the reason\n')
