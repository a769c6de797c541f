"""LongNet's models of the torchscale library, and Prov-GigaPath's, and back.

torchscale keeps settings and weights apart. Here a folder holds both: the state
dict as model.safetensors, and config.json with a `model_type` and torchscale's
own names of settings:

  longnet_decoder  a language model (`DecoderLM`): decoder_layers,
                   decoder_embed_dim, decoder_attention_heads, vocab_size, ...
  longnet_encoder  `Encoder`, of embeddings or (with vocab_size) of tokens:
                   encoder_layers, ...
  gigapath         `SlideEncoder`: encoder_layers, ..., in_chans, tile_size,
                   slide_ngrids, max_wsi_size, global_pool

What a setting is by default is what it is by default there. Dilated patterns
have torchscale's rule of head offsets and its gradient. What it does at the
ends of segments is not imitated: zeros that fill up a segment are no keys here,
and no row moves where a ratio does not divide its segment.

Dropout is the caller's, by keyword: these models are loaded without.
"""

import dataclasses
import json
import os
import re

import jax.numpy as jnp
from flax import nnx

from longjax.interop import pretrained, weights
from longjax.interop.families import (
  Config,
  Family,
  Tensor,
  UnsupportedConfig,
  refuse_unless,
)
from longjax.models.decoder import DecoderLM
from longjax.models.encoder import Encoder
from longjax.models.longnet import SlideEncoder, gigapath_schedule
from longjax.patterns import Dilated, Full, Pattern
from longjax.positions import XPos

MODELS = {
  'longnet_decoder': DecoderLM,
  'longnet_encoder': Encoder,
  'gigapath': SlideEncoder,
}
# `{}` is how the names of the stack begin, such as 'decoder.'.
MODULES = {
  'embedding': '{}embed_tokens',
  'output': '{}output_projection',
  'final_norm': '{}layer_norm',
  'attention_norm': 'self_attn_layer_norm',
  'attention.query': 'self_attn.q_proj',
  'attention.key': 'self_attn.k_proj',
  'attention.value': 'self_attn.v_proj',
  'attention.inner_norm': 'self_attn.inner_attn_ln',
  'attention.output': 'self_attn.out_proj',
  'mlp_norm': 'final_layer_norm',
  'mlp.up': 'ffn.fc1',
  'mlp.inner_norm': 'ffn.ffn_layernorm',
  'mlp.down': 'ffn.fc2',
  'tile_projection': 'patch_embed.proj',
  'norm': 'norm',
}
TIED = ('embedding', 'output')
FIRST = 'layers.0.self_attn.q_proj.weight'
# Buffers: fairseq's, xPos' scales and GigaPath's sinusoids.
IGNORED = r'(^|\.)version$|\.xpos\.scale$|^pos_embed$'
# Settings that ask for what the models here lack, by torchscale's default and
# with `{}` for encoder or decoder.
PLAIN = {
  'activation_fn': ('gelu',),
  '{}_normalize_before': (True,),
  'deepnorm': (False,),
  'multiway': (False,),
  'moe_freq': (0,),
  'rel_pos_buckets': (0,),
  'layernorm_embedding': (False,),
}


class _Names(Family):
  """As the tensors of a state dict are named."""

  def tensor(self, path):
    if path == ('class_token',):
      return Tensor('cls_token')
    return super().tensor(path[1:] if path[0] == 'encoder' else path)


def _names(model_type, prefix, ignored=IGNORED) -> _Names:
  return _Names(
    model_type,
    '',
    None,
    None,
    f'{prefix}layers.{{}}',
    {ours: theirs.format(prefix) for ours, theirs in MODULES.items()},
    ignored,
  )


def _numbers(config, name) -> tuple[int, ...] | None:
  """A list of whole numbers, which torchscale has as text."""
  value = config.get(name)
  if isinstance(value, str):
    try:
      value = json.loads(value) if value else None
    except json.JSONDecodeError:
      pass
  if value is None or isinstance(value, list | tuple):
    return None if value is None else tuple(value)
  raise UnsupportedConfig(f'{name}={value!r} is no list of whole numbers')


def read(config: Config) -> dict:
  """config.json -> keywords of the model, with its patterns.

  Raises:
    UnsupportedConfig: a setting that the models here do not have.
  """
  model_type = config['model_type']
  side = 'decoder' if model_type == 'longnet_decoder' else 'encoder'
  refuse_unless(
    config, {name.format(side): allowed for name, allowed in PLAIN.items()}
  )
  features = config.get(f'{side}_embed_dim', 768)
  xpos = config.get('xpos_rel_pos', False)
  keywords = {
    'num_layers': config.get(f'{side}_layers', 12),
    'features': features,
    'num_heads': config.get(f'{side}_attention_heads', 12),
    'mlp_features': config.get(f'{side}_ffn_embed_dim', 3072),
    'patterns': _pattern(config, causal=side == 'decoder'),
    'position': (
      XPos(scale_base=float(config.get('xpos_scale_base', 512)))
      if xpos
      else None
    ),
    'norm': 'layer',
    'norm_epsilon': config.get('layernorm_eps', 1e-5),
    'sub_norm': config.get('subln', True),
    'mlp': 'gelu',
    'attention_bias': True,
    'mlp_bias': True,
    'scale_embedding': not config.get('no_scale_embedding', True),
  }
  vocab_size = config.get('vocab_size', -1)
  if side == 'decoder':
    refuse_unless(config, {'no_output_layer': (False,)})
    if vocab_size < 1:
      raise UnsupportedConfig(
        f'vocab_size={vocab_size} of a longnet_decoder: it must be given'
      )
    tied = config.get('share_decoder_input_output_embed', False)
    return keywords | {'vocab_size': vocab_size, 'tie_embedding': tied}
  keywords['final_norm'] = config.get('normalize_output', True)
  if model_type == 'longnet_encoder':
    if vocab_size > 0 and not config.get('no_output_layer', False):
      raise UnsupportedConfig(
        f'vocab_size={vocab_size} without no_output_layer: encoders here have '
        'no read-out over the vocabulary'
      )
    return keywords | {'vocab_size': vocab_size if vocab_size > 0 else None}
  return keywords | {
    'tile_features': config.get('in_chans', 1536),
    'tile_size': config.get('tile_size', 256),
    'grid': config.get('slide_ngrids', 1000),
    'pool': 'mean' if config.get('global_pool', False) else 'class',
  }


def _pattern(config, causal) -> Pattern:
  lengths = _numbers(config, 'segment_length')
  ratios = _numbers(config, 'dilated_ratio')
  if config['model_type'] == 'gigapath' and lengths is None:
    side = config.get('max_wsi_size', 262_144) // config.get('tile_size', 256)
    return gigapath_schedule(side**2)
  if lengths is None:
    return Full(causal)
  return Dilated(
    lengths,
    ratios or (),
    causal,
    offsets='torchscale',
    detach_weights=True,
  )


def load(
  folder: str | os.PathLike,
  config: Config,
  *,
  patterns=None,
  dtype=jnp.float32,
  sharding=None,
  ignore: str = r'(?!)',
  **overrides,
) -> nnx.Module:
  """`load_pretrained` of such a folder.

  Args:
    folder, config: the folder and its config.json.
    patterns, dtype, sharding: as of `load_pretrained`.
    ignore: a regular expression of tensors that may be there and are not read,
      such as a head that was trained on top.
    **overrides: further keywords of the model.
  """
  keywords = read(config) | {'dtype': dtype, 'param_dtype': dtype} | overrides
  if patterns is not None:
    keywords['patterns'] = patterns
  model_type = config['model_type']
  with weights.Tensors(folder) as tensors:
    names = _names(model_type, _prefix(tensors), f'{IGNORED}|{ignore}')

    def read_parameter(path, shape):
      return pretrained.read_tensor(tensors, names.tensor(path), shape)

    graphdef, abstract = pretrained.abstract_model(keywords, MODELS[model_type])
    parameters = nnx.to_flat_state(abstract)
    pretrained.check_tensors(tensors, names, parameters)
    return pretrained.fill(graphdef, abstract, read_parameter, dtype, sharding)


def _prefix(tensors) -> str:
  """How the names of the stack's tensors begin, whatever it was a part of."""
  found = [name for name in tensors if re.search(rf'(^|\.){FIRST}$', name)]
  if len(found) != 1:
    raise ValueError(
      f'one stack with a tensor {FIRST} is needed, found {found or "none"}'
    )
  return found[0].removesuffix(FIRST)


def wanted(config: Config, model: nnx.Module):
  """(names, state of shapes) of what `save_pretrained` is to write."""
  model_type = config['model_type']
  kind = MODELS[model_type]
  if not isinstance(model, kind):
    raise ValueError(
      f'a config of {model_type} is one of a {kind.__name__}, not of a '
      f'{type(model).__name__}'
    )
  _, abstract = pretrained.abstract_model(read(config), kind)
  names = _names(model_type, 'encoder.' if model_type == 'gigapath' else '')
  if model_type == 'longnet_decoder' and model.output is None:
    # torchscale has a tied read-out under both names.
    own, other = (f'{MODULES[n].format("")}.weight' for n in TIED)
    names = dataclasses.replace(names, copies={other: own})
  return names, abstract


def config_of_longnet(model: nnx.Module) -> dict:
  """config.json of a model made here.

  Args:
    model: a `DecoderLM`, `Encoder` or `SlideEncoder` with the blocks of
      `models.longnet.magneto`, and in all layers one `Dilated` pattern with
      torchscale's offsets, or `Full`.

  Raises:
    UnsupportedConfig: it has what torchscale lacks.
  """
  kinds = {kind: name for name, kind in MODELS.items()}
  if type(model) not in kinds:
    raise ValueError(
      f'a {type(model).__name__} is none of {sorted(k.__name__ for k in kinds)}'
    )
  model_type = kinds[type(model)]
  stack = model.encoder if model_type == 'gigapath' else model
  side = 'decoder' if model_type == 'longnet_decoder' else 'encoder'
  block = stack.layers[0]
  config = {
    'model_type': model_type,
    f'{side}_layers': len(stack.layers),
    f'{side}_embed_dim': stack.features,
    f'{side}_attention_heads': block.attention.num_heads,
    f'{side}_ffn_embed_dim': block.mlp.up.out_features,
    'layernorm_eps': block.attention_norm.epsilon,
    'subln': block.attention.inner_norm is not None,
    'no_scale_embedding': not stack.scale_embedding,
    'flash_attention': True,
    **_settings_of_pattern(stack.patterns, model_type),
    **_settings_of_position(block.attention.position),
  }
  if side == 'decoder':
    config |= {
      'vocab_size': model.vocab_size,
      'share_decoder_input_output_embed': model.output is None,
    }
  else:
    config |= {
      'normalize_output': stack.final_norm is not None,
      'no_output_layer': True,
      'vocab_size': stack.vocab_size or -1,
    }
  if model_type == 'gigapath':
    config |= {
      'in_chans': model.tile_features,
      'tile_size': model.tile_size,
      'slide_ngrids': model.grid,
      'global_pool': model.pool == 'mean',
    }
  # What else differs shows in the parameters.
  _, abstract = pretrained.abstract_model(read(config), type(model))
  known = {path for path, _ in nnx.to_flat_state(abstract)}
  found = {path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  if block.mlp.mlp != 'gelu' or known != found:
    odd = sorted('.'.join(map(str, path)) for path in known ^ found)
    raise UnsupportedConfig(
      f'torchscale has no such model: mlp {block.mlp.mlp!r}, and parameters '
      f'that only one of the two has: {odd or "none"}'
    )
  return config


def _settings_of_pattern(patterns, model_type) -> dict:
  pattern, causal = patterns[0], model_type == 'longnet_decoder'
  if set(patterns) == {Full(causal)}:
    # GigaPath has no full attention but by one segment that is long enough.
    whole = {'segment_length': '[10000000]', 'dilated_ratio': '[1]'}
    return whole if model_type == 'gigapath' else {}
  if (
    len(set(patterns)) > 1
    or not isinstance(pattern, Dilated)
    or pattern.causal != causal
    or (pattern.offsets != 'torchscale' and max(pattern.ratios) > 1)
  ):
    raise UnsupportedConfig(
      f'torchscale has no {model_type} with {pattern}: patterns are Full or '
      "one Dilated for all layers, with offsets='torchscale'"
    )
  return {
    'segment_length': str(list(pattern.segment_lengths)),
    'dilated_ratio': str(list(pattern.ratios)),
  }


def _settings_of_position(position) -> dict:
  if position is None:
    return {'xpos_rel_pos': False}
  if not isinstance(position, XPos) or position.base != 10000:
    raise UnsupportedConfig(f'torchscale has xPos or nothing, not {position}')
  return {'xpos_rel_pos': True, 'xpos_scale_base': position.scale_base}
