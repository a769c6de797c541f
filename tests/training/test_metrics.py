"""Metrics: no step twice, a stop at NaN, progress, plots."""

import builtins
import json

import numpy as np
import pytest

from longjax.training import metrics as metrics_lib
from longjax.training.metrics import (
  Meter,
  Metrics,
  NonFiniteError,
  read_metrics,
)


def write(workdir, step, steps, **kwargs):
  metrics = Metrics(workdir, step, tensorboard=False, **kwargs)
  for s in steps:
    metrics.write(s, {'train/loss': s / 10})
  metrics.close()


def test_lines(tmp_path):
  write(tmp_path, 0, [1, 2])
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 1, 'train/loss': 0.1},
    {'step': 2, 'train/loss': 0.2},
  ]


def test_resuming_drops_what_came_after(tmp_path):
  write(tmp_path, 0, [1, 2, 3, 4])
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 5, "train/lo')  # killed in the middle of a line
  write(tmp_path, 2, [3, 4])
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_fresh_run_starts_anew(tmp_path):
  write(tmp_path, 0, [1, 2])
  write(tmp_path, 0, [1])
  assert [r['step'] for r in read_metrics(tmp_path)] == [1]


def test_the_test_score_is_not_doubled(tmp_path):
  metrics = Metrics(tmp_path, 0, tensorboard=False)
  metrics.write(2, {'train/loss': 1.0})
  metrics.write(2, {'test/bits_per_character': 2.0})
  metrics.close()
  write(tmp_path, 2, [])
  assert read_metrics(tmp_path) == [{'step': 2, 'train/loss': 1.0}]


def test_only_the_first_process_writes(tmp_path):
  write(tmp_path, 0, [1], enabled=False)
  assert not list(tmp_path.iterdir())


def test_tensorboard_files(tmp_path):
  pytest.importorskip('tensorboardX')
  metrics = Metrics(tmp_path, 0)
  metrics.write(1, {'train/loss': 1.0, 'train/memory_gib': None})
  metrics.close()
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_says_when_tensorboard_is_missing(tmp_path, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == 'tensorboardX':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  said = []
  Metrics(tmp_path, 0, say=said.append).close()
  assert said == [
    'tensorboardX is not installed: metrics go to metrics.jsonl only'
  ]


def test_meter_averages_and_goes_on_from_counters():
  def feed(meter, losses):
    meter.start()
    for step, loss in losses:
      outputs = {'loss': np.float32(loss), 'gradient_norm': np.float32(1)}
      meter.dispatched(step, outputs, 100)

  whole = Meter(lambda step: 0.5)
  feed(whole, [(1, 1.0), (2, 2.0), (3, 6.0)])
  whole.settle()

  before = Meter(lambda step: 0.5)
  feed(before, [(1, 1.0), (2, 2.0)])
  before.settle()
  after = Meter(lambda step: 0.5, json.loads(json.dumps(before.counters)))
  feed(after, [(3, 6.0)])
  after.settle()

  for meter in (whole, after):
    line = meter.summary()
    assert line['train/loss'] == 3.0
    assert line['train/tokens'] == 300
    assert line['train/learning_rate'] == 0.5
    assert line['train/tokens_per_second'] > 0
    assert line['train/memory_gib'] > 0


@pytest.mark.parametrize('name', ['loss', 'gradient_norm'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_meter_stops_at_what_is_no_number(name, value):
  meter = Meter(lambda step: 0.25 if step == 6 else 0.0)
  meter.start()
  outputs = {'loss': 1.0, 'gradient_norm': 1.0} | {name: value}
  meter.dispatched(7, outputs, 1)
  with pytest.raises(
    NonFiniteError, match=rf'{value} at step 7 \(learning rate 0.25\)'
  ):
    meter.settle()


def test_progress_without_a_terminal_is_lines(capsys):
  progress = metrics_lib.Progress(10, done=4)
  progress.update()
  progress.update('2.00 bits/char')
  progress.close()
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1
  assert err[0].startswith('training 6/10  2.00 bits/char') and 'left' in err[0]


def test_track_yields_everything_quietly(capsys):
  assert list(metrics_lib.track(range(5), 'test')) == [0, 1, 2, 3, 4]
  assert capsys.readouterr().err == ''


def test_duration():
  assert metrics_lib.duration(42) == '42s'
  assert metrics_lib.duration(185) == '3:05'
  assert metrics_lib.duration(7384) == '2:03:04'


def test_plot(tmp_path):
  pytest.importorskip('matplotlib')
  metrics = Metrics(tmp_path, 0, tensorboard=False)
  for step in (1, 2):
    metrics.write(step, {'train/loss': 3.0 - step})
  metrics.close()
  path = tmp_path / 'loss.png'
  assert metrics_lib.plot_loss(tmp_path, path, ('loss', 'f1'), title='x')
  assert (tmp_path / 'loss.png').stat().st_size > 5000
