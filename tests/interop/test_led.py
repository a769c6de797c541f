"""Folders of LEDs and BARTs, in and out."""

import functools
import json
import os
import pathlib
import subprocess
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import longjax
from longjax.interop import (
  config_of_led,
  load_pretrained,
  read_config,
  save_pretrained,
  to_led,
)
from longjax.interop.convert import main as convert
from longjax.interop.families import UnsupportedConfig
from longjax.models.led import LED

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ('led', 'bart')


@functools.cache
def goldens(kind):
  with np.load(ROOT / 'tests' / 'goldens' / f'{kind}.npz') as file:
    return dict(file)


def config_of(kind, **changes):
  config = json.loads(str(goldens(kind)['config']))
  if kind == 'led':
    config['attention_window'] = goldens('led')['first_token/windows'].tolist()
  return config | changes


def weights_of(kind):
  return {
    name.removeprefix('weights/'): value
    for name, value in goldens(kind).items()
    if name.startswith('weights/')
  }


def write_folder(folder, config, weights):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(weights, folder / 'model.safetensors')


def parameters(model):
  return {
    path: np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def assert_same_parameters(a, b):
  a, b = parameters(a), parameters(b)
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=str(path))


@jax.jit
def run(model, *arguments, **keywords):
  return model(*arguments, **keywords)


@pytest.mark.parametrize('kind', KINDS)
def test_loaded_and_saved(kind, tmp_path):
  """What is loaded equals transformers' in tests/models."""
  write_folder(tmp_path / 'source', config_of(kind), weights_of(kind))
  model = load_pretrained(tmp_path / 'source')
  target = tmp_path / 'target'
  save_pretrained(model, target, read_config(tmp_path / 'source'))
  saved = load_file(target / 'model.safetensors')
  assert saved.keys() == weights_of(kind).keys()
  for name, value in weights_of(kind).items():
    np.testing.assert_array_equal(saved[name], value)


@pytest.mark.parametrize('table', ['encoder.embed_tokens', 'shared'])
def test_tied_tables(table, tmp_path):
  """Files hold the embedding under some of its names."""
  weights = weights_of('led')
  write_folder(tmp_path / 'a', config_of('led'), weights)
  wanted = load_pretrained(tmp_path / 'a')
  shared = weights.pop('led.shared.weight')
  weights[f'led.{table}.weight'] = shared
  weights['lm_head.weight'] = shared.copy()
  if table == 'shared':
    weights['led.decoder.embed_tokens.weight'] = shared.copy()
  write_folder(tmp_path / 'b', config_of('led'), weights)
  assert_same_parameters(load_pretrained(tmp_path / 'b'), wanted)
  # Nor need there be a bias of the logits.
  weights.pop('final_logits_bias')
  write_folder(tmp_path / 'b', config_of('led'), weights)
  assert not load_pretrained(tmp_path / 'b').output_bias[...].any()


LOAD_WITH_TRANSFORMERS = """
import pathlib, sys, numpy as np, torch, transformers
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
  model, report = getattr(transformers, name).from_pretrained(
    folder, output_loading_info=True)
  assert not any(report.values()), report
  tokens, target = (
    torch.tensor(np.load(folder / f'{part}.npy')).long()
    for part in ('tokens', 'target'))
  more = {}
  if name.startswith('LED'):
    mask = torch.zeros_like(tokens)
    mask[:, 0] = 1
    more = {'global_attention_mask': mask}
  with torch.no_grad():
    out = model.eval()(tokens, attention_mask=(tokens != 1).long(),
      decoder_input_ids=target, **more)
  np.save(folder / 'out.npy', out.logits.numpy())
"""


def make(kind):
  bart = kind == 'bart'
  return LED(
    vocab_size=31,
    num_encoder_layers=2,
    num_decoder_layers=1,
    features=8,
    num_encoder_heads=2,
    num_decoder_heads=4,
    patterns=longjax.Full(causal=False)
    if bart
    else (longjax.SlidingWindow(3, 3), longjax.SlidingWindow(4, 4)),
    max_globals=0 if bart else 4,
    position_offset=2 if bart else 0,
    max_positions=32,
    max_target_positions=32 if bart else 12,
    scale_embedding=bart,
    rngs=nnx.Rngs(7),
  )


def test_transformers_loads_what_is_saved(tmp_path):
  """... of models made here, whose configs are made here too."""
  python = ROOT / '.venv-goldens' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no .venv-goldens (make goldens): no transformers to load with')
  inputs = {
    name: goldens('led')[f'first_token/{name}'] for name in ('tokens', 'target')
  }
  models = {kind: make(kind) for kind in KINDS}
  for kind, model in models.items():
    save_pretrained(model, tmp_path / kind, config_of_led(model))
    for name, value in inputs.items():
      np.save(tmp_path / kind / f'{name}.npy', value)
    assert_same_parameters(model, load_pretrained(tmp_path / kind))
  command = [python, '-c', LOAD_WITH_TRANSFORMERS, tmp_path]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-2000:]
  for kind, model in models.items():
    wanted = np.load(tmp_path / kind / 'out.npy')
    np.testing.assert_allclose(run(model, *inputs.values()), wanted, atol=2e-5)


def test_allenai_folders(tmp_path):
  """Named as BART's, windows of one side, two unused rows of positions."""
  write_folder(tmp_path / 'a', config_of('led'), weights_of('led'))
  wanted = load_pretrained(tmp_path / 'a')
  config = config_of('led', attention_mode='sliding_chunks')
  config['attention_window'] = [
    side // 2 for side in config['attention_window']
  ]
  config['attention_dilation'] = [1, 1]
  config['model_type'] = 'bart'
  config.pop('architectures')
  weights = {
    name.replace('led.', 'model.', 1): value
    for name, value in weights_of('led').items()
  }
  for side in ('encoder', 'decoder'):
    name = f'model.{side}.embed_positions.weight'
    weights[name] = np.pad(weights[name], ((2, 0), (0, 0)))
  write_folder(tmp_path / 'b', config, weights)
  model = load_pretrained(tmp_path / 'b')
  assert model.position_offset == 2 and model.patterns == wanted.patterns
  same = to_led(model, model.max_positions)
  assert_same_parameters(same, wanted)
  with pytest.raises(UnsupportedConfig, match='position_offset=2'):
    config_of_led(model)


def test_led_from_bart(tmp_path, capsys):
  write_folder(tmp_path / 'bart', config_of('bart'), weights_of('bart'))
  bart = load_pretrained(tmp_path / 'bart')
  # Not a multiple of the old length, 24.
  command = [str(tmp_path / 'bart'), str(tmp_path / 'led')]
  assert convert([*command, '--length=61', '--window=34']) == 0
  assert capsys.readouterr().out.endswith('61 positions\n')
  model = load_pretrained(tmp_path / 'led')
  assert model.patterns == (longjax.SlidingWindow(17, 17),) * 2
  arrays = goldens('bart')
  tokens, target = arrays['tokens'], arrays['target']
  # BART has no global tokens.
  no_globals = np.zeros_like(tokens)
  out = run(model, tokens, target, global_mask=no_globals)
  np.testing.assert_allclose(out, arrays['logits'], atol=1e-5)
  old, new = parameters(bart), parameters(model)
  table = ('encoder_positions', 'embedding')
  np.testing.assert_array_equal(new[table][:24], old[table][2:])
  np.testing.assert_array_equal(new[table][24:48], old[table][2:])
  np.testing.assert_array_equal(new[table][48:], old[table][2:15])
  table = ('decoder_positions', 'embedding')
  np.testing.assert_array_equal(new[table], old[table][2:])
  for name in ('query', 'key', 'value'):
    path = ('encoder_layers', 1, 'attention', name, 'kernel')
    copy = ('encoder_layers', 1, 'attention', f'global_{name}', 'kernel')
    np.testing.assert_array_equal(new[copy], old[path])
  assert convert([*command, '--length=20']) == 1
  assert 'length 20 is shorter than the 24' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('bart', {'normalize_before': True}, 'normalize_before=True'),
    ('bart', {'activation_function': 'relu'}, "activation_function='relu'"),
    ('bart', {'encoder_layerdrop': 0.1}, 'encoder_layerdrop=0.1'),
    ('led', {'attention_window': [4]}, 'attention_window has 1 entries'),
  ],
)
def test_unsupported_configs(kind, changes, message, tmp_path):
  write_folder(tmp_path, config_of(kind, **changes), weights_of(kind))
  with pytest.raises(UnsupportedConfig, match=message):
    load_pretrained(tmp_path)


def test_weights_that_do_not_fit(tmp_path):
  weights = weights_of('led')
  name = 'led.decoder.layers.1.encoder_attn.k_proj.bias'
  weights['led.other'] = weights.pop(name)
  write_folder(tmp_path, config_of('led'), weights)
  with pytest.raises(ValueError, match=f'missing: {name}; unexpected: led.oth'):
    load_pretrained(tmp_path)


def test_real_led_base_16384():
  """allenai/led-base-16384, as safetensors: transformers' own numbers."""
  folder = os.environ.get('LONGJAX_LED_BASE')
  if not folder:
    pytest.skip('LONGJAX_LED_BASE names no folder with a real checkpoint')
  model = load_pretrained(folder, dtype='float32')
  few = [0, 31414, 232, 328, 740, 1140, 12695, 69]
  tokens, target = np.array([few * 512]), np.array([few * 128])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    logits = model(tokens, target, global_mask=np.zeros_like(tokens))
  wanted = [
    [33.6507, 6.4572, 16.8089],
    [5.8739, -2.4238, 11.2902],
    [-3.2139, -4.3149, 4.2783],
  ]
  np.testing.assert_allclose(logits[0, :3, :3], wanted, atol=1e-4)
