"""Hugging Face's decoder families: their configs and the names of tensors.

A `Family` turns a `config.json` into keywords of `DecoderLM` and the pattern
that the model was trained with, and back, and knows which tensor each
parameter is. A setting that DecoderLM does not have is refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from longjax.models.llama import gptj, llama, mpt
from longjax.patterns import Full, Pattern, SlidingWindow
from longjax.positions import LinearScaling, Llama3Scaling, YarnScaling

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a parameter is: a stored tensor, or one of `parts` equal shares of
  its rows, stored as [outputs, inputs] if `transposed`."""

  name: str
  transposed: bool = False
  part: int = 0
  parts: int = 1


@dataclasses.dataclass(frozen=True)
class Family:
  """Attributes:

  model_type: as in config.json.
  read: config -> (keywords of DecoderLM, pattern).
  write: (keywords, pattern, longest text) -> config.
  layer: the name of a layer, with {} for its number.
  modules: our names of modules to theirs; (name, part, parts) where several
    share a tensor.
  ignored: tensors that are no parameters.
  copies: names under which a tensor is stored once more, to its own.
  """

  model_type: str
  architecture: str
  read: Callable[[Config], tuple[dict, Pattern]]
  write: Callable[[dict, Pattern, int], dict]
  layer: str
  modules: Mapping[str, str | tuple[str, int, int]]
  ignored: str = r'(?!)'
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def tensor(self, path: tuple) -> Tensor:
    """The tensor of the parameter at `path` in the module's state."""
    if path[0] == 'output_bias':
      return Tensor(f'{self.modules["output"]}.bias')
    if path[0] == 'output':
      return Tensor(f'{self.modules["output"]}.weight')
    *module, field = path
    prefix = ''
    if module[0] == 'layers':
      prefix = self.layer.format(module[1]) + '.'
      module = module[2:]
    name = self.modules['.'.join(module)]
    name, part, parts = (name, 0, 1) if isinstance(name, str) else name
    kind = 'bias' if field == 'bias' else 'weight'
    return Tensor(f'{prefix}{name}.{kind}', field == 'kernel', part, parts)

  def ignores(self, name: str) -> bool:
    return re.search(self.ignored, name) is not None


class UnsupportedConfig(ValueError):
  """A config.json that asks for what longjax does not have."""


def refuse_unless(config: Config, allowed: Mapping[str, tuple]):
  """Raises for a setting that is not one of those allowed (first: default)."""
  for name, values in allowed.items():
    value = config.get(name, values[0])
    if value not in values:
      raise UnsupportedConfig(
        f'{name}={value!r} is not supported, only '
        f'{" or ".join(map(repr, values))}'
      )


# --- RoPE's settings ---------------------------------------------------------


def _rope(config: Config):
  """(base, scaling), from either of the two ways they are written."""
  settings = config.get('rope_parameters') or config.get('rope_scaling') or {}
  base = settings.get('rope_theta', config.get('rope_theta', 10000.0))
  kind = settings.get('rope_type', settings.get('type', 'default'))
  original = settings.get(
    'original_max_position_embeddings',
    config.get('max_position_embeddings', 2048),
  )
  refuse_unless(settings, {'partial_rotary_factor': (1, None)})
  needed = {
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
    'yarn': ('factor',),
  }
  for name in needed.get(kind, ()):
    if settings.get(name) is None:
      raise UnsupportedConfig(
        f'rope_type {kind!r} needs {name}, got {settings}'
      )
  if kind == 'default':
    return base, None
  if kind == 'linear':
    return base, LinearScaling(settings['factor'])
  if kind == 'llama3':
    return base, Llama3Scaling(
      settings['factor'],
      settings['low_freq_factor'],
      settings['high_freq_factor'],
      original,
    )
  if kind == 'yarn':
    for name in ('mscale', 'mscale_all_dim'):
      if settings.get(name):
        raise UnsupportedConfig(f'rope setting {name} is not supported')
    return base, YarnScaling(
      settings['factor'],
      original,
      fast=settings.get('beta_fast') or 32.0,
      slow=settings.get('beta_slow') or 1.0,
      amplitude=settings.get('attention_factor'),
      truncate=settings.get('truncate', True),
    )
  raise UnsupportedConfig(
    f'rope_type {kind!r} is not supported, only default, linear, llama3 and '
    'yarn (the frequencies of dynamic and longrope depend on the length at '
    'hand)'
  )


def _rope_parameters(rope) -> dict:
  settings = {'rope_type': 'default', 'rope_theta': rope.base}
  scaling = rope.scaling
  if isinstance(scaling, LinearScaling):
    settings |= {'rope_type': 'linear', 'factor': scaling.factor}
  elif isinstance(scaling, Llama3Scaling):
    settings |= {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_factor,
      'high_freq_factor': scaling.high_factor,
      'original_max_position_embeddings': scaling.original_length,
    }
  elif isinstance(scaling, YarnScaling):
    settings |= {
      'rope_type': 'yarn',
      'factor': scaling.factor,
      'original_max_position_embeddings': scaling.original_length,
      'beta_fast': scaling.fast,
      'beta_slow': scaling.slow,
      'attention_factor': scaling.amplitude,
      'truncate': scaling.truncate,
    }
  return settings


# --- The families ------------------------------------------------------------


def _read_llama(config: Config):
  refuse_unless(config, {'hidden_act': ('silu', 'swish')})
  base, scaling = _rope(config)
  heads = config.get('num_attention_heads', 32)
  keywords = llama(
    vocab_size=config.get('vocab_size', 32000),
    num_layers=config.get('num_hidden_layers', 32),
    features=config.get('hidden_size', 4096),
    num_heads=heads,
    num_kv_heads=config.get('num_key_value_heads') or heads,
    head_dim=config.get('head_dim'),
    mlp_features=config.get('intermediate_size', 11008),
    rope_base=base,
    rope_scaling=scaling,
    norm_epsilon=config.get('rms_norm_eps', 1e-6),
    tie_embedding=config.get('tie_word_embeddings', False),
    attention_bias=config.get('attention_bias', False),
    mlp_bias=config.get('mlp_bias', False),
  )
  return keywords, Full()


def _write_llama(keywords, pattern, max_length):
  del pattern
  rope = keywords['position']
  heads = keywords['num_heads']
  return {
    'vocab_size': keywords['vocab_size'],
    'num_hidden_layers': keywords['num_layers'],
    'hidden_size': keywords['features'],
    'num_attention_heads': heads,
    'num_key_value_heads': keywords['num_kv_heads'] or heads,
    'head_dim': keywords['head_dim'] or keywords['features'] // heads,
    'intermediate_size': keywords['mlp_features'],
    'hidden_act': 'silu',
    'max_position_embeddings': max_length,
    'rms_norm_eps': keywords['norm_epsilon'],
    'rope_parameters': _rope_parameters(rope),
    'tie_word_embeddings': keywords['tie_embedding'],
    'attention_bias': keywords['attention_bias'],
    'mlp_bias': keywords['mlp_bias'],
  }


def _read_mistral(config: Config):
  defaults = {
    'num_key_value_heads': 8,
    'intermediate_size': 14336,
    'sliding_window': 4096,
  }
  config = defaults | dict(config)
  keywords, pattern = _read_llama(config)
  # A query sees `sliding_window` keys, itself among them.
  if (window := config['sliding_window']) is not None:
    pattern = SlidingWindow(window - 1)
  return keywords, pattern


def _write_mistral(keywords, pattern, max_length):
  config = _write_llama(keywords, pattern, max_length)
  for name in ('attention_bias', 'mlp_bias'):
    if config.pop(name):
      raise UnsupportedConfig(f'mistral has no {name}')
  left = pattern.reach()[0]
  return config | {'sliding_window': None if left == math.inf else left + 1}


LLAMA_MODULES = {
  'embedding': 'model.embed_tokens',
  'final_norm': 'model.norm',
  'output': 'lm_head',
  'attention_norm': 'input_layernorm',
  'attention.query': 'self_attn.q_proj',
  'attention.key': 'self_attn.k_proj',
  'attention.value': 'self_attn.v_proj',
  'attention.output': 'self_attn.o_proj',
  'mlp_norm': 'post_attention_layernorm',
  'mlp.gate': 'mlp.gate_proj',
  'mlp.up': 'mlp.up_proj',
  'mlp.down': 'mlp.down_proj',
}

# GPT-J's names of activations.
_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}


def _read_gptj(config: Config):
  activation = config.get('activation_function', 'gelu_new')
  if activation not in _ACTIVATIONS:
    raise UnsupportedConfig(
      f'activation_function={activation!r} is not supported, only '
      f'{" or ".join(map(repr, _ACTIVATIONS))}'
    )
  features, heads = config.get('n_embd', 4096), config.get('n_head', 16)
  keywords = gptj(
    vocab_size=config.get('vocab_size', 50400),
    num_layers=config.get('n_layer', 28),
    features=features,
    num_heads=heads,
    rotary_dim=config.get('rotary_dim', 64) or features // heads,
    mlp_features=config.get('n_inner') or 4 * features,
    mlp=_ACTIVATIONS[activation],
    norm_epsilon=config.get('layer_norm_epsilon', 1e-5),
    tie_embedding=config.get('tie_word_embeddings', False),
  )
  return keywords, Full()


def _write_gptj(keywords, pattern, max_length):
  del pattern
  features, heads = keywords['features'], keywords['num_heads']
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return {
    'vocab_size': keywords['vocab_size'],
    'n_layer': keywords['num_layers'],
    'n_embd': features,
    'n_head': heads,
    'rotary_dim': keywords['position'].rotated_width(features // heads),
    'n_inner': keywords['mlp_features'],
    'n_positions': max_length,
    'activation_function': activations[keywords['mlp']],
    'layer_norm_epsilon': keywords['norm_epsilon'],
    'tie_word_embeddings': keywords['tie_embedding'],
  }


GPTJ_MODULES = {
  'embedding': 'transformer.wte',
  'final_norm': 'transformer.ln_f',
  'output': 'lm_head',
  'attention_norm': 'ln_1',
  'attention.query': 'attn.q_proj',
  'attention.key': 'attn.k_proj',
  'attention.value': 'attn.v_proj',
  'attention.output': 'attn.out_proj',
  'mlp.up': 'mlp.fc_in',
  'mlp.down': 'mlp.fc_out',
}


def _read_mpt(config: Config):
  refuse_unless(
    config,
    {
      'no_bias': (True,),
      'logit_scale': (None,),
      'tie_word_embeddings': (True,),
      'norm_type': ('low_precision_layernorm', 'layernorm'),
    },
  )
  # What the class of the config has, attention's own settings nested.
  refuse_unless(
    config.get('attn_config') or {},
    {
      'alibi': (True,),
      'alibi_bias_max': (8,),
      'attn_type': ('multihead_attention',),
      'clip_qkv': (None,),
      'softmax_scale': (None,),
      'prefix_lm': (False,),
      'qk_ln': (False,),
      'attn_uses_sequence_id': (False,),
    },
  )
  features = config.get('d_model', 2048)
  keywords = mpt(
    vocab_size=config.get('vocab_size', 50368),
    num_layers=config.get('n_layers', 24),
    features=features,
    num_heads=config.get('n_heads', 16),
    mlp_features=config.get('expansion_ratio', 4) * features,
    norm_epsilon=config.get('layer_norm_epsilon', 1e-5),
  )
  return keywords, Full()


def _write_mpt(keywords, pattern, max_length):
  del pattern
  features, hidden = keywords['features'], keywords['mlp_features']
  if hidden != 4 * features:
    raise UnsupportedConfig(
      f'mpt has an MLP of 4 * {features} features, not {hidden}'
    )
  return {
    'vocab_size': keywords['vocab_size'],
    'n_layers': keywords['num_layers'],
    'd_model': features,
    'n_heads': keywords['num_heads'],
    'expansion_ratio': 4,
    'max_seq_len': max_length,
    'no_bias': True,
    'layer_norm_epsilon': keywords['norm_epsilon'],
    'tie_word_embeddings': True,
    'attn_config': {'alibi': True, 'alibi_bias_max': 8},
  }


MPT_MODULES = {
  'embedding': 'transformer.wte',
  'final_norm': 'transformer.norm_f',
  'output': 'lm_head',
  'attention_norm': 'norm_1',
  'attention.query': ('attn.Wqkv', 0, 3),
  'attention.key': ('attn.Wqkv', 1, 3),
  'attention.value': ('attn.Wqkv', 2, 3),
  'attention.output': 'attn.out_proj',
  'mlp_norm': 'norm_2',
  'mlp.up': 'ffn.up_proj',
  'mlp.down': 'ffn.down_proj',
}

FAMILIES = {
  family.model_type: family
  for family in (
    Family(
      'llama',
      'LlamaForCausalLM',
      _read_llama,
      _write_llama,
      'model.layers.{}',
      LLAMA_MODULES,
      r'rotary_emb\.inv_freq$',
    ),
    Family(
      'mistral',
      'MistralForCausalLM',
      _read_mistral,
      _write_mistral,
      'model.layers.{}',
      LLAMA_MODULES,
      r'rotary_emb\.inv_freq$',
    ),
    Family(
      'gptj',
      'GPTJForCausalLM',
      _read_gptj,
      _write_gptj,
      'transformer.h.{}',
      GPTJ_MODULES,
      r'attn\.(masked_)?bias$|attn\.embed_positions$',
    ),
    Family(
      'mpt',
      'MptForCausalLM',
      _read_mpt,
      _write_mpt,
      'transformer.blocks.{}',
      MPT_MODULES,
    ),
  )
}
