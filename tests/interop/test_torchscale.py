"""torchscale's and Prov-GigaPath's state dicts, against a model in numpy.

The numpy model is written from the papers and the formulas of the library, in
float64 and with loops for who sees whom; it shares nothing with longjax.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import longjax
from longjax.interop import load_pretrained, save_pretrained
from longjax.interop.families import UnsupportedConfig
from longjax.interop.torchscale import config_of_longnet
from longjax.models import DecoderLM, Encoder, SlideEncoder
from longjax.models.longnet import longnet, magneto
from tests.models.filled import filled
from tests.ops.helpers import QUICK

D, HEADS, HIDDEN, LENGTH = 24, 4, 40, 30
# 6 neither divides 16 nor is it as small as the number of heads: of every
# second segment, rows would be moved, were the filling not taken away.
DILATED = dict(segment_length='[4, 16, 100]', dilated_ratio='[1, 6, 2]')

CONFIGS = {
  'decoder': dict(
    model_type='longnet_decoder',
    decoder_layers=2,
    decoder_embed_dim=D,
    decoder_attention_heads=HEADS,
    decoder_ffn_embed_dim=HIDDEN,
    vocab_size=17,
    xpos_rel_pos=True,
    xpos_scale_base=32,
    no_scale_embedding=False,
    share_decoder_input_output_embed=True,
    **DILATED,
  ),
  'untied': dict(
    model_type='longnet_decoder',
    decoder_layers=1,
    decoder_embed_dim=D,
    decoder_attention_heads=HEADS,
    decoder_ffn_embed_dim=HIDDEN,
    vocab_size=17,
    subln=False,
    layernorm_eps=1e-3,
    segment_length=[16],
    dilated_ratio=[6],
  ),
  'encoder': dict(
    model_type='longnet_encoder',
    encoder_layers=2,
    encoder_embed_dim=D,
    encoder_attention_heads=HEADS,
    encoder_ffn_embed_dim=HIDDEN,
    normalize_output=False,
    xpos_rel_pos=True,
    **DILATED,
  ),
  'tokens': dict(
    model_type='longnet_encoder',
    encoder_layers=1,
    encoder_embed_dim=D,
    encoder_attention_heads=HEADS,
    encoder_ffn_embed_dim=HIDDEN,
    vocab_size=17,
    no_output_layer=True,
  ),
  'gigapath': dict(
    model_type='gigapath',
    encoder_layers=1,
    encoder_embed_dim=D,
    encoder_attention_heads=HEADS,
    encoder_ffn_embed_dim=HIDDEN,
    in_chans=10,
    tile_size=256,
    slide_ngrids=12,
    drop_path_rate=0.1,
    **DILATED,
  ),
}
# How a stack's names begin: by itself, in fairseq's model, in GigaPath's.
PREFIXES = {'untied': 'decoder.', 'gigapath': 'encoder.'}


def side_of(config):
  return 'decoder' if config['model_type'] == 'longnet_decoder' else 'encoder'


def state_dict(name, seed=0):
  """Random weights under torchscale's names."""
  config, prefix = CONFIGS[name], PREFIXES.get(name, '')
  rng = np.random.default_rng(seed)
  state = {}

  def linear(at, outputs, inputs):
    state[f'{at}.weight'] = rng.normal(size=(outputs, inputs)) / inputs**0.5
    state[f'{at}.bias'] = 0.3 * rng.normal(size=outputs)

  def norm(at, size):
    state[f'{at}.weight'] = 1 + 0.3 * rng.normal(size=size)
    state[f'{at}.bias'] = 0.3 * rng.normal(size=size)

  for layer in range(config[f'{side_of(config)}_layers']):
    at = f'{prefix}layers.{layer}'
    for projection in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
      linear(f'{at}.self_attn.{projection}', D, D)
    linear(f'{at}.ffn.fc1', HIDDEN, D)
    linear(f'{at}.ffn.fc2', D, HIDDEN)
    norm(f'{at}.self_attn_layer_norm', D)
    norm(f'{at}.final_layer_norm', D)
    if config.get('subln', True):
      norm(f'{at}.self_attn.inner_attn_ln', D)
      norm(f'{at}.ffn.ffn_layernorm', HIDDEN)
  if config.get('normalize_output', True):
    norm(f'{prefix}layer_norm', D)
  if config.get('vocab_size', -1) > 0:
    state[f'{prefix}embed_tokens.weight'] = rng.normal(size=(17, D))
  if name == 'untied':
    state[f'{prefix}output_projection.weight'] = rng.normal(size=(17, D))
  if name == 'gigapath':
    linear('patch_embed.proj', D, 10)
    norm('norm', D)
    state['cls_token'] = rng.normal(size=(1, 1, D))
  return {n: np.ascontiguousarray(y, np.float32) for n, y in state.items()}


def write(folder, config, state):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(state, folder / 'model.safetensors')
  return folder


# --- The model in numpy ------------------------------------------------------


def rotate(x, power, base):
  """xPos of x [T, H, size]: interleaved pairs, scaled about the middle."""
  length, _, size = x.shape
  out = np.zeros(x.shape)
  for t in range(length):
    for pair in range(size // 2):
      angle = t * 10000 ** (-2 * pair / size)
      zeta = (2 * pair + 0.4 * size) / (1.4 * size)
      scale = zeta ** (power * (t - length // 2) / base)
      a, b = x[t, :, 2 * pair], x[t, :, 2 * pair + 1]
      out[t, :, 2 * pair] = scale * (a * math.cos(angle) - b * math.sin(angle))
      out[t, :, 2 * pair + 1] = scale * (
        b * math.cos(angle) + a * math.sin(angle)
      )
  return out


def counts(config, length, causal):
  """How often head h's query i sees key j: torchscale's groups of heads."""
  if 'segment_length' not in config:
    return np.ones((HEADS, length, length))
  read = [config[n] for n in ('segment_length', 'dilated_ratio')]
  read = [json.loads(x) if isinstance(x, str) else x for x in read]
  c = np.zeros((HEADS, length, length))
  for w, r in zip(*read, strict=True):
    for h in range(HEADS):
      group = h // math.ceil(HEADS / r)
      for i in range(length):
        for j in range(i + 1 if causal else length):
          if i // w == j // w and i % w % r == group and j % w % r == group:
            c[h, i, j] += 1
  return c


def numpy_stack(config, state, prefix, x):
  """States of a stack before the first layer and after each; the last norm."""
  side = side_of(config)
  eps = config.get('layernorm_eps', 1e-5)
  state = {n: y.astype(np.float64) for n, y in state.items()}
  length = len(x)

  def linear(at, x):
    return x @ state[f'{at}.weight'].T + state[f'{at}.bias']

  def norm(at, x, eps=eps):
    if f'{at}.weight' not in state:
      return x
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * state[f'{at}.weight'] + state[f'{at}.bias']

  c = counts(config, length, side == 'decoder')
  states = [x]
  for layer in range(config[f'{side}_layers']):
    at = f'{prefix}layers.{layer}'
    h = norm(f'{at}.self_attn_layer_norm', x)
    q, k, v = (
      linear(f'{at}.self_attn.{n}_proj', h).reshape(length, HEADS, -1)
      for n in 'qkv'
    )
    if config.get('xpos_rel_pos'):
      base = config.get('xpos_scale_base', 512)
      q, k = rotate(q, 1, base), rotate(k, -1, base)
    out = np.zeros(v.shape)
    for head in range(HEADS):
      s = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
      p = c[head] * np.exp(s - s.max(-1, keepdims=True))
      total = p.sum(-1, keepdims=True)
      out[:, head] = p @ v[:, head] / np.where(total > 0, total, 1)
    out = norm(f'{at}.self_attn.inner_attn_ln', out.reshape(length, -1))
    x = x + linear(f'{at}.self_attn.out_proj', out)
    h = linear(f'{at}.ffn.fc1', norm(f'{at}.final_layer_norm', x))
    h = h * np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(h)
    x = x + linear(f'{at}.ffn.fc2', norm(f'{at}.ffn.ffn_layernorm', h))
    states.append(x)
  return states, norm(f'{prefix}layer_norm', x), norm


def inputs_of(name):
  rng = np.random.default_rng(7)
  if name == 'gigapath':
    tiles = rng.normal(size=(1, LENGTH - 1, 10)).astype(np.float32)
    places = rng.integers(0, 12 * 256, (1, LENGTH - 1, 2))
    return jnp.asarray(tiles), jnp.asarray(places)
  if name == 'encoder':
    return (jnp.asarray(rng.normal(size=(1, LENGTH, D)), jnp.float32),)
  return (jnp.asarray(rng.integers(0, 17, (1, LENGTH))),)


def in_numpy(name, state):
  config, prefix = CONFIGS[name], PREFIXES.get(name, '')
  x = [np.asarray(y[0]) for y in inputs_of(name)]
  if name == 'gigapath':
    tiles, places = x[0].astype(float), x[1]
    tiles = tiles @ state['patch_embed.proj.weight'].T.astype(float)
    tiles = tiles + state['patch_embed.proj.bias']
    for tile, (first, second) in zip(tiles, places // 256, strict=True):
      # The grid's columns (the second coordinate) take the first half.
      for half, place in enumerate((second, first)):
        for i in range(D // 4):
          angle = place * 10000 ** (-i / (D // 4))
          tile[half * D // 2 + i] += math.sin(angle)
          tile[half * D // 2 + D // 4 + i] += math.cos(angle)
    x = np.concatenate([state['cls_token'][0], tiles])
    _, out, norm = numpy_stack(config, state, prefix, x)
    return norm('norm', out, 1e-6)[0]
  x = x[0]
  if x.ndim == 1:
    table = state[f'{prefix}embed_tokens.weight'].astype(float)
    x = table[x] * (1 if config.get('no_scale_embedding', True) else D**0.5)
  _, out, _ = numpy_stack(config, state, prefix, x.astype(float))
  if side_of(config) == 'encoder':
    return out
  table = f'{prefix}output_projection.weight'
  return out @ state.get(table, state[f'{prefix}embed_tokens.weight']).T


# --- Loading -----------------------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
def test_equals_the_model_in_numpy(name, tmp_path):
  state = state_dict(name)
  model = load_pretrained(write(tmp_path / 'model', CONFIGS[name], state))
  got = jax.jit(model.__call__, compiler_options=QUICK)(*inputs_of(name))[0]
  wanted = in_numpy(name, state)
  assert got.shape == wanted.shape
  np.testing.assert_allclose(
    got, wanted, atol=2e-5 * max(1, np.abs(wanted).max())
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
  state = state_dict(name)
  model = load_pretrained(write(tmp_path / 'model', CONFIGS[name], state))
  save_pretrained(model, tmp_path / 'saved', CONFIGS[name])
  saved = load_file(tmp_path / 'saved' / 'model.safetensors')
  prefix = '' if name == 'gigapath' else PREFIXES.get(name, '')
  if name == 'decoder':  # tied: strict loading wants both
    np.testing.assert_array_equal(
      saved.pop('output_projection.weight'), saved['embed_tokens.weight']
    )
  assert {f'{prefix}{n}' for n in saved} == state.keys()
  for tensor, value in saved.items():
    np.testing.assert_array_equal(value, state[f'{prefix}{tensor}'])


def test_a_config_is_made_from_a_model(tmp_path):
  """What it says is the same model again."""
  pattern = longjax.Dilated((4, 8), (1, 2), offsets='torchscale')
  both_ways = longjax.Dilated((8,), (2,), False, offsets='torchscale')
  tiny = dict(num_layers=1, features=16, num_heads=4, mlp_features=24)
  models = [
    filled(
      DecoderLM, **longnet('125m', vocab_size=11, **tiny), patterns=pattern
    ),
    filled(Encoder, **tiny, **magneto(), patterns=both_ways),
    filled(
      SlideEncoder,
      6,
      **tiny,
      **magneto(),
      patterns=longjax.Full(causal=False),
      pool='mean',
    ),
  ]
  for number, model in enumerate(models):
    folder = tmp_path / str(number)
    save_pretrained(model, folder, config_of_longnet(model))
    again = load_pretrained(folder)
    assert type(again) is type(model)
    stack, other = (getattr(m, 'encoder', m) for m in (model, again))
    ours, theirs = stack.patterns[0], other.patterns[0]
    assert theirs.ratios == getattr(ours, 'ratios', (1,))
    assert theirs.offsets == 'torchscale' and theirs.detach_weights
    assert stack.layers[0].attention.position == (
      other.layers[0].attention.position
    )
    for (path, a), (_, b) in zip(
      nnx.to_flat_state(nnx.state(model)),
      nnx.to_flat_state(nnx.state(again)),
      strict=True,
    ):
      np.testing.assert_array_equal(a[...], b[...], str(path))


def test_gigapaths_own_schedule(tmp_path):
  config = {**CONFIGS['gigapath'], 'max_wsi_size': 262_144}
  for setting in DILATED:
    config.pop(setting)
  model = load_pretrained(
    write(tmp_path / 'model', config, state_dict('gigapath'))
  )
  (pattern,) = model.encoder.patterns
  assert pattern.segment_lengths == (1024, 5792, 32768, 185363, 1048576)
  assert pattern.offsets == 'torchscale' and pattern.detach_weights


# --- What is wrong is named --------------------------------------------------


def test_weights_that_do_not_fit(tmp_path):
  state = state_dict('decoder')
  state['layer_nrom.weight'] = state.pop('layer_norm.weight')
  up = 'layers.1.ffn.fc1.weight'
  state[up] = state[up][:-1].copy()
  # Buffers are no parameters, and a tied read-out is stored all the same.
  state['layers.0.self_attn.xpos.scale'] = np.ones(3, np.float32)
  state['output_projection.weight'] = state['embed_tokens.weight']
  folder = write(tmp_path / 'model', CONFIGS['decoder'], state)
  with pytest.raises(ValueError) as error:
    load_pretrained(folder)
  message = str(error.value)
  assert 'missing: layer_norm.weight;' in message
  assert 'unexpected: layer_nrom.weight;' in message
  assert f'wrong shape: {up} is (39, 24), the config says (40, 24)' in message
  assert 'xpos' not in message and 'output_projection' not in message


def test_what_was_trained_on_top_can_be_left_out(tmp_path):
  state = state_dict('gigapath')
  state['classifier.weight'] = np.ones((2, D), np.float32)
  folder = write(tmp_path / 'model', CONFIGS['gigapath'], state)
  with pytest.raises(ValueError, match=r'unexpected: classifier\.weight'):
    load_pretrained(folder)
  load_pretrained(folder, ignore=r'^classifier\.')


def test_no_stack_or_two(tmp_path):
  state = state_dict('encoder')
  first = 'layers.0.self_attn.q_proj.weight'
  folder = write(
    tmp_path / 'two',
    CONFIGS['encoder'],
    state | {f'decoder.{first}': state[first]},
  )
  with pytest.raises(ValueError, match=r"one stack .* found \['.*decoder"):
    load_pretrained(folder)
  folder = write(tmp_path / 'none', CONFIGS['encoder'], {'x': state[first]})
  with pytest.raises(ValueError, match='one stack .* found none'):
    load_pretrained(folder)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('decoder', {'deepnorm': True}, 'deepnorm=True'),
    ('decoder', {'multiway': True}, 'multiway=True'),
    ('decoder', {'moe_freq': 2}, 'moe_freq=2'),
    ('decoder', {'rel_pos_buckets': 32}, 'rel_pos_buckets=32'),
    ('decoder', {'activation_fn': 'relu'}, "activation_fn='relu'"),
    ('decoder', {'vocab_size': -1}, 'vocab_size=-1 .* must be given'),
    (
      'decoder',
      {'decoder_normalize_before': False},
      'decoder_normalize_before=False',
    ),
    ('decoder', {'segment_length': 'many'}, "segment_length='many' is no list"),
    ('tokens', {'no_output_layer': False}, 'have no read-out'),
    ('encoder', {'layernorm_embedding': True}, 'layernorm_embedding=True'),
  ],
)
def test_unsupported_configs(name, changes, message, tmp_path):
  folder = write(tmp_path / 'model', CONFIGS[name] | changes, state_dict(name))
  with pytest.raises(UnsupportedConfig, match=message):
    load_pretrained(folder)


def test_schedules_that_cannot_be(tmp_path):
  config = CONFIGS['encoder'] | {'dilated_ratio': '[1]'}
  folder = write(tmp_path / 'model', config, state_dict('encoder'))
  with pytest.raises(ValueError, match='3 segment lengths .* and 1 ratios'):
    load_pretrained(folder)


def test_saving_the_wrong_model(tmp_path):
  model = load_pretrained(
    write(tmp_path / 'model', CONFIGS['encoder'], state_dict('encoder'))
  )
  with pytest.raises(ValueError, match='one of a DecoderLM, not of a Encoder'):
    save_pretrained(model, tmp_path / 'other', CONFIGS['decoder'])
  tiny = dict(num_layers=1, features=16, num_heads=4)
  paper = longjax.Dilated((8,), (2,), causal=False)
  for keywords, message in (
    (
      dict(patterns=paper, **magneto()),
      'torchscale has no longnet_encoder with Dil',
    ),
    (dict(patterns=longjax.Full(False), position='rope'), 'xPos or nothing'),
    (dict(patterns=longjax.Full(False)), 'has no such model.*query.bias'),
  ):
    odd = filled(Encoder, **tiny, **keywords)
    with pytest.raises(UnsupportedConfig, match=message):
      config_of_longnet(odd)
