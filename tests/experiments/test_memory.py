"""Peak memory as the compiler tells it, and the scripts around LongNet."""

import json

import pytest

from experiments import memory, targets
from experiments.benchmarks import longnet_runtime
from longjax import Dilated

pytestmark = pytest.mark.usefixtures('optimised')


def test_schedules():
  assert memory.make_pattern('geometric', 2048) == Dilated((2048,), (1,))
  assert memory.make_pattern('geometric', 65536) == Dilated(
    (2048, 8192, 32768, 65536), (1, 4, 16, 32)
  )
  paper = memory.make_pattern('paper', 2**20)
  assert paper.segment_lengths[-1] == 32768


def test_a_step_compiles_for_a_gpu_and_its_memory_is_drawn(tmp_path):
  line = memory.compiled_peak(
    'h200',
    2048,
    'geometric',
    remat='block',
    num_layers=2,
    features=32,
    mlp_features=128,
    num_heads=2,
  )
  # Weights are next to nothing; one sheet of logits would be 16 MiB a head.
  assert 0 < line['peak_gib'] < 2048**2 * 4 * 2 / memory.GIB
  memory.plot([line], tmp_path / 'memory.png')
  assert (tmp_path / 'memory.png').stat().st_size > 1000


@pytest.mark.full
def test_a_step_that_does_not_fit_says_so():
  line = memory.compiled_peak('v5e', 2**20, 'geometric', remat='block')
  assert 'peak_gib' not in line and 'hbm' in line['error'].lower()


def test_runtime(tmp_path):
  longnet_runtime.main(
    [
      f'--out={tmp_path}',
      '--tokens=4096',
      '--lengths=2048,4096',
      '--head_dim=2',
      '--repeats=1',
    ]
  )
  record = json.loads((tmp_path / 'runtime.json').read_text())
  measured = [(r['kind'], r['length']) for r in record['results']]
  assert measured == [
    (kind, n) for kind in ('LongNet', 'dense') for n in (2048, 4096)
  ]
  assert all(r['seconds'] > 0 for r in record['results'])
  assert (tmp_path / 'runtime.png').exists()


@pytest.mark.parametrize(
  ('main', 'arguments', 'message'),
  [
    (memory.main, ['--lengths=many'], "must be whole numbers, got 'many'"),
    (memory.main, ['--lengths=100'], 'must be at least 2048, got 100'),
    (memory.main, ['--device=h100'], "invalid choice: 'h100'"),
    (memory.main, ['--remat=all'], "invalid choice: 'all'"),
    (
      longnet_runtime.main,
      ['--tokens=8192', '--lengths=3000'],
      'divide --tokens=8192, got 3000',
    ),
  ],
)
def test_mistakes_on_the_command_line(main, arguments, message, capsys):
  with pytest.raises(SystemExit):
    main(['--out=nowhere', *arguments])
  assert message in capsys.readouterr().err


def test_unknown_device():
  with pytest.raises(ValueError, match="'b200' is not one of .'h200'"):
    targets.mesh('b200')
