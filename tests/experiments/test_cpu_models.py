"""The benchmark of whole models compares and counts right; nothing is timed."""

import re

import numpy as np
import pytest
from flax import nnx

import longjax
from experiments.benchmarks import cpu_models, turns
from experiments.benchmarks.worker import make_tokens
from longjax.interop import (
  config_of_led,
  config_of_longformer,
  save_pretrained,
)
from longjax.models.led import LED
from longjax.models.longformer import Longformer

HF_PYTHON = turns.ROOT / '.venv-goldens' / 'bin' / 'python'
SIZES = {
  'features': 16,
  'heads': 2,
  'mlp_features': 32,
  'vocab_size': 50,
  'window': {'longformer': 4, 'led': 4},
  'target_length': 6,
}
CASES = ('longformer', 2, 16), ('led', 1, 16)


def small_benchmark(folder):
  return cpu_models.Benchmark(folder=folder, hf_python=HF_PYTHON, sizes=SIZES)


def make_model(model, layers, length):
  options = dict(
    patterns=longjax.SlidingWindow(2, 2),
    max_positions=length,
    rngs=nnx.Rngs(0),
  )
  if model == 'longformer':
    return Longformer(
      50,
      layers,
      16,
      2,
      mlp_features=32,
      head='sequence_classification',
      **options,
    )
  return LED(50, layers, layers, 16, 2, 2, max_target_positions=8, **options)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case[0])
def test_longjax_worker(tmp_path, case):
  benchmark = small_benchmark(tmp_path)
  model = make_model(*case)
  spec = benchmark.spec(case, 'forward')
  config_of = config_of_led if case[0] == 'led' else config_of_longformer
  save_pretrained(model, spec['folder'], config_of(model))
  tokens, targets = make_tokens(spec)
  arguments = (tokens,)
  if case[0] == 'led':
    start = np.full((1, 1), model.decoder_start_token)
    arguments += (np.concatenate([start, targets[:, :-1]], axis=1),)
    labels = targets
  else:
    labels = np.ones(1, int)
  logits = np.asarray(model(*arguments))
  rows = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  loss = -np.take_along_axis(rows, labels[..., None], axis=-1).mean()
  path = tmp_path / 'results.npz'
  with benchmark.start(cpu_models.LONGJAX) as worker:
    assert worker.ready['versions'].keys() == {'jax', 'longjax'}
    for mode in cpu_models.MODES:
      worker('setup', **benchmark.spec(case, mode), check=True)
      # Every step is the same.
      assert worker('run').keys() == {'seconds', 'cpu_seconds'}
      worker('save', path=str(path))
      with np.load(path) as file:
        results = dict(file)
      if mode == 'forward':
        np.testing.assert_allclose(results['logits'], logits, atol=1e-5)
      else:
        np.testing.assert_allclose(results['loss'], loss, rtol=1e-5)
        assert results['gradient'].shape == (50, 16)
        assert np.abs(results['gradient']).max() > 0


@pytest.mark.parametrize('case', CASES, ids=lambda case: case[0])
def test_longjax_equals_hugging_face(tmp_path, case):
  if not HF_PYTHON.exists():
    pytest.skip(
      'no .venv-goldens (make goldens): no Hugging Face to compare to'
    )
  benchmark = small_benchmark(tmp_path)
  benchmark.write_models([case])
  differences = cpu_models.check_numerics(benchmark, case)
  assert differences.keys() == {'logits', 'loss', 'gradient'}


def test_differences_above_the_tolerance_stop_the_run():
  same = {'loss': np.float32(3), 'gradient': np.array([100.0, 1.0])}
  close = same | {'gradient': np.array([100.0, 1.05])}
  assert cpu_models.compare(same, close)['gradient'] == pytest.approx(5e-4)
  for wrong in (
    same | {'loss': np.float32(3.1)},
    same | {'loss': np.float32(np.nan)},
    same | {'gradient': np.array([100.0, 2.0])},
  ):
    with pytest.raises(RuntimeError, match='nothing was timed'):
      cpu_models.compare(same, wrong)


def test_ratios_and_table():
  cases = [['longformer', 12, 4096], ['led', 4, 16384]]
  timings, memory = [], []
  for case, speed in zip(cases, (2.5, 1.5), strict=True):
    for mode in cpu_models.MODES:
      for who, factor in ((cpu_models.HF, speed), (cpu_models.LONGJAX, 1.0)):
        answers = [
          {'seconds': s, 'cpu_seconds': 2 * s}
          for s in (factor, 9 * factor, 0.1)
        ]
        timings.append(turns.timing(answers, who=who, case=case, mode=mode))
        memory.append(
          {'who': who, 'case': case, 'mode': mode, 'peak_bytes': factor * 1e9}
        )
  record = {'cases': cases, 'timings': timings, 'memory': memory}
  record['ratios'] = cpu_models.judge(record)
  holds = {r['name']: r['holds'] for r in record['ratios']}
  assert len(holds) == 2 * 2 * 2
  fast = 'longformer, 12 layers, n=4096, forward: '
  slow = 'led, 4 layers, n=16384, training step: '
  assert holds[f'time, {fast}Hugging Face / longjax']
  assert not holds[f'time, {slow}Hugging Face / longjax']
  assert holds[f'peak memory, {fast}longjax / Hugging Face']
  assert not holds[f'peak memory, {slow}longjax / Hugging Face']
  lines = cpu_models.report(record).splitlines()
  assert lines[1].split()[-6:-4] == ['2.50', '1.00']
  assert lines[1].split()[-2:] == ['2500.00', '1000.00']


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--hf_python=no/such/python'], 'make goldens'),
    (['--cases', 'bert,1,512'], 'bert,1,512.*not like longformer,12,4096'),
    (['--cases', 'led,2,1000'], 'led,2,1000.*multiples of 1024'),
    (['--cases', 'led,x,1024'], 'layers and tokens are whole numbers'),
    (['--hf_python=/bin/sh', '--repeats=0'], 'repeats must be at least 1'),
    (['--hf_python=/bin/sh', '--out=no/such/folder/x.json'], 'no such folder'),
  ],
)
def test_bad_arguments(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    cpu_models.parse(arguments)
  assert error.value.code == 2
  printed = capsys.readouterr().err.splitlines()[-1]
  assert re.search(message, printed)
