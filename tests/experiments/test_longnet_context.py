"""Table 2 and Figure 7b at a small size: trained, measured, drawn."""

import json
import math

import pytest

from configs.longnet_context import get_config
from experiments import longnet_context

NAMES = ('results.json', 'table2.png', 'figure7b.png')


def test_a_run_is_measured_once(tmp_path):
  workdir = tmp_path / 'run'
  config = get_config('length=512,tokens=8192,runlocal')
  result = longnet_context.run(config, [1024], workdir)
  assert (result['steps'], result['test_bytes']) == (2, 1024)
  assert '32,768 bytes or more' in result['data']
  trained = json.loads((workdir / 'result.json').read_text())
  assert result['nats_at'].keys() == {'1024'}
  assert result['nats_of_suffix'].keys() == {'256', '512'}
  for key in ('nats_at', 'nats_of_suffix'):
    for nats in result[key].values():
      bits = nats / math.log(2)
      assert bits == pytest.approx(trained['bits_per_character'], rel=0.25)
  # Half of sum w / r^2 = 66.7, which causality leaves, and the query itself.
  assert result['keys_per_query'] == pytest.approx(33.3 + 1, rel=0.02)
  (workdir / 'checkpoints').rename(tmp_path / 'gone')
  again = longnet_context.run(config, [1024], workdir)
  assert again == result


@pytest.mark.full
def test_the_whole_record(tmp_path):
  longnet_context.main(
    f'--out={tmp_path}/record --runs={tmp_path}/runs --seeds=1 --runlocal '
    '--tokens=8192 --lengths 1024 512 --tested 512 2048'.split()
  )
  record = json.loads((tmp_path / 'record' / 'results.json').read_text())
  assert [(r['attention'], r['length']) for r in record['results']] == [
    ('longnet', 512),
    ('longnet', 1024),
    ('sparse', 512),
    ('sparse', 1024),
    ('dense', 1024),
  ]
  for name in NAMES:
    assert (tmp_path / 'record' / name).stat().st_size > 1000


def test_pictures(tmp_path):
  results = [
    {
      'attention': attention,
      'length': length,
      'nats_at': {'512': 1.5 + seed, '2048': 1.25},
      'nats_of_suffix': {'256': 2.0, '512': 1.0},
    }
    for attention in ('longnet', 'sparse')
    for length in (512, 2048)
    for seed in range(2)
  ]
  x, rows = longnet_context.grouped(results, 'nats_at')['longnet', 512]
  assert x == [512, 2048]
  assert rows.tolist() == [[1.5, 1.25], [2.5, 1.25]]
  longnet_context.draw_table(results, tmp_path / 'a.png')
  longnet_context.draw_windows(results, tmp_path / 'b.png')
  assert (tmp_path / 'a.png').stat().st_size > 1000
  assert (tmp_path / 'b.png').stat().st_size > 1000


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--seeds=0', 'seeds must be at least 1, got 0'),
    ('--lengths 512 100', 'length=100 is not a multiple of 16'),
    ('--tokens=99', 'tokens=99 is less than a batch'),
    ('--tested 512 65536', '2 ... 32768, got 512 to 65536'),
  ],
)
def test_bad_arguments(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    longnet_context.parse(['--out=x', *arguments.split()])
  assert error.value.code == 2
  assert message in capsys.readouterr().err
