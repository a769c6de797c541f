"""The decoding benchmark checks, counts and draws right; nothing is timed."""

import numpy as np
import pytest

from experiments.benchmarks import decoding, turns
from experiments.benchmarks.decoding import BOUNDED, WHOLE

SIZES = {
  'vocab_size': 19,
  'num_layers': 1,
  'features': 8,
  'num_heads': 2,
  'num_kv_heads': 1,
  'mlp_features': 8,
}
WINDOW, START, TOKENS = 8, 2, 3


def test_workers():
  """Their logits are the definition's; one cache is bounded."""
  benchmark = decoding.Benchmark(
    model=None,
    sizes=SIZES,
    window=WINDOW,
    start=START,
    tokens=TOKENS,
    seed=0,
  )
  logits = {}
  with benchmark.start() as worker:
    for who, slots in ((BOUNDED, WINDOW + START), (WHOLE, 30 + TOKENS)):
      worker('setup', who, **benchmark.spec(who, 30, check=True))
      found = turns.saved(worker, who)
      assert found['logits'].shape == (1, TOKENS, 19)
      assert decoding.difference(**found) < 1e-5
      logits[who] = found['logits']
      worker('setup', who, **benchmark.spec(who, 30))
      assert worker('run', who).keys() == {'seconds', 'cpu_seconds'}
      # Keys and values of one head of four, positions; the row's length.
      size = int(turns.saved(worker, who)['cache_bytes'])
      assert size == 4 * (slots * (2 * 4 + 1) + 1)
    assert worker('memory')['peak_bytes'] > worker.ready['peak_bytes'] > 1e7
  assert np.abs(logits[BOUNDED] - logits[WHOLE]).max() > 1e-3


def test_differences_stop_the_run():
  wanted = np.array([1.0, -10.0])
  assert decoding.difference(wanted + 5e-4, wanted) == pytest.approx(5e-5)
  for wrong in (wanted + 2e-3, wanted * np.nan):
    with pytest.raises(RuntimeError, match='nothing was timed'):
      decoding.difference(wrong, wanted)


def synthetic_record():
  timings, memory = [], []
  for who, power in ((BOUNDED, 0), (WHOLE, 1)):
    for length in (1024, 4096):
      seconds = 0.002 * (length / 1024) ** power
      answers = [
        {'seconds': 4 * s, 'cpu_seconds': 8 * s}
        for s in (seconds, 9 * seconds, seconds)
      ]
      timings.append(decoding.timing(who, length, 4, answers))
      size = 1e6 * (length / 1024) ** power
      memory.append(
        {
          'who': who,
          'length': length,
          'cache_bytes': size,
          'peak_bytes': 3e8 + size,
          'after_imports_bytes': 2e8,
        }
      )
  return {'lengths': [1024, 4096], 'timings': timings, 'memory': memory}


def test_ratios_table_and_picture(tmp_path):
  record = synthetic_record()
  ratios = record['ratios'] = decoding.judge(record)
  assert ratios[f'time, n=4096: {WHOLE} / {BOUNDED}'] == pytest.approx(4)
  assert ratios[f'time, {BOUNDED}: n=4096 / n=1024'] == pytest.approx(1)
  assert ratios[f'cache, {WHOLE}: n=4096 / n=1024'] == pytest.approx(4)
  assert ratios[f'peak memory, n=1024: {WHOLE} / {BOUNDED}'] == 1
  assert len(ratios) == 4 * (2 + 2)
  lines = decoding.report(record).splitlines()
  assert lines[2].split()[-2:] == ['2.00', '8.00']  # milliseconds for a token
  assert lines[4].split()[-2:] == ['4.00', '16.00']
  assert lines[6].split()[-2:] == ['1.00', '4.00']
  path = tmp_path / 'decoding.png'
  decoding.draw(record, path)
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--model=no/such.bin'], '--model no/such.bin: no such file or folder'),
    (['--out=no/such'], '--out no/such: no such folder'),
    (['--lengths', '600', '400'], 'length 400 is less than window 512'),
    (['--tokens=0'], '--tokens 0: at least 1'),
    (['--threads=0'], '--threads 0'),
  ],
)
def test_bad_arguments(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    decoding.parse(arguments)
  assert error.value.code == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
