"""The CPU benchmark compares numerics and counts right; nothing is timed."""

import pathlib
import re

import numpy as np
import pytest

from experiments.benchmarks import cpu_attention, turns
from experiments.benchmarks.worker import PROJECTIONS, make_inputs

HF_PYTHON = turns.ROOT / '.venv-goldens' / 'bin' / 'python'
LENGTH, HEADS, HEAD_DIM, SIDE = 32, 2, 4, 4


def small_benchmark():
  return cpu_attention.Benchmark(
    heads=HEADS, head_dim=HEAD_DIM, side=SIDE, seed=0, hf_python=HF_PYTHON
  )


def dense_layer(side):
  """The benchmark's layer in float64."""
  spec = small_benchmark().spec(cpu_attention.LONGJAX, LENGTH, 'forward')
  weights, hidden, _ = make_inputs(spec)
  q, k, v = (
    (hidden @ weights[f'{name}.weight'].T + weights[f'{name}.bias'])
    .astype(np.float64)
    .reshape(LENGTH, HEADS, HEAD_DIM)
    for name in PROJECTIONS
  )
  logits = np.einsum('thd,shd->hts', q, k) / np.sqrt(HEAD_DIM)
  position = np.arange(LENGTH)
  seen = np.abs(position[:, None] - position) <= side
  weight = np.where(seen, np.exp(logits), 0)
  weight /= weight.sum(axis=-1, keepdims=True)
  return np.einsum('hts,shd->thd', weight, v).reshape(1, LENGTH, -1)


def test_longjax_worker(tmp_path):
  benchmark = small_benchmark()
  path = tmp_path / 'results.npz'
  with benchmark.start(cpu_attention.LONGJAX) as worker:
    assert {'jax', 'longjax'} == worker.ready['versions'].keys()
    for who, side in (
      (cpu_attention.LONGJAX, SIDE),
      (cpu_attention.FULL, LENGTH),
    ):
      for mode in cpu_attention.MODES:
        worker('setup', who, **benchmark.spec(who, LENGTH, mode))
        assert worker('run', who).keys() == {'seconds', 'cpu_seconds'}
        worker('save', who, path=str(path))
        with np.load(path) as file:
          results = dict(file)
        np.testing.assert_allclose(
          results['output'], dense_layer(side), rtol=0, atol=2e-5
        )
        gradients = {'d_hidden'} | {
          f'd_{name}.{part}'
          for name in PROJECTIONS
          for part in ('weight', 'bias')
        }
        wanted = set() if mode == 'forward' else gradients
        assert results.keys() == wanted | {'output'}
        worker('drop', who)
    for who in cpu_attention.ALONE:
      worker('setup', **benchmark.spec(who, LENGTH, 'forward+backward'))
      worker('run')
    after = worker('memory')['peak_bytes']
    assert after > worker.ready['peak_bytes'] > 1e7


def test_longjax_equals_hugging_face():
  if not HF_PYTHON.exists():
    pytest.skip(
      'no .venv-goldens (make goldens): no Hugging Face to compare to'
    )
  differences = cpu_attention.check_numerics(small_benchmark(), LENGTH)
  assert len(differences) == 2 + 2 * len(PROJECTIONS)


def test_differences_above_the_tolerance_stop_the_run():
  same = {'output': np.ones(3), 'd_hidden': np.array([100.0, 1.0])}
  close = {'output': np.ones(3) + 1e-5, 'd_hidden': np.array([100.0, 1.001])}
  differences = cpu_attention.compare(same, close)
  assert differences['output'] == pytest.approx(1e-5, rel=1e-3)
  assert differences['d_hidden'] == pytest.approx(1e-5, rel=1e-3)
  for wrong in (
    close | {'output': np.ones(3) + 1e-4},
    close | {'output': np.full(3, np.nan)},
    close | {'d_hidden': np.array([100.0, 1.1])},
  ):
    with pytest.raises(RuntimeError, match='nothing was timed'):
      cpu_attention.compare(same, wrong)


def test_turns_interleave_and_change_who_begins():
  order = []

  def run(name):
    order.append(name)
    return len(order)

  answers = turns.take_turns(
    {name: lambda name=name: run(name) for name in 'abc'}, repeats=3
  )
  assert ''.join(order) == 'abcbcacab'
  assert answers == {'a': [1, 6, 8], 'b': [2, 4, 9], 'c': [3, 5, 7]}


def timing(who, length, mode, seconds):
  answers = [{'seconds': s, 'cpu_seconds': 2 * s} for s in seconds]
  return turns.timing(answers, who=who, length=length, mode=mode)


def synthetic_record():
  timings, memory = [], []
  for length, growth in ((1024, 1.0), (4096, 5.0)):
    for mode, speed in zip(cpu_attention.MODES, (4.5, 4.5), strict=True):
      for who, factor in (
        (cpu_attention.HF, speed),
        (cpu_attention.LONGJAX, 1.0),
      ):
        base = factor * growth
        seconds = [base, 9 * base, 0.1 * base]
        timings.append(timing(who, length, mode, seconds))
        memory.append(
          {
            'who': who,
            'length': length,
            'mode': mode,
            'peak_bytes': base * 1e8,
            'after_imports_bytes': 1e7,
          }
        )
      for who, seconds in zip(cpu_attention.ALONE, (1.0, 4.0), strict=True):
        timings.append(timing(who, length, mode, [seconds]))
  return {
    'lengths': [1024, 4096],
    'timings': timings,
    'memory': memory,
  }


def test_ratios_and_table():
  record = synthetic_record()
  ratios = {ratio['name']: ratio for ratio in cpu_attention.judge(record)}
  fast = ratios['time, forward, n=1024: Hugging Face / longjax']
  assert fast['ratio'] == pytest.approx(4.5) and fast['holds']
  slow = ratios['time, forward+backward, n=1024: Hugging Face / longjax']
  assert slow['ratio'] == pytest.approx(4.5) and not slow['holds']
  assert ratios['peak memory, forward, n=4096: longjax / Hugging Face'][
    'ratio'
  ] == pytest.approx(1 / 4.5)
  growth = ratios['time, forward: longjax n=4096 / n=1024']
  assert growth['ratio'] == pytest.approx(5) and not growth['holds']
  assert growth['target'] == '<= 4.6'
  name = 'attention alone, 64 keys / attention alone, 512 keys'
  window = ratios[f'time, forward, n=4096: {name}']
  assert window['ratio'] == pytest.approx(0.25) and window['holds']
  assert len(ratios) == 2 * (2 + 2 + 2 + 2)

  record['ratios'] = list(ratios.values())
  text = cpu_attention.report(record)
  lines = text.splitlines()
  assert lines[1].split()[-4:] == ['4500.0', '4500.0', '22500.0', '22500.0']
  assert lines[6].split()[-4:] == ['9000.0', '9000.0', '45000.0', '45000.0']
  # Full attention was not measured in this record, and the table says so.
  assert lines[3].startswith(cpu_attention.FULL)
  assert lines[3].split()[-4:] == ['-'] * 4
  assert text.count('FAILS') == sum(
    not ratio['holds'] for ratio in ratios.values()
  )


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--hf_python=no/such/python'], 'make goldens'),
    (['--hf_python=/bin/sh', '--lengths', '1000'], 'length 1000 .* 512'),
    (['--hf_python=/bin/sh', '--threads=0'], 'threads 0'),
    (['--hf_python=/bin/sh', '--out=no/such/folder/x.json'], 'no such folder'),
  ],
)
def test_bad_arguments(arguments, message, capsys):
  assert pathlib.Path('/bin/sh').exists()
  with pytest.raises(SystemExit) as error:
    cpu_attention.parse(arguments)
  assert error.value.code == 2
  printed = capsys.readouterr().err.splitlines()[-1]
  assert re.search(message, printed)
