"""Folders in Hugging Face's format: transformers' own numbers, and back."""

import json
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import longjax
from longjax.generation.sample import sample
from longjax.interop import (
  config_of,
  load_pretrained,
  read_config,
  save_pretrained,
  weights,
)
from longjax.interop.families import UnsupportedConfig
from longjax.models import gptj, llama, mpt
from tests.interop.helpers import (
  GOLDENS,
  ROOT,
  golden,
  logits,
  parameters,
  write_folder,
)

NAMES = sorted(
  p.stem.removeprefix('pretrained_') for p in GOLDENS.glob('pretrained_*.npz')
)


@pytest.fixture
def folder(tmp_path):
  write_folder(tmp_path, golden('llama_gqa'))
  return tmp_path


def test_there_is_a_golden_file_for_each_option():
  assert len(NAMES) >= 9


@pytest.mark.parametrize('name', NAMES)
def test_equals_transformers(name, tmp_path):
  arrays = golden(name)
  write_folder(tmp_path, arrays)
  model = load_pretrained(tmp_path)
  np.testing.assert_allclose(
    logits(model, arrays['tokens']), arrays['logits'], rtol=0, atol=2e-5
  )
  # Through the cache, token by token.
  prompt, wanted = arrays['greedy'][:5], arrays['greedy'][5:]
  got = sample(model, prompt, len(wanted), temperature=0)
  np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()
  stored = write_folder(source, golden(name))
  model = load_pretrained(source)
  config = json.loads((source / 'config.json').read_text())
  save_pretrained(model, target, config)
  saved = load_file(target / 'model.safetensors')
  assert saved.keys() == stored.keys()
  for tensor, value in stored.items():
    np.testing.assert_array_equal(saved[tensor], value)
  assert json.loads((target / 'config.json').read_text())['dtype'] == 'float32'


LOAD_WITH_TRANSFORMERS = """
import pathlib, sys, numpy as np, torch, transformers
for folder in map(pathlib.Path, sys.argv[1:]):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype='float32'
  )
  with torch.no_grad():
    tokens = torch.tensor(np.load(folder / 'tokens.npy')).long()
    np.save(folder / 'logits.npy', model(tokens).logits.numpy())
"""

RECIPES = {
  'llama': (
    llama(
      vocab_size=29,
      num_layers=2,
      features=16,
      num_heads=4,
      num_kv_heads=2,
      mlp_features=24,
      rope_scaling=longjax.positions.LinearScaling(2.0),
    ),
    longjax.Full(),
  ),
  'mistral': (
    llama(
      vocab_size=29, num_layers=1, features=16, num_heads=2, mlp_features=24
    ),
    longjax.SlidingWindow(4),
  ),
  'gptj': (
    gptj(
      vocab_size=29,
      num_layers=1,
      features=16,
      num_heads=2,
      rotary_dim=4,
      mlp_features=40,
    ),
    longjax.Full(),
  ),
  'mpt': (
    mpt(vocab_size=29, num_layers=1, features=16, num_heads=2, mlp_features=64),
    longjax.Full(),
  ),
}


def test_transformers_loads_what_is_saved(tmp_path):
  """Golden models that were loaded and saved again, models made here with a
  config made here, and a llama2.c file's; one process loads them all."""
  python = ROOT / '.venv-goldens' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no .venv-goldens (make goldens): no transformers to load with')
  source, wanted = tmp_path / 'source', {}
  source.mkdir()
  for name in NAMES:
    arrays = golden(name)
    write_folder(source, arrays)
    save_pretrained(
      load_pretrained(source), tmp_path / name, read_config(source)
    )
    np.save(tmp_path / name / 'tokens.npy', arrays['tokens'])
    wanted[tmp_path / name] = arrays['logits']
  tokens = np.random.default_rng(0).integers(0, 29, (2, 20))
  for name, (keywords, pattern) in RECIPES.items():
    model = longjax.DecoderLM(**keywords, patterns=pattern, rngs=nnx.Rngs(0))
    folder = tmp_path / f'made_{name}'
    config = config_of(keywords, pattern, max_length=64)
    # Small files: there is an index to read.
    save_pretrained(model, folder, config, max_file_bytes=3000)
    assert (folder / 'model.safetensors.index.json').exists()
    again = load_pretrained(folder)
    for path, value in parameters(model).items():
      np.testing.assert_array_equal(parameters(again)[path], value)
    np.save(folder / 'tokens.npy', tokens)
    wanted[folder] = logits(model, tokens)
  subprocess.run(
    [python, '-c', LOAD_WITH_TRANSFORMERS, *wanted],
    check=True,
    capture_output=True,
  )
  for folder, expected in wanted.items():
    np.testing.assert_allclose(
      np.load(folder / 'logits.npy'),
      expected,
      rtol=0,
      atol=2e-5,
      err_msg=folder.name,
    )


def test_several_files(folder, tmp_path):
  model = load_pretrained(folder)
  target = tmp_path / 'parts'
  config = json.loads((folder / 'config.json').read_text())
  save_pretrained(model, target, config, max_file_bytes=4000)
  assert len(list(target.glob('model-*.safetensors'))) > 2
  again = parameters(load_pretrained(target))
  for path, value in parameters(model).items():
    np.testing.assert_array_equal(again[path], value)
  part = sorted(target.glob('model-*.safetensors'))[1]
  part.unlink()
  with pytest.raises(FileNotFoundError, match=f'{part.name} is missing'):
    load_pretrained(target)


def test_lm_infinite_is_one_argument(folder):
  tokens = golden('llama_gqa')['tokens']
  vanilla = load_pretrained(folder)
  bounded = load_pretrained(folder, patterns=longjax.Lambda(8, 2))
  a, b = (logits(model, tokens) for model in (vanilla, bounded))
  # Equal as long as nothing is left out: facts B11, identity 1.
  np.testing.assert_allclose(a[:, :9], b[:, :9], atol=1e-5)
  assert np.abs(a[:, 12:] - b[:, 12:]).max() > 0.01


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['llama_gqa', 'mpt'])
def test_dtype(name, tmp_path, dtype):
  """As published: tensors of half a word, and a config that says so."""
  arrays = golden(name)
  write_folder(tmp_path, arrays, stored_as=jnp.dtype(dtype), dtype=dtype)
  model = load_pretrained(tmp_path)
  assert {v.dtype for v in parameters(model).values()} == {jnp.dtype(dtype)}
  wanted = arrays['logits']
  got = logits(model, arrays['tokens'])
  assert got.dtype == np.float32  # logits always are
  assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
  wide = load_pretrained(tmp_path, dtype='float32')
  for path, value in parameters(wide).items():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, parameters(model)[path])
  # Written as they are, whatever an older config called it.
  config = read_config(tmp_path) | {'dtype': 'float32', 'torch_dtype': 'x'}
  save_pretrained(model, tmp_path / 'again', config)
  config = read_config(tmp_path / 'again')
  assert config['dtype'] == config['torch_dtype'] == dtype
  again = load_pretrained(tmp_path / 'again')
  for path, value in parameters(again).items():
    np.testing.assert_array_equal(value, parameters(model)[path])


def test_one_tensor_at_a_time(folder, monkeypatch):
  """What was read of a file is let go before the next is."""
  read, held, most = weights.Tensors.read, [], 0

  def spy(self, *args):
    nonlocal most
    value = read(self, *args)
    held.append(weakref.ref(value))
    most = max(most, sum(reference() is not None for reference in held))
    return value

  monkeypatch.setattr(weights.Tensors, 'read', spy)
  load_pretrained(folder, dtype='bfloat16')
  assert len(held) == 2 * 9 + 3 and most <= 2


def test_rows_of_a_shared_tensor_are_read_alone(tmp_path, monkeypatch):
  """MPT's query, key and value lie in one tensor; each reads its third."""
  write_folder(tmp_path, golden('mpt'))
  read, shapes = weights.Tensors.read, []

  def spy(self, name, *args):
    value = read(self, name, *args)
    if 'Wqkv' in name:
      shapes.append(value.shape)
    return value

  monkeypatch.setattr(weights.Tensors, 'read', spy)
  load_pretrained(tmp_path)
  assert shapes == [(24, 24)] * 6


ON_TWO_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from longjax.interop import load_llama2c, load_pretrained
folder, tokens, out = sys.argv[1:]
mesh = jax.make_mesh(
  (2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
)
def place(path, shape):
  kernels = path[-1] == 'kernel' and shape[-1] % 2 == 0
  return NamedSharding(mesh, P(None, 'model') if kernels else P())
model = load_pretrained(folder, sharding=place)
kernel = model.layers[1].mlp.up.kernel[...]
assert {s.data.shape for s in kernel.addressable_shards} == {(16, 12)}
np.save(out, jax.jit(lambda tokens: model(tokens))(np.load(tokens)))
"""


def test_sharded_over_two_devices(folder, tmp_path):
  arrays = golden('llama_gqa')
  tokens, out = tmp_path / 'tokens.npy', tmp_path / 'logits.npy'
  np.save(tokens, arrays['tokens'])
  subprocess.run(
    [sys.executable, '-c', ON_TWO_DEVICES, folder, tokens, out],
    check=True,
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'},
  )
  np.testing.assert_allclose(np.load(out), arrays['logits'], atol=2e-5)


def test_sharding(folder):
  device = jax.devices()[0]
  place = jax.sharding.SingleDeviceSharding(device)
  asked = []

  def choose(path, shape):
    asked.append((path, shape))
    return place

  model = load_pretrained(folder, sharding=choose)
  assert dict(asked).keys() == parameters(model).keys()
  leaf = model.layers[0].attention.query.kernel[...]
  assert leaf.sharding == place


def test_older_configs(folder):
  """As written before RoPE's settings moved into one place."""
  path = folder / 'config.json'
  wanted = load_pretrained(folder)(golden('llama_gqa')['tokens'])
  config = json.loads(path.read_text())
  base = config.pop('rope_parameters')['rope_theta']
  config |= {'rope_theta': base, 'rope_scaling': None, 'torch_dtype': 'float32'}
  path.write_text(json.dumps(config))
  got = load_pretrained(folder)(golden('llama_gqa')['tokens'])
  np.testing.assert_array_equal(got, wanted)
  config['rope_scaling'] = {'type': 'linear', 'factor': 2.0}
  path.write_text(json.dumps(config))
  model = load_pretrained(folder)
  scaling = model.layers[0].attention.position.scaling
  assert scaling == longjax.positions.LinearScaling(2.0)


# --- What is wrong is named --------------------------------------------------


def test_no_folder_or_config(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere is no folder'):
    load_pretrained(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match=r'has no config\.json'):
    load_pretrained(tmp_path)
  path = tmp_path / 'config.json'
  for text, message in (
    ('{', 'is not JSON'),
    ('[1]', 'holds list, not an object'),
    ('{}', 'model_type None is not one of'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      load_pretrained(tmp_path)
  with pytest.raises(ValueError, match='is a file: a folder .* load_llama2c'):
    load_pretrained(path)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('llama_gqa', {'model_type': 'bert'}, "'bert' is not one of .*'llama'"),
    ('llama_gqa', {'hidden_act': 'relu'}, "hidden_act='relu'"),
    (
      'llama_gqa',
      {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}},
      "'dynamic' is not supported",
    ),
    (
      'llama_gqa',
      {'rope_parameters': {'rope_type': 'llama3', 'factor': 2.0}},
      "'llama3' needs low_freq_factor, got",
    ),
    (
      'llama_gqa',
      {'rope_scaling': {'type': 'linear'}, 'rope_parameters': None},
      "'linear' needs factor",
    ),
    (
      'llama_gqa',
      {'rope_parameters': {'partial_rotary_factor': 0.5}},
      'partial_rotary_factor=0.5',
    ),
    ('gptj', {'activation_function': 'relu'}, "activation_function='relu'"),
    ('mpt', {'attn_config': {'alibi': False}}, 'alibi=False'),
    ('mpt', {'attn_config': {'clip_qkv': 8}}, 'clip_qkv=8'),
    ('mpt', {'no_bias': False}, 'no_bias=False'),
  ],
)
def test_unsupported_configs(tmp_path, name, changes, message):
  write_folder(tmp_path, golden(name), **changes)
  with pytest.raises(UnsupportedConfig, match=message):
    load_pretrained(tmp_path)


def test_unsupported_dtype(folder):
  with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
    load_pretrained(folder, dtype='int8')


@pytest.mark.parametrize('dtype', ['int8', 'uint8'])
def test_quantized_weights(tmp_path, dtype):
  """Of the right names and shapes, but no numbers to multiply with."""
  write_folder(tmp_path, golden('llama_gqa'), stored_as=dtype)
  kind = {'int8': 'I8', 'uint8': 'U8'}[dtype]
  with pytest.raises(ValueError) as error:
    load_pretrained(tmp_path)
  message = str(error.value)
  assert "dtype not one of ('F32', 'BF16', 'F16', 'F64')" in message
  assert f'lm_head.weight is {kind}, ' in message
  assert message.endswith(' and 13 more')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'index.json is not JSON'),
    ('{"metadata": {}}', 'index.json has no weight_map'),
    (
      '{"weight_map": {"model.norm.weight": "model.safetensors", "a": '
      '"model.safetensors"}}',
      'says model.safetensors holds a; it does not',
    ),
  ],
)
def test_damaged_index(folder, text, message):
  (folder / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    load_pretrained(folder)


def test_no_weights(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(FileNotFoundError, match=r'pytorch_model\.bin.*converted'):
    load_pretrained(folder)


@pytest.mark.parametrize('size', [5, 100, 4000])
def test_truncated_weights(folder, size):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match='damaged or cut short'):
    load_pretrained(folder)


def test_weights_that_do_not_fit(folder):
  path = folder / 'model.safetensors'
  stored = load_file(path)
  norm = stored.pop('model.norm.weight')
  stored['model.nrom.weight'] = norm
  up = 'model.layers.1.mlp.up_proj.weight'
  stored[up] = stored[up][:-1]
  # Buffers that older checkpoints hold are no parameters.
  stored['model.layers.0.self_attn.rotary_emb.inv_freq'] = norm
  save_file(stored, path)
  with pytest.raises(ValueError) as error:
    load_pretrained(folder)
  message = str(error.value)
  assert 'missing: model.norm.weight;' in message
  assert 'unexpected: model.nrom.weight;' in message
  assert f'wrong shape: {up} is (23, 16), the config says (24, 16)' in message
  assert 'inv_freq' not in message


def test_saving_the_wrong_model(folder, tmp_path):
  model = load_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  with pytest.raises(FileExistsError, match='exists already'):
    save_pretrained(model, folder, config)
  config['intermediate_size'] = 40
  with pytest.raises(ValueError, match=r'layers\.0\.mlp\.down\.kernel'):
    save_pretrained(model, tmp_path / 'other', config)


def test_interleaved_rope_is_no_hugging_face_llama():
  keywords = llama(
    vocab_size=5,
    num_layers=1,
    features=8,
    num_heads=2,
    mlp_features=8,
    interleaved=True,
  )
  with pytest.raises(UnsupportedConfig, match='no interleaved RoPE'):
    config_of(keywords, max_length=8)
