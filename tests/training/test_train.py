"""The loop as a whole, on a tiny model and text."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax import checkpoint as orbax

import longjax
from longjax import training
from longjax.training import train as train_lib
from longjax.training.state import split
from tests.training.helpers import tiny, write_text

FULL = dict(
  optimizer=dict(name='muon'),
  ema_decay=0.9,
  micro_batches=2,
  keep_checkpoints=9,
)

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp('text') / 'text.txt')


def one_layer(text, **stage):
  """The smallest thing that can be trained."""
  config = tiny(text)
  config['model'] |= dict(num_layers=1)
  config['stages'] = (config['stages'][0] | stage,)
  return config


def arrays(workdir, step):
  """Every array of a checkpoint, by part and name."""
  folder = workdir / 'checkpoints' / str(step)
  with orbax.StandardCheckpointer() as reader:
    parts = {
      part.name: reader.restore(part)
      for part in folder.iterdir()
      if part.name in ('params', 'opt_state', 'ema')
    }
  return {
    f'{part}/{name}': np.asarray(x)
    for part, flat in parts.items()
    for name, x in flat.items()
  }


def assert_bit_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def metric_steps(workdir, key):
  return [r['step'] for r in training.read_metrics(workdir) if key in r]


@pytest.fixture(scope='module')
def uninterrupted(text, tmp_path_factory):
  """(work folder, result) of a run with everything on."""
  workdir = tmp_path_factory.mktemp('whole')
  config = tiny(text, **FULL)
  config['evaluation']['every'] = 5
  return workdir, training.train_and_evaluate(config, workdir)


def test_what_a_run_leaves(uninterrupted):
  workdir, result = uninterrupted
  assert json.loads((workdir / 'result.json').read_text()) == result
  assert result['step'] == 12 and result['characters'] == 300
  assert (result['length'], result['stride']) == (32, 16)
  assert not result['whole_split'] and '90/5/5' in result['description']
  assert metric_steps(workdir, 'train/loss') == [2, 4, 6, 8, 10, 12]
  assert metric_steps(workdir, 'validation/bits_per_character') == [5, 10]
  assert metric_steps(workdir, 'test/bits_per_character') == [12]
  last = training.read_metrics(workdir)[-2]
  assert last['train/characters'] == 6 * 4 * 32 + 6 * 4 * 48
  assert last['train/learning_rate'] == pytest.approx(3e-3)
  config = json.loads((workdir / 'config.json').read_text())
  assert config['ema_decay'] == 0.9 and config['seed'] == 0
  assert (workdir / 'loss.png').exists()


def test_it_learns(uninterrupted):
  losses = [
    r['train/bits_per_character']
    for r in training.read_metrics(uninterrupted[0])
    if 'train/loss' in r
  ]
  assert losses[-1] < losses[0] - 1


def test_the_average_is_what_is_evaluated(uninterrupted, text):
  workdir, result = uninterrupted
  again = training.evaluate(tiny(text, **FULL), workdir)
  assert again['bits_per_character'] == pytest.approx(
    result['bits_per_character'], abs=1e-6
  )
  plain = training.evaluate(tiny(text, **FULL | dict(ema_decay=0.0)), workdir)
  assert plain['bits_per_character'] != again['bits_per_character']


@pytest.mark.parametrize('stop_at', [3, 6, 9])
def test_stopped_and_resumed_is_bit_equal(
  uninterrupted, text, tmp_path, monkeypatch, stop_at
):
  """In the first stage, exactly at the boundary, and in the second."""
  config = tiny(text, **FULL)
  config['evaluation']['every'] = 5
  calls = []

  def check(self, step=None):
    del step
    calls.append(0)
    if len(calls) == stop_at:
      raise training.Preempted(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(train_lib.StopRequests, 'check', check)
    # Validation asks as well; without it the steps are what is counted.
    with pytest.raises(training.Preempted) as e:
      quiet = config | {'evaluation': config['evaluation'] | {'every': 0}}
      training.train_and_evaluate(quiet, tmp_path)
  assert e.value.exit_code == 143
  assert (tmp_path / 'checkpoints' / str(stop_at)).is_dir()

  result = training.train_and_evaluate(config, tmp_path)
  whole, expected = uninterrupted
  assert_bit_equal(arrays(tmp_path, 12), arrays(whole, 12))
  assert result['bits_per_character'] == expected['bits_per_character']
  assert metric_steps(tmp_path, 'train/loss') == [2, 4, 6, 8, 10, 12]
  losses, wanted = (
    [r['train/loss'] for r in training.read_metrics(w) if 'train/loss' in r]
    for w in (tmp_path, whole)
  )
  assert losses == wanted


def test_a_finished_run_only_evaluates_again(uninterrupted, text):
  workdir, result = uninterrupted
  before = (workdir / 'metrics.jsonl').read_text()
  config = tiny(text, **FULL)
  config['evaluation']['every'] = 5
  assert training.train_and_evaluate(config, workdir) == result
  assert (workdir / 'metrics.jsonl').read_text() == before


def test_sample(uninterrupted, text):
  config = tiny(text, **FULL, sampling=dict(prompt='the ', num_tokens=20))
  prompt, continuation = training.sample(config, uninterrupted[0])
  assert prompt == b'the ' and len(continuation) == 20
  assert training.sample(config, uninterrupted[0]) == (prompt, continuation)
  config['sampling']['prompt'] = ''
  with pytest.raises(ValueError, match='prompt is empty'):
    training.sample(config, uninterrupted[0])


def test_checkpoint_by_folder_or_step(uninterrupted, text, tmp_path):
  workdir, _ = uninterrupted
  config = tiny(text, **FULL)
  for where in (workdir, workdir / 'checkpoints'):
    assert training.load(config, tmp_path, where).step == 12
  where = workdir / 'checkpoints' / '4'
  assert training.load(config, tmp_path, where).step == 4
  with pytest.raises(training.CheckpointError, match='no folder .*nowhere'):
    training.load(config, tmp_path / 'nowhere')
  with pytest.raises(training.CheckpointError, match='no checkpoint in'):
    training.load(config, tmp_path)


def test_another_architecture(uninterrupted, text):
  config = tiny(text, **FULL)
  config['model']['features'] = 24
  for run in (training.train_and_evaluate, training.evaluate):
    with pytest.raises(
      training.CheckpointError, match=r'another architecture: .*16\) there'
    ):
      run(config, uninterrupted[0])


def test_changed_stages(uninterrupted, text, tmp_path):
  config = tiny(text, **FULL)
  config['stages'][0]['steps'] = 3
  config['stages'][1]['steps'] = 20
  # Step 12 was the second stage's and still is; its data are those saved.
  config['stages'] = config['stages'][::-1]
  with pytest.raises(training.CheckpointError, match='they were changed'):
    training.train_and_evaluate(config, uninterrupted[0])


def test_nan_stops_and_names_the_last_checkpoint(text, tmp_path, monkeypatch):
  config = one_layer(text, steps=8)
  make = train_lib.make_train_step

  def make_broken(*args, **kwargs):
    train_step = make(*args, **kwargs)

    def broken(state, batch, step):
      state, outputs = train_step(state, batch, step)
      broken_loss = jax.numpy.where(step == 5, jax.numpy.nan, outputs['loss'])
      return state, {**outputs, 'loss': broken_loss}

    return broken

  monkeypatch.setattr(train_lib, 'make_train_step', make_broken)
  with pytest.raises(training.NonFiniteError) as e:
    training.train_and_evaluate(config, tmp_path)
  message = str(e.value)
  assert 'loss is nan at step 6 (learning rate 0.01)' in message
  assert 'last good checkpoint is of step 4' in message
  assert '\n' not in message
  assert not (tmp_path / 'checkpoints' / '8').exists()


def test_a_window_beyond_the_length_is_allowed_and_said(text, tmp_path, capsys):
  config = one_layer(text, steps=1, windows=100)
  training.train_and_evaluate(config, tmp_path)
  assert 'widest window 100 exceeds the length 32' in capsys.readouterr().err


def test_bfloat16_and_remat(text, tmp_path):
  config = one_layer(text, steps=2)
  config['model'] |= dict(dtype='bfloat16', remat=True)
  result = training.train_and_evaluate(config, tmp_path)
  assert 0 < result['bits_per_character'] < 9
  assert {x.dtype for x in arrays(tmp_path, 2).values()} == {
    np.dtype('float32'),
    np.dtype('int32'),
  }


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(micro_batch=2), "'micro_batch' in config: did you mean 'micro_bat"),
    (dict(data=dict(nam='x')), "'nam' in config.data: did you mean 'name'"),
    (dict(micro_batches=0), 'micro_batches must be >= 1, got 0'),
    (dict(ema_decay=1.0), r'ema_decay must lie in \[0, 1\), got 1.0'),
    (dict(stages=()), 'stages is empty'),
    (dict(pattern='band'), "'band' is not one of"),
    (dict(optimizer=dict(name='lion')), "'lion' is not one of"),
    (dict(model=dict(num_layers=2, patterns=3)), 'model.patterns'),
    (dict(model={}), 'lacks the key num_layers'),
    (dict(micro_batches=3), 'stage 0 batch_size 4 does not divide over 1 dev'),
    (dict(data=dict(name='text', path='/no/where')), 'no/where'),
  ],
)
def test_mistakes_are_found_before_training(text, tmp_path, change, message):
  with pytest.raises((ValueError, OSError), match=message):
    training.train_and_evaluate(tiny(text, **change), tmp_path)
  assert not (tmp_path / 'metrics.jsonl').exists()


def test_work_folder_that_cannot_be_written(text, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    training.CheckpointError, match='cannot write to the work'
  ):
    training.train_and_evaluate(tiny(text), tmp_path / 'file')


BARE = """
import sys
class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {
      'grain', 'tensorflow_datasets', 'tqdm', 'tensorboardX', 'matplotlib',
      'ml_collections', 'pooch',
    }:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Missing())
import json
from longjax import training
config = json.loads(sys.argv[1])
print(training.train_and_evaluate(config, sys.argv[2])['step'])
"""


def test_needs_little_and_spreads_the_batch(text, tmp_path):
  """Without grain, tfds, tqdm, tensorboardX, ...; on four devices."""
  root = os.path.dirname(os.path.dirname(longjax.__file__))
  config = one_layer(text, steps=3) | {'tensorboard': True}

  def run(config, workdir):
    return subprocess.run(
      [sys.executable, '-c', BARE, json.dumps(config), str(workdir)],
      cwd=root,
      env=os.environ
      | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )

  done = run(config, tmp_path / 'four')
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ['3']
  assert '4 device(s)' in done.stderr
  assert 'tensorboardX is not installed' in done.stderr
  assert 'no loss.png' in done.stderr
  # Over four devices as on one.
  training.train_and_evaluate(config | {'tensorboard': False}, tmp_path / 'one')
  one, four = (
    split(training.load(config, tmp_path / name).model)[1]
    for name in ('one', 'four')
  )
  for name in one:
    np.testing.assert_allclose(four[name], one[name], atol=2e-5)

  config['stages'][0]['batch_size'] = 6
  done = run(config, tmp_path / 'six')
  assert done.returncode != 0
  assert 'batch_size 6 does not divide over 4 devices' in done.stderr
