"""The tuner: what it concludes from times; a rehearsal."""

import json

from experiments.benchmarks import tune
from longjax.ops.pallas import tiling
from longjax.ops.pallas.mosaic_gpu_common import GpuConfig


def test_the_table_holds_what_beats_the_default():
  small, large = dict(walk=64), dict(walk=128)

  def entry(*times):
    results = list(zip((None, small, large), times, strict=True))
    return tune.entry(128, 'prefix_q', 'dq', results)

  better = entry(20e-6, 'does not compile', 10e-6)
  assert better['config'] == large
  assert better['times'] == [
    [None, 20.0],
    [small, 'does not compile'],
    [large, 10.0],
  ]
  assert (better['head_size'], better['kernel']) == (128, 'dq')
  assert better['prefix_q'] and not better['featured']
  # Within the noise, and where nothing was timed.
  noise = entry(20e-6, 25e-6, 19.9e-6)
  failed = entry('no GPU', 'no GPU', 'no GPU')
  assert noise['config'] is None and failed['config'] is None
  found = {'device': 'x', 'tiles': [noise, better, failed]}
  assert tune.shipped(found) == {'device': 'x', 'tiles': [better]}
  line = tune.line(tune.workloads(False)[128, 'prefix_q'], better)
  assert "{'walk': 128} 10.0, default 20.0 (us), 1 of 3 failed" in line


def test_tables_are_what_the_kernels_read(tmp_path):
  tiles = tune.candidates('dq', rehearse=False)[3]
  results = [(None, 2.0), (tiles, 1.0)]
  found = tune.entry(64, 'residues', 'dq', results)
  tune.write(tmp_path, {'device': 'NVIDIA H200', 'tiles': [found]})
  path = tmp_path / tiling.path_of('NVIDIA H200').name
  (key,) = tiling.parse(GpuConfig, path.read_text(), 'here')
  assert key[:2] == ('dq', 64)
  read = tiling.parse(GpuConfig, path.read_text(), 'here')[key]
  assert read == GpuConfig(**tiles)


def test_workloads_cover_the_kinds_of_calls():
  kinds = list(tune.workloads(rehearse=False))
  assert kinds[0] == (128, 'plain') and len(set(kinds)) == len(kinds) == 20
  for feature in tune.FEATURES:
    case = tune.workloads(rehearse=True)[64, feature]
    spec, x, dout = tune.operands(case, feature)
    assert (x.q_ids is not None) == (feature == 'featured')
    assert (x.prefix is not None) == (feature == 'prefix_q')
    assert (spec.residues is not None) == (feature == 'residues')
    assert dout.shape == x.q.shape


def test_rehearsal(tmp_path, capsys):
  tune.main(['--rehearse', f'--record={tmp_path}', '--only=D64 residues dq'])
  found = json.loads((tmp_path / 'tuning.json').read_text())
  (entry,) = found['tiles']
  assert entry['kernel'] == 'dq' and entry['residues']
  assert len(entry['times']) == 3
  assert all(time > 0 for _, time in entry['times']), entry
  assert json.loads((tmp_path / 'cpu.json').read_text())['device'] == 'cpu'
  assert 'D64 residues dq' in capsys.readouterr().out
