"""How far a training step goes: the program that says so, on a small model."""

import pytest

from experiments import collectives, scale, targets
from longjax import Dilated

pytestmark = pytest.mark.usefixtures('optimised')

SMALL = dict(
  num_layers=2, features=32, num_heads=2, mlp_features=128, mlp_piece=2048
)


def test_schedules():
  pattern = scale.make_pattern(2**20, 2**15, 4)
  assert pattern == Dilated(
    [2**n for n in (11, 13, 15, 17, 19, 20)], [4**n for n in range(5)] + [512]
  )
  pattern = scale.make_pattern(2**20, 2**15, 64, ratio=64)
  assert pattern.ratios == (1, 64, 64)


def test_a_step_on_four_devices(capsys):
  line = scale.compile_step('v5e:2x2', 2**14, growth=4, **SMALL)
  # Segments of 8192 and 16384 are longer than a share: of each, 2048 thinned
  # keys and as many values travel forward, and again for the backward pass, and
  # their gradients.
  assert line['gathered'] == 2 and line['segments'] == (2048, 8192, 16384)
  keys = 2048 * 32 * 2 / 2**20
  layer = sum(line['layer_mib'].values())
  # At least forward, again, and back; at most twice as much, where gradients
  # are float32.
  assert 2 * 2 * 3 * keys <= layer <= 2 * 2 * 6 * keys
  # Outside of the layers: the parameters' gradients, and the loss.
  parameters = sum(line['step_mib'].values())
  assert 0 < parameters < 1
  assert 0 < line['peak_gib'] < 1 and line['tflop'] > 0
  text = scale.table([line, {**line, 'error': 'Used 9G of 8G hbm'}])
  assert 'v5e:2x2    2^14' in text and 'Used 9G' in text


def test_collectives_are_read_from_loops_and_outside():
  text = """
%body (x: f32[4]) -> f32[4] {
  %a = bf16[2,8]{1,0} all-gather(%x), dimensions={0}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %b = (f32[3]{0}, f32[6]{0}) all-gather-start(%x), dimensions={0}
}
"""
  found = list(collectives.compiled_collectives(text))
  assert [(c.kind, c.bytes, c.in_loop) for c in found] == [
    ('all-gather', 32, True),
    ('all-gather', 24, False),
  ]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--tokens=2^x'], "'2^x' is not as 1048576 or 2^20"),
    (['--tokens=2^31'], '2147483648 tokens are more than'),
    (
      ['--devices=v5e:2x2', '--tokens=131073'],
      'cannot be split over 4 devices; the nearest lengths that can: 131072',
    ),
    (['--devices=b200:8'], "device 'b200' is not one of"),
    (['--devices=h200:many'], "topology 'h200:many' is not as h200:8"),
    (['--devices=v5p:4x5'], "topology 'v5p:4x5' cannot be had"),
  ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, capsys):
  with pytest.raises(SystemExit):
    scale.main([f'--out={tmp_path}', *arguments])
  assert message in capsys.readouterr().err


def test_topologies():
  assert len(targets.devices('v5p:4x4x4')) == 64
  assert len(targets.devices('h200:8')) == 8
  assert len(targets.devices('v6e')) == 1


@pytest.mark.full
def test_bytes_do_not_grow_with_the_length(tmp_path):
  """With ratios in proportion; with a constant one they do."""
  layers = []
  for tokens, ratio in ((2**14, None), (2**15, None), (2**15, 4)):
    # Two segments longer than a share each.
    line = scale.compile_step(
      'v5e:2x2', tokens, growth=tokens // 4096, ratio=ratio, **SMALL
    )
    layers.append(sum(line['layer_mib'].values()) / line['gathered'])
  assert layers[1] == pytest.approx(layers[0], rel=0.1)
  assert layers[2] > 1.5 * layers[1]
