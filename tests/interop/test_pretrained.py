"""Folders in Hugging Face's format: transformers' own numbers, and back."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import longjax
from longjax.generation.sample import sample
from longjax.interop import config_of, load_pretrained, save_pretrained
from longjax.interop.families import UnsupportedConfig
from longjax.models import gptj, llama, mpt

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
NAMES = sorted(
  p.stem.removeprefix('pretrained_') for p in GOLDENS.glob('pretrained_*.npz')
)


def golden(name):
  with np.load(GOLDENS / f'pretrained_{name}.npz') as file:
    return dict(file)


def write_folder(folder, arrays, **changes):
  """The golden model as transformers' save_pretrained would write it."""
  config = json.loads(str(arrays['config'])) | changes
  (folder / 'config.json').write_text(json.dumps(config))
  weights = {
    name.removeprefix('weights/'): value
    for name, value in arrays.items()
    if name.startswith('weights/')
  }
  save_file(weights, folder / 'model.safetensors')
  return weights


@pytest.fixture
def folder(tmp_path):
  write_folder(tmp_path, golden('llama_gqa'))
  return tmp_path


def parameters(model):
  return {
    path: np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def test_there_is_a_golden_file_for_each_option():
  assert len(NAMES) >= 9


@pytest.mark.parametrize('name', NAMES)
def test_equals_transformers(name, tmp_path):
  arrays = golden(name)
  write_folder(tmp_path, arrays)
  model = load_pretrained(tmp_path)
  logits = jax.jit(lambda tokens: model(tokens))(arrays['tokens'])
  scale = np.abs(arrays['logits']).max()
  assert np.abs(logits - arrays['logits']).max() <= 2e-5 * max(1, scale)
  # Through the cache, token by token.
  prompt, wanted = arrays['greedy'][:5], arrays['greedy'][5:]
  got = sample(model, prompt, len(wanted), temperature=0)
  np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()
  weights = write_folder(source, golden(name))
  model = load_pretrained(source)
  config = json.loads((source / 'config.json').read_text())
  save_pretrained(model, target, config)
  saved = load_file(target / 'model.safetensors')
  assert saved.keys() == weights.keys()
  for tensor, value in weights.items():
    np.testing.assert_array_equal(saved[tensor], value)
  assert json.loads((target / 'config.json').read_text())['dtype'] == 'float32'


LOAD_WITH_TRANSFORMERS = """
import sys, numpy as np, torch, transformers
folder, tokens, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
  logits = model(torch.tensor(np.load(tokens)).long()).logits
np.save(out, logits.numpy())
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


@pytest.mark.parametrize('name', RECIPES)
def test_transformers_loads_what_is_saved(name, tmp_path):
  """... of a model made here, whose config is made here too."""
  python = ROOT / '.venv-goldens' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no .venv-goldens (make goldens): no transformers to load with')
  keywords, pattern = RECIPES[name]
  model = longjax.DecoderLM(**keywords, patterns=pattern, rngs=nnx.Rngs(0))
  folder = tmp_path / 'model'
  config = config_of(keywords, pattern, max_length=64)
  # Small files: there is an index to read.
  save_pretrained(model, folder, config, max_file_bytes=3000)
  tokens = np.random.default_rng(0).integers(0, 29, (2, 20))
  np.save(tmp_path / 'tokens.npy', tokens)
  subprocess.run(
    [
      python,
      '-c',
      LOAD_WITH_TRANSFORMERS,
      folder,
      tmp_path / 'tokens.npy',
      tmp_path / 'logits.npy',
    ],
    check=True,
    capture_output=True,
  )
  wanted = np.load(tmp_path / 'logits.npy')
  np.testing.assert_allclose(model(jnp.asarray(tokens)), wanted, atol=2e-5)
  again = load_pretrained(folder)
  for path, value in parameters(model).items():
    np.testing.assert_array_equal(parameters(again)[path], value)


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
  a, b = (np.asarray(model(tokens)) for model in (vanilla, bounded))
  # Equal as long as nothing is left out: facts B11, identity 1.
  np.testing.assert_allclose(a[:, :9], b[:, :9], atol=1e-5)
  assert np.abs(a[:, 12:] - b[:, 12:]).max() > 0.01


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_dtype(folder, dtype):
  model = load_pretrained(folder, dtype=dtype)
  assert {v.dtype for v in parameters(model).values()} == {jnp.dtype(dtype)}
  logits = np.asarray(model(golden('llama_gqa')['tokens']), np.float32)
  wanted = golden('llama_gqa')['logits']
  assert np.abs(logits - wanted).max() < 0.1 * np.abs(wanted).max()


def test_the_config_says_the_dtype(tmp_path):
  write_folder(tmp_path, golden('llama_gqa'), dtype='bfloat16')
  model = load_pretrained(tmp_path)
  assert {v.dtype for v in parameters(model).values()} == {
    jnp.dtype('bfloat16')
  }


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
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='is not JSON'):
    load_pretrained(tmp_path)


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
  weights = load_file(path)
  norm = weights.pop('model.norm.weight')
  weights['model.nrom.weight'] = norm
  up = 'model.layers.1.mlp.up_proj.weight'
  weights[up] = weights[up][:-1]
  # Buffers that older checkpoints hold are no parameters.
  weights['model.layers.0.self_attn.rotary_emb.inv_freq'] = norm
  save_file(weights, path)
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
