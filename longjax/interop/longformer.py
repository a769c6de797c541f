"""Longformer and RoBERTa from folders in Hugging Face's format, and back.

Also the folders of Longformer's first release (AllenAI), whose tensors are
named as RoBERTa's and whose `attention_window` counts one side.
"""

import logging
import math
import os
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.interop import pretrained, weights
from longjax.interop.families import (
  Config,
  Family,
  UnsupportedConfig,
  refuse_unless,
)
from longjax.models.heads import HEADS
from longjax.models.longformer import Longformer
from longjax.patterns import Full, SlidingWindow

# transformers' names of classes, without Longformer or Roberta.
CLASSES = {
  'Model': 'pooler',
  'ForMaskedLM': 'masked_lm',
  'ForSequenceClassification': 'sequence_classification',
  'ForTokenClassification': 'token_classification',
  'ForQuestionAnswering': 'question_answering',
  'ForMultipleChoice': 'multiple_choice',
}
SUFFIXES = {head: suffix for suffix, head in CLASSES.items()}
ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}
# AllenAI's names of computations that are all the same window.
AI2_MODES = ('tvm', 'sliding_chunks')

# `{}` is the name of the encoder within the whole, such as 'longformer.'.
MODULES = {
  'embedding': '{}embeddings.word_embeddings',
  'position_embedding': '{}embeddings.position_embeddings',
  'type_embedding': '{}embeddings.token_type_embeddings',
  'embedding_norm': '{}embeddings.LayerNorm',
  'attention.query': 'attention.self.query',
  'attention.key': 'attention.self.key',
  'attention.value': 'attention.self.value',
  'attention.global_query': 'attention.self.query_global',
  'attention.global_key': 'attention.self.key_global',
  'attention.global_value': 'attention.self.value_global',
  'attention.output': 'attention.output.dense',
  'attention_norm': 'attention.output.LayerNorm',
  'mlp.up': 'intermediate.dense',
  'mlp.down': 'output.dense',
  'mlp_norm': 'output.LayerNorm',
  # Tied to the embedding, and stored all the same by some.
  'output': 'lm_head.decoder',
}
HEAD_MODULES = {
  None: {},
  'pooler': {'head.dense': '{}pooler.dense'},
  'masked_lm': {
    'head': 'lm_head',
    'head.dense': 'lm_head.dense',
    'head.norm': 'lm_head.layer_norm',
  },
  'sequence_classification': {
    'head.dense': 'classifier.dense',
    'head.output': 'classifier.out_proj',
  },
  'token_classification': {'head.output': 'classifier'},
  'question_answering': {'head.output': 'qa_outputs'},
  'multiple_choice': {
    'head.pooler.dense': '{}pooler.dense',
    'head.output': 'classifier',
  },
}
# Tensors of heads, and buffers of older files.
NOT_OF_THE_ENCODER = (
  r'^lm_head\.|^classifier\.|^qa_outputs\.|(^|\.)pooler\.dense\.'
)
BUFFERS = r'embeddings\.(position_ids|token_type_ids)$'
# A bias that is the same as lm_head.bias.
TWIN = 'lm_head.decoder.bias'


def is_ai2(config: Config) -> bool:
  """Whether it is of AllenAI's own release: windows of one side."""
  return 'attention_dilation' in config or (
    'attention_window' in config
    and config.get('attention_mode', 'longformer') != 'longformer'
  )


def is_longformer(config: Config) -> bool:
  """Whether it has windows; AllenAI's folders may call themselves RoBERTa."""
  return config.get('model_type') == 'longformer' or is_ai2(config)


def _per_layer(name, value, num_layers):
  values = value if isinstance(value, list | tuple) else [value] * num_layers
  if len(values) != num_layers:
    raise UnsupportedConfig(
      f'{name} has {len(values)} entries for {num_layers} layers'
    )
  return values


def read_windows(config: Config, num_layers: int) -> tuple:
  """The pattern of each layer."""
  windows = _per_layer(
    'attention_window', config.get('attention_window', 512), num_layers
  )
  if not is_ai2(config):
    return tuple(SlidingWindow.from_hf(window) for window in windows)
  refuse_unless(
    config, {'attention_mode': AI2_MODES, 'autoregressive': (False,)}
  )
  dilations = _per_layer(
    'attention_dilation', config.get('attention_dilation', 1), num_layers
  )
  return tuple(
    SlidingWindow(window, window, dilation)
    for window, dilation in zip(windows, dilations, strict=True)
  )


def write_windows(patterns) -> list[int]:
  """`attention_window` of the patterns.

  Raises:
    UnsupportedConfig: dilation, sides that differ, no window.
  """
  for pattern in patterns:
    if not (
      isinstance(pattern, SlidingWindow)
      and pattern == SlidingWindow(pattern.left, pattern.left)
      and 1 <= pattern.left < math.inf
    ):
      raise UnsupportedConfig(
        "Hugging Face's Longformer and LED have windows of two equal sides, "
        f'without dilation, not {pattern}'
      )
  return [2 * pattern.left for pattern in patterns]


def activation_of(mlp: str) -> str:
  """transformers' name of `longjax.nn.MLP`'s activation."""
  for theirs, ours in ACTIVATIONS.items():
    if mlp == ours:
      return theirs
  raise UnsupportedConfig(
    f'mlp {mlp!r} is not one of {tuple(ACTIVATIONS.values())}'
  )


def read(config: Config) -> dict:
  """config.json -> keywords of `Longformer`, but for `head`."""
  longformer = is_longformer(config)
  refuse_unless(
    config,
    {
      'hidden_act': tuple(ACTIVATIONS),
      'position_embedding_type': ('absolute',),
      'tie_word_embeddings': (True,),
      'is_decoder': (False,),
      'add_cross_attention': (False,),
    },
  )
  num_layers = config.get('num_hidden_layers', 12)
  pad = config.get('pad_token_id', 1)
  labels = config.get('id2label')
  dropout = config.get('hidden_dropout_prob', 0.1)
  return {
    'vocab_size': config.get('vocab_size', 30522 if longformer else 50265),
    'num_layers': num_layers,
    'features': config.get('hidden_size', 768),
    'num_heads': config.get('num_attention_heads', 12),
    'mlp_features': config.get('intermediate_size', 3072),
    'mlp': ACTIVATIONS[config.get('hidden_act', 'gelu')],
    'patterns': (
      read_windows(config, num_layers) if longformer else Full(causal=False)
    ),
    'max_positions': config.get('max_position_embeddings', 512) - pad - 1,
    'num_types': config.get('type_vocab_size', 2),
    'norm_epsilon': config.get('layer_norm_eps', 1e-12),
    'pad_token': pad,
    'separator_token': config.get(
      'sep_token_id', config.get('eos_token_id', 2)
    ),
    'num_labels': len(labels) if labels else config.get('num_labels', 2),
    'max_globals': 64 if longformer else 0,
    'dropout_rate': dropout,
    'attention_dropout_rate': config.get('attention_probs_dropout_prob', 0.1),
    'head_dropout_rate': config.get('classifier_dropout'),
  }


def config_of_longformer(model: Longformer) -> dict:
  """config.json of a model made here: a Longformer's, or with `Full` patterns
  and without global projections a RoBERTa's.

  Raises:
    UnsupportedConfig: it has what transformers' classes lack (dilation,
      windows of unequal sides, ...).
  """
  roberta = not model.max_globals
  windows = {}
  if roberta:
    if any(pattern != Full(causal=False) for pattern in model.patterns):
      raise UnsupportedConfig(
        f"Hugging Face's RoBERTa has full attention, not {model.patterns[0]}"
      )
  else:
    windows = {'attention_window': write_windows(model.patterns)}
  block = model.layers[0]
  labels = [f'LABEL_{number}' for number in range(model.num_labels)]
  kind = 'Roberta' if roberta else 'Longformer'
  return {
    'model_type': kind.lower(),
    'architectures': [kind + SUFFIXES[model.head_name or 'pooler']],
    'vocab_size': model.vocab_size,
    'num_hidden_layers': len(model.layers),
    'hidden_size': model.features,
    'num_attention_heads': model.num_heads,
    'intermediate_size': block.mlp.up.out_features,
    'hidden_act': activation_of(block.mlp.mlp),
    'max_position_embeddings': model.max_positions + model.pad_token + 1,
    'type_vocab_size': model.num_types,
    'layer_norm_eps': model.norm_epsilon,
    'pad_token_id': model.pad_token,
    'bos_token_id': 0,
    'eos_token_id': model.separator_token,
    'sep_token_id': model.separator_token,
    'id2label': dict(enumerate(labels)),
    'label2id': {label: number for number, label in enumerate(labels)},
    'hidden_dropout_prob': model.dropout_rate,
    'attention_probs_dropout_prob': model.attention_dropout_rate,
    **windows,
  }


def family(model_type: str, head: str | None, prefix: str, ignored=BUFFERS):
  """Where the parameters of a model with this head are."""
  modules = MODULES | HEAD_MODULES[head]
  return Family(
    model_type=model_type,
    architecture='',
    read=None,
    write=None,
    layer=f'{prefix}encoder.layer.{{}}',
    modules={ours: theirs.format(prefix) for ours, theirs in modules.items()},
    ignored=ignored,
  )


def _prefix(tensors, folder) -> str:
  """How the names of the encoder's tensors begin."""
  word = 'embeddings.word_embeddings.weight'
  for name in tensors:
    if name.endswith(word):
      return name.removesuffix(word)
  raise ValueError(f'{folder} has no tensor {word}: no Longformer or RoBERTa')


def _stored_head(config, tensors, prefix):
  """The head that the folder has."""
  for architecture in config.get('architectures') or ():
    for suffix, head in CLASSES.items():
      if re.fullmatch(f'(Longformer|Roberta){suffix}', architecture):
        if head == 'pooler' and f'{prefix}pooler.dense.weight' not in tensors:
          return None
        return head
  # The first releases name no class.
  return 'masked_lm' if 'lm_head.dense.weight' in tensors else None


def load(
  folder: str | os.PathLike,
  config: Config,
  *,
  head: str | None = 'stored',
  patterns=None,
  dtype=jnp.float32,
  sharding=None,
  seed: int = 0,
  **overrides,
) -> Longformer:
  """`load_pretrained` of a Longformer's or RoBERTa's folder.

  Args:
    folder, config: the folder and its config.json.
    head: 'stored' for that of the folder, None for none, or any other of
      `longjax.models.heads.HEADS`, which if the folder does not hold it is
      made anew, and says so; then give `num_labels` too.
    patterns, dtype, sharding: as of `load_pretrained`.
    seed: of a new head.
    **overrides: further keywords of `Longformer`.
  """
  model_type = config.get('model_type', 'roberta')
  if model_type == 'longformer' and is_ai2(config) and patterns is None:
    raise UnsupportedConfig(
      "model_type 'longformer' with AllenAI's attention_mode "
      f'{config.get("attention_mode")!r} or attention_dilation leaves open '
      'whether attention_window counts one side (AllenAI) or both: give '
      'patterns'
    )
  keywords = read(config) | {'dtype': dtype, 'param_dtype': dtype} | overrides
  if patterns is not None:
    keywords['patterns'] = patterns
  with weights.Tensors(folder) as tensors:
    prefix = _prefix(tensors, folder)
    stored = _stored_head(config, tensors, prefix)
    head = stored if head == 'stored' else head
    if head is not None and head not in HEADS:
      raise ValueError(f'head {head!r} is not one of {(None, *HEADS)}')
    keywords['head'] = head
    ignored = BUFFERS + '|' + re.escape(TWIN)
    new = {}
    if head != stored:
      ignored += '|' + NOT_OF_THE_ENCODER
      if head is not None:
        new = _new_head(head, keywords, seed)
        logging.getLogger('longjax').warning(
          'the head %s is new (the folder has %s): it is to be trained',
          head,
          stored,
        )
    names = family(model_type, head, prefix, ignored)
    if 'lm_head.bias' not in tensors and TWIN in tensors:
      names.modules['head'] = TWIN.removesuffix('.bias')

    def read_parameter(path, shape):
      if path in new:
        return new[path]
      return pretrained.read_tensor(tensors, names.tensor(path), shape)

    graphdef, abstract = pretrained.abstract_model(keywords, Longformer)
    parameters = nnx.to_flat_state(abstract)
    pretrained.check_tensors(
      tensors, names, [(p, leaf) for p, leaf in parameters if p not in new]
    )
    return pretrained.fill(graphdef, abstract, read_parameter, dtype, sharding)


def _new_head(head, keywords, seed):
  """{path: initial value} of a head's parameters."""
  made = HEADS[head](
    keywords['features'],
    keywords['num_labels'],
    vocab_size=keywords['vocab_size'],
    epsilon=keywords['norm_epsilon'],
    dropout_rate=0.0,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs=nnx.Rngs(seed),
  )
  return {
    ('head', *path): np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param))
  }


def wanted(config: Config, model: Longformer):
  """(family, state of shapes) of what `save_pretrained` is to write."""
  if not isinstance(model, Longformer):
    raise ValueError(
      f'a config of {config["model_type"]} is no config of a '
      f'{type(model).__name__}'
    )
  if is_ai2(config):
    raise UnsupportedConfig(
      "the config is AllenAI's: save with config_of_longformer(model)"
    )
  kind = config['model_type'].capitalize()
  architecture = kind + SUFFIXES[model.head_name or 'pooler']
  if config.get('architectures') != [architecture]:
    raise ValueError(
      f'the model has the head {model.head_name}, whose config has '
      f"architectures ['{architecture}'], not {config.get('architectures')}"
    )
  keywords = read(config) | {'head': model.head_name}
  if keywords['patterns'] not in (model.patterns, model.patterns[0]):
    raise ValueError(
      f'the model has the patterns {model.patterns}, the config says '
      f'{keywords["patterns"]}'
    )
  _, abstract = pretrained.abstract_model(keywords, Longformer)
  # The base classes have no name for themselves.
  base = model.head_name in (None, 'pooler')
  prefix = '' if base else f'{config["model_type"]}.'
  return family(config['model_type'], model.head_name, prefix), abstract
