"""Longer models from shorter ones, as Longformer is made from RoBERTa and LED
from BART.

arXiv 2004.05150, sections 5 and 7: the learned positions are tiled over the new
length, and the projections of global tokens start as copies of the others. The
model is to be trained further.
"""

import json
import pathlib
import shutil

import jax.numpy as jnp
from flax import nnx

from longjax.interop.families import UnsupportedConfig
from longjax.interop.led import config_of_led
from longjax.interop.longformer import config_of_longformer
from longjax.interop.pretrained import (
  load_pretrained,
  read_config,
  save_pretrained,
)
from longjax.models.led import LED
from longjax.models.longformer import Longformer
from longjax.patterns import Full, SlidingWindow

# Files of tokenizers, which the longer model shares.
TOKENIZER_FILES = (
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
  'special_tokens_map.json',
  'added_tokens.json',
)


TOKENIZER_CONFIG = 'tokenizer_config.json'
# Entries of config.json that the longer model shares.
KEPT = (
  'id2label',
  'label2id',
  'bos_token_id',
  'classifier_dropout',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'init_std',
  'initializer_range',
)


def tile(table, first: int, rows: int):
  """A longer table of positions.

  Args:
    table: [first + old, features]; the first rows are no positions.
    first: how many rows those are.
    rows: how many positions there are to be.

  Returns:
    [first + rows, features]: the positions over and over.
  """
  table = jnp.asarray(table)
  old = table.shape[0] - first
  return table[jnp.r_[:first, first + jnp.arange(rows) % old]]


def check_longer(length: int, old: int):
  """Refuses a length that drops positions."""
  if length < old:
    raise ValueError(
      f'length {length} is shorter than the {old} positions of the model'
    )


def _windows(patterns, window, default):
  """The patterns of the new model; a model of full attention gets windows."""
  full = all(pattern == Full(causal=False) for pattern in patterns)
  if window is None and not full:
    return patterns
  pattern = SlidingWindow.from_hf(default if window is None else window)
  return (pattern,) * len(patterns)


def to_longformer(
  model: Longformer, length: int, window: int | None = None
) -> Longformer:
  """A Longformer of `length` positions from a RoBERTa or a Longformer.

  Args:
    model: as loaded by `load_pretrained`; left as it is.
    length: positions of the new model, at least as many as the old one's.
    window: keys seen on both sides together, even, as Hugging Face counts; a
      RoBERTa's default is 512, a Longformer's its own.

  Returns:
    The new model: positions tiled; if the old one has full attention,
    `global_query`, `global_key` and `global_value` are copies of `query`, `key`
    and `value`. With no global tokens it is the old model wherever no text is
    longer than half a window and one.

  Raises:
    ValueError: a shorter length, or an odd window.
  """
  check_longer(length, model.max_positions)
  patterns = _windows(model.patterns, window, 512)
  max_globals = model.max_globals or 64
  block = model.layers[0]
  attention = block.attention
  longer = nnx.eval_shape(
    lambda: Longformer(
      model.vocab_size,
      len(model.layers),
      model.features,
      model.num_heads,
      patterns=patterns,
      max_positions=length,
      head=model.head_name,
      num_labels=model.num_labels,
      max_globals=max_globals,
      mlp_features=block.mlp.up.out_features,
      mlp=block.mlp.mlp,
      norm_epsilon=model.norm_epsilon,
      num_types=model.num_types,
      pad_token=model.pad_token,
      separator_token=model.separator_token,
      dropout_rate=model.dropout_rate,
      attention_dropout_rate=model.attention_dropout_rate,
      head_dropout_rate=model.head_dropout_rate,
      remat=model.remat,
      dtype=model.dtype,
      param_dtype=attention.query.param_dtype,
      implementation=attention.implementation,
      rngs=nnx.Rngs(0),
    )
  )
  first = model.pad_token + 1
  return _filled(
    longer,
    model,
    {'position_embedding': lambda table: tile(table, first, length)},
  )


def copy_projections(model: Longformer) -> None:
  """Makes the projections of global tokens copies of the others, in place.

  Masked language modelling, where no token is global, trains the others only.
  """
  if not model.max_globals:
    return
  for block in model.layers:
    for name in ('query', 'key', 'value'):
      source = getattr(block.attention, name)
      target = getattr(block.attention, f'global_{name}')
      for field in ('kernel', 'bias'):
        getattr(target, field)[...] = getattr(source, field)[...]


def _filled(longer, model, tables):
  """The abstract model `longer` with the parameters of `model`.

  Args:
    longer: a module of shapes.
    model: what it is to equal.
    tables: {name of a module: what its table becomes}.
  """
  old = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  graphdef, abstract = nnx.split(longer)
  flat = []
  for path, leaf in nnx.to_flat_state(abstract):
    source = path
    if source not in old:  # ..., 'global_query', 'kernel'
      *rest, name, field = path
      source = (*rest, name.removeprefix('global_'), field)
    value = old[source][...]
    if path[0] in tables:
      value = tables[path[0]](value)
    flat.append((path, leaf.replace(jnp.array(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_led(model: LED, length: int, window: int | None = None) -> LED:
  """A LED of `length` encoder positions from a BART or a LED.

  Args:
    model: as loaded by `load_pretrained`; left as it is.
    length: of the encoder, at least as many positions as the old one's.
    window: as of `to_longformer`; a BART's default is 1024.

  Returns:
    The new model, as in the paper's section 7; the decoder stays as it is. The
    tables of positions have no unused rows.

  Raises:
    ValueError: a shorter length, or an odd window.
  """
  check_longer(length, model.max_positions)
  patterns = _windows(model.patterns, window, 1024)
  attention = model.encoder_layers[0].attention
  longer = nnx.eval_shape(
    lambda: LED(
      model.vocab_size,
      len(model.encoder_layers),
      len(model.decoder_layers),
      model.features,
      model.num_encoder_heads,
      model.num_decoder_heads,
      patterns=patterns,
      max_positions=length,
      max_target_positions=model.max_target_positions,
      max_globals=model.max_globals or 64,
      encoder_mlp_features=model.encoder_layers[0].mlp.up.out_features,
      decoder_mlp_features=model.decoder_layers[0].mlp.up.out_features,
      mlp=model.encoder_layers[0].mlp.mlp,
      scale_embedding=model.scale_embedding,
      pad_token=model.pad_token,
      bos_token=model.bos_token,
      eos_token=model.eos_token,
      decoder_start_token=model.decoder_start_token,
      dropout_rate=model.dropout_rate,
      attention_dropout_rate=model.attention_dropout_rate,
      activation_dropout_rate=model.activation_dropout_rate,
      remat=model.remat,
      dtype=model.dtype,
      param_dtype=attention.query.param_dtype,
      implementation=attention.implementation,
      rngs=nnx.Rngs(0),
    )
  )
  first = model.position_offset
  return _filled(
    longer,
    model,
    {
      'encoder_positions': lambda table: tile(table[first:], 0, length),
      'decoder_positions': lambda table: table[first:],
    },
  )


def lengthen(source, target, length: int, window: int | None = None):
  """`to_longformer` or `to_led` from one folder into another, with the
  tokenizer's files.

  Raises:
    FileExistsError: `target` holds weights already.
    ValueError, FileNotFoundError: as of `load_pretrained` and of those two.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  config = read_config(source)
  kinds = {
    Longformer: (to_longformer, config_of_longformer),
    LED: (to_led, config_of_led),
  }
  model = load_pretrained(source)
  if type(model) not in kinds:
    raise UnsupportedConfig(
      f'model_type {config.get("model_type")!r} cannot be made longer, only '
      'roberta, longformer, bart and led'
    )
  change, config_of = kinds[type(model)]
  longer = change(model, length, window)
  made = config_of(longer)
  # What the source's config says besides, such as the names of labels.
  made |= {name: config[name] for name in KEPT if name in config}
  save_pretrained(longer, target, made)
  for name in TOKENIZER_FILES:
    if (source / name).exists():
      shutil.copy(source / name, target / name)
  if (source / TOKENIZER_CONFIG).exists():
    settings = json.loads((source / TOKENIZER_CONFIG).read_text())
    text = json.dumps(settings | {'model_max_length': length}, indent=2)
    (target / TOKENIZER_CONFIG).write_text(text + '\n')
