"""LED and BART from folders in Hugging Face's format, and back.

Also the folders of LED's first release (AllenAI), named as BART's, whose
`attention_window` counts one side and whose tables of positions have two
unused rows.
"""

import dataclasses
import os

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
from longjax.interop.longformer import (
  ACTIVATIONS,
  activation_of,
  is_ai2,
  read_windows,
  write_windows,
)
from longjax.models.led import LED
from longjax.patterns import Full

CLASSES = {
  'led': 'LEDForConditionalGeneration',
  'bart': 'BartForConditionalGeneration',
}
# Rows before the positions, of BART's tables and of AllenAI's.
OFFSET = 2

SHARED = {
  'attention_norm': 'self_attn_layer_norm',
  'mlp.up': 'fc1',
  'mlp.down': 'fc2',
  'mlp_norm': 'final_layer_norm',
}


def _projections(ours, theirs, output='out_proj'):
  names = {
    f'{ours}.{name}': f'{theirs}.{name[0]}_proj'
    for name in ('query', 'key', 'value')
  }
  return names | {f'{ours}.output': f'{theirs}.{output}'}


BART_ENCODER = SHARED | _projections('attention', 'self_attn')
LED_ENCODER = SHARED | {
  'attention.query': 'self_attn.longformer_self_attn.query',
  'attention.key': 'self_attn.longformer_self_attn.key',
  'attention.value': 'self_attn.longformer_self_attn.value',
  'attention.global_query': 'self_attn.longformer_self_attn.query_global',
  'attention.global_key': 'self_attn.longformer_self_attn.key_global',
  'attention.global_value': 'self_attn.longformer_self_attn.value_global',
  'attention.output': 'self_attn.output',
}
DECODER = (
  SHARED
  | _projections('attention', 'self_attn')
  | _projections('cross_attention', 'encoder_attn')
  | {'cross_norm': 'encoder_attn_layer_norm'}
)
OUTSIDE = {
  'encoder_positions': 'encoder.embed_positions',
  'encoder_norm': 'encoder.layernorm_embedding',
  'decoder_positions': 'decoder.embed_positions',
  'decoder_norm': 'decoder.layernorm_embedding',
}
# All the same table; which of them a file holds differs.
TABLES = ('shared', 'encoder.embed_tokens', 'decoder.embed_tokens')
BUFFERS = (
  r'(encoder|decoder)\.(version|embed_tokens\.weight)$'
  r'|shared\.weight$|^lm_head\.weight$'
)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderFamily(Family):
  """`modules` are those of the encoder's layers.

  Attributes:
    prefix: of all names, such as 'led.'.
    table: which name the embedding has.
  """

  prefix: str = ''
  table: str = TABLES[0]

  def tensor(self, path):
    if path[0] == 'output_bias':
      return Tensor('final_logits_bias')
    if path[0] == 'embedding':
      return Tensor(f'{self.prefix}{self.table}.weight')
    *module, field = path
    kind = 'bias' if field == 'bias' else 'weight'
    side = module[0].removesuffix('_layers')
    if side == module[0]:
      name = OUTSIDE[module[0]]
    else:
      names = self.modules if side == 'encoder' else DECODER
      name = f'{side}.layers.{module[1]}.{names[".".join(module[2:])]}'
    return Tensor(f'{self.prefix}{name}.{kind}', field == 'kernel')


def family(model_type, has_windows, prefix, table=TABLES[0]):
  """Where the parameters of a model are."""
  return EncoderDecoderFamily(
    model_type=model_type,
    architecture=CLASSES[model_type],
    read=None,
    write=None,
    layer='',
    # 'output' is the read-out, which is the embedding.
    modules=(LED_ENCODER if has_windows else BART_ENCODER)
    | {'output': 'lm_head'},
    ignored=BUFFERS,
    prefix=prefix,
    table=table,
  )


def has_windows(config: Config) -> bool:
  """Whether it is a LED; AllenAI's folders call themselves BART."""
  return config.get('model_type') == 'led' or is_ai2(config)


def read(config: Config) -> dict:
  """config.json -> keywords of `LED`."""
  led = has_windows(config)
  refuse_unless(
    config,
    {
      'activation_function': tuple(ACTIVATIONS),
      'tie_word_embeddings': (True,),
      'encoder_layerdrop': (0.0,),
      'decoder_layerdrop': (0.0,),
      # Of BART's relatives, in older files.
      'normalize_before': (False,),
      'add_final_layer_norm': (False,),
      'normalize_embedding': (True,),
      'static_position_embeddings': (False,),
      'extra_pos_embeddings': (OFFSET,),
    },
  )
  layers = config.get('encoder_layers', 12)
  if led:
    lengths = [
      config.get(f'max_{side}_position_embeddings', default)
      for side, default in (('encoder', 16384), ('decoder', 1024))
    ]
  else:
    lengths = [config.get('max_position_embeddings', 1024)] * 2
  return {
    'vocab_size': config.get('vocab_size', 50265),
    'num_encoder_layers': layers,
    'num_decoder_layers': config.get('decoder_layers', 12),
    'features': config.get('d_model', 1024),
    'num_encoder_heads': config.get('encoder_attention_heads', 16),
    'num_decoder_heads': config.get('decoder_attention_heads', 16),
    'encoder_mlp_features': config.get('encoder_ffn_dim', 4096),
    'decoder_mlp_features': config.get('decoder_ffn_dim', 4096),
    'mlp': ACTIVATIONS[config.get('activation_function', 'gelu')],
    'patterns': read_windows(config, layers) if led else Full(causal=False),
    'max_positions': lengths[0],
    'max_target_positions': lengths[1],
    'position_offset': 0 if config.get('model_type') == 'led' else OFFSET,
    'max_globals': 64 if led else 0,
    'scale_embedding': config.get('scale_embedding', False),
    'pad_token': config.get('pad_token_id', 1),
    'bos_token': config.get('bos_token_id', 0),
    'eos_token': config.get('eos_token_id', 2),
    'decoder_start_token': config.get('decoder_start_token_id', 2),
    'dropout_rate': config.get('dropout', 0.1),
    'attention_dropout_rate': config.get('attention_dropout', 0.0),
    'activation_dropout_rate': config.get('activation_dropout', 0.0),
  }


def config_of_led(model: LED) -> dict:
  """config.json of a LED made here; with `Full` patterns, without global
  projections and with `position_offset=2` of a BART.

  Raises:
    UnsupportedConfig: it has what transformers' classes lack.
  """
  bart = not model.max_globals
  offset = OFFSET if bart else 0
  if model.position_offset != offset:
    raise UnsupportedConfig(
      f'position_offset={model.position_offset}, but the tables of a '
      f'{"BART" if bart else "LED"} have {offset} unused rows'
    )
  if bart:
    if any(pattern != Full(causal=False) for pattern in model.patterns):
      raise UnsupportedConfig(
        f"Hugging Face's BART has full attention, not {model.patterns[0]}"
      )
    if model.max_positions != model.max_target_positions:
      raise UnsupportedConfig(
        'both sides of a BART have as many positions, not '
        f'{model.max_positions} and {model.max_target_positions}'
      )
    lengths = {'max_position_embeddings': model.max_positions}
  else:
    lengths = {
      'max_encoder_position_embeddings': model.max_positions,
      'max_decoder_position_embeddings': model.max_target_positions,
      'attention_window': write_windows(model.patterns),
    }
  encoder, decoder = model.encoder_layers[0].mlp, model.decoder_layers[0].mlp
  model_type = 'bart' if bart else 'led'
  return {
    'model_type': model_type,
    'architectures': [CLASSES[model_type]],
    'is_encoder_decoder': True,
    'vocab_size': model.vocab_size,
    'encoder_layers': len(model.encoder_layers),
    'decoder_layers': len(model.decoder_layers),
    'd_model': model.features,
    'encoder_attention_heads': model.num_encoder_heads,
    'decoder_attention_heads': model.num_decoder_heads,
    'encoder_ffn_dim': encoder.up.out_features,
    'decoder_ffn_dim': decoder.up.out_features,
    'activation_function': activation_of(encoder.mlp),
    'scale_embedding': model.scale_embedding,
    'pad_token_id': model.pad_token,
    'bos_token_id': model.bos_token,
    'eos_token_id': model.eos_token,
    'decoder_start_token_id': model.decoder_start_token,
    'dropout': model.dropout_rate,
    'attention_dropout': model.attention_dropout_rate,
    'activation_dropout': model.activation_dropout_rate,
    **lengths,
  }


def _place(tensors, folder):
  """(prefix of all names, name of the embedding)."""
  for table in TABLES:
    for name in tensors:
      if name.endswith(f'{table}.weight'):
        return name.removesuffix(f'{table}.weight'), table
  raise ValueError(f'{folder} has no tensor {TABLES[0]}.weight: no LED or BART')


def load(
  folder: str | os.PathLike,
  config: Config,
  *,
  patterns=None,
  dtype=jnp.float32,
  sharding=None,
  **overrides,
) -> LED:
  """`load_pretrained` of a LED's or BART's folder.

  Args:
    folder, config: the folder and its config.json.
    patterns, dtype, sharding: as of `load_pretrained`.
    **overrides: further keywords of `LED`.
  """
  keywords = read(config) | {'dtype': dtype, 'param_dtype': dtype} | overrides
  if patterns is not None:
    keywords['patterns'] = patterns
  with weights.Tensors(folder) as tensors:
    prefix, table = _place(tensors, folder)
    model_type = config.get('model_type', 'bart')
    names = family(model_type, has_windows(config), prefix, table)
    graphdef, abstract = pretrained.abstract_model(keywords, LED)
    parameters = nnx.to_flat_state(abstract)
    # Not in all files; then it is 0.
    bias = ('output_bias',)
    known = {path: names.tensor(path).name in tensors for path, _ in parameters}

    def read_parameter(path, shape):
      if path == bias and not known[path]:
        return jnp.zeros(shape)
      return pretrained.read_tensor(tensors, names.tensor(path), shape)

    pretrained.check_tensors(
      tensors, names, [(p, x) for p, x in parameters if p != bias or known[p]]
    )
    return pretrained.fill(graphdef, abstract, read_parameter, dtype, sharding)


def wanted(config: Config, model: LED):
  """(family, state of shapes) of what `save_pretrained` is to write."""
  if not isinstance(model, LED):
    raise ValueError(
      f'a config of {config["model_type"]} is no config of a '
      f'{type(model).__name__}'
    )
  if is_ai2(config):
    raise UnsupportedConfig(
      "the config is AllenAI's: save with config_of_led(to_led(model, length))"
    )
  keywords = read(config)
  if keywords['patterns'] not in (model.patterns, model.patterns[0]):
    raise ValueError(
      f'the model has the patterns {model.patterns}, the config says '
      f'{keywords["patterns"]}'
    )
  _, abstract = pretrained.abstract_model(keywords, LED)
  model_type = config['model_type']
  prefix = 'led.' if model_type == 'led' else 'model.'
  return family(model_type, has_windows(config), prefix), abstract
