"""Runs of several processes, on the loopback interface."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from longjax import training
from longjax.training import processes, read_metrics
from longjax.training.state import split
from tests.training import distributed_config
from tests.training.helpers import write_text

ROOT = pathlib.Path(__file__).resolve().parents[2]


def launch(folder, *flags, count=2, own=lambda number: ()):
  """The processes of a run; the text is beside its folder."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  text = folder.parent / 'text.txt'
  if not text.exists():
    write_text(text)
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'LONGJAX_TEST_TEXT': str(text),
    'XLA_FLAGS': '',
    'PYTHONPATH': str(ROOT),
  }
  return [
    subprocess.Popen(
      [
        sys.executable,
        '-m',
        'experiments.main',
        '--config=tests/training/distributed_config.py',
        f'--workdir={folder}',
        '--distributed',
        f'--coordinator=127.0.0.1:{port}',
        f'--processes={count}',
        f'--process={number}',
        *flags,
        *own(number),
      ],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(count)
  ]


def finish(run, timeout=400):
  """[(exit code, stdout, stderr)]"""
  outs = [process.communicate(timeout=timeout) for process in run]
  return [(p.returncode, *out) for p, out in zip(run, outs, strict=True)]


def steps_written(folder):
  path = folder / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


@pytest.mark.full
def test_a_killed_process_ends_the_run_which_goes_on_bit_equal(
  tmp_path, monkeypatch
):
  whole = finish(launch(tmp_path / 'whole'))
  assert [code for code, *_ in whole] == [0, 0], whole
  run = launch(tmp_path / 'killed')
  while steps_written(tmp_path / 'killed') < 6:
    assert all(process.poll() is None for process in run)
    time.sleep(0.05)
  run[1].send_signal(signal.SIGKILL)
  start = time.monotonic()
  ended = finish(run, timeout=60)
  assert time.monotonic() - start < 30
  assert ended[0][0] not in (0, None)
  assert 'another process' in ended[0][2], ended[0]
  assert not (tmp_path / 'killed' / 'result.json').exists()

  again = finish(launch(tmp_path / 'killed'))
  assert [code for code, *_ in again] == [0, 0], again
  assert 'going on from the checkpoint of step' in again[0][2]
  # One of them prints the result; Gloo says something in each.
  assert ['"bits_per_character"' in out for _, out, _ in again] == [True, False]
  monkeypatch.setenv('LONGJAX_TEST_TEXT', str(tmp_path / 'text.txt'))
  config = distributed_config.get_config()
  config.mesh.seq = 1
  got, wanted = (
    split(training.load(config, tmp_path / name).model)[1]
    for name in ('killed', 'whole')
  )
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  got, wanted = (
    [line.get('train/loss') for line in read_metrics(tmp_path / name)]
    for name in ('killed', 'whole')
  )
  assert got == wanted


@pytest.mark.full
def test_sigterm_of_one_stops_all_after_the_same_step(tmp_path):
  run = launch(tmp_path / 'run')
  while steps_written(tmp_path / 'run') < 6:
    assert all(process.poll() is None for process in run)
    time.sleep(0.05)
  run[1].send_signal(signal.SIGTERM)
  ended = finish(run, timeout=60)
  assert [code for code, *_ in ended] == [143, 143], ended
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  last = json.loads(lines[-1])['step']
  assert (tmp_path / 'run' / 'checkpoints' / str(last)).is_dir()


@pytest.mark.full
def test_different_configs_are_found_at_the_start(tmp_path):
  ended = finish(
    launch(
      tmp_path / 'run',
      own=lambda number: [f'--config.optimizer.b2=0.{8 + number}'],
    )
  )
  for code, _, stderr in ended:
    assert code == 1
    assert 'config.optimizer.b2 is 0.8 and 0.9 (process 0 and process 1)' in (
      stderr
    )
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize(
  ('a', 'b', 'found'),
  [
    ({'x': 1}, {'x': 1}, None),
    ({'x': {'y': [1, 2]}}, {'x': {'y': [1, 3]}}, 'c.x.y[1] is 2 and 3'),
    ({'x': 1}, {'x': 1, 'z': 2}, 'c.z is there and not there'),
    ({'x': [1]}, {'x': [1, 2]}, 'c.x is [1] and [1, 2]'),
  ],
)
def test_difference(a, b, found):
  assert processes.difference(a, b, 'c') == found


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('somewhere', 2, 0), "coordinator 'somewhere' is not as host:1234"),
    (('here:1', 2, 2), 'process 2 is not one of 2 processes'),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.start(*arguments)
