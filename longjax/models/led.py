"""Longformer-Encoder-Decoder: BART with a Longformer for an encoder."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.models.longformer import (
  CONVERT,
  begins_with_padding,
  check_like,
  check_sizes,
  encoder_patterns,
  find_globals,
  is_traced,
  look_up,
  outside_of,
)
from longjax.nn.attention import NORMAL_INIT, Attention
from longjax.nn.cache import Cache
from longjax.nn.cross_attention import CrossAttention, Source
from longjax.nn.embedding import check_rate, dropout, fold_in
from longjax.nn.global_attention import GlobalAttention
from longjax.nn.post_norm import PostNormBlock
from longjax.nn.transformer import make_norm
from longjax.patterns import Full, Pattern
from longjax.sharding import shards


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['cache', 'sources'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodingState:
  """What the decoder needs to go on.

  Attributes:
    cache: keys and values of the tokens so far, for `rows` rows.
    sources: of each layer, keys and values of the encoder's states, once for
      each batch entry; consecutive rows / batch rows share one.
  """

  cache: Cache
  sources: tuple[Source, ...]

  def take(self, rows) -> 'DecodingState':
    """Row i goes on where row rows[i], of the same batch entry, was."""
    cache = self.cache
    layers = jax.tree.map(lambda x: x[rows], cache.layers)
    cache = dataclasses.replace(
      cache, layers=layers, lengths=cache.lengths[rows]
    )
    return dataclasses.replace(self, cache=cache)


class LED(nnx.Module):
  """Encoder with windows and global tokens, causal decoder that sees all of it.

  arXiv 2004.05150, section 7; with `patterns=longjax.Full(causal=False)` and
  `max_globals=0` it is BART. One table embeds the tokens of both sides and
  reads out the logits.
  """

  def __init__(
    self,
    vocab_size: int,
    num_encoder_layers: int,
    num_decoder_layers: int,
    features: int,
    num_encoder_heads: int,
    num_decoder_heads: int,
    *,
    patterns: Pattern | Sequence[Pattern],
    max_positions: int,
    max_target_positions: int,
    position_offset: int = 0,
    max_globals: int = 64,
    encoder_mlp_features: int | None = None,
    decoder_mlp_features: int | None = None,
    mlp: str = 'gelu',
    scale_embedding: bool = False,
    pad_token: int = 1,
    bos_token: int = 0,
    eos_token: int = 2,
    decoder_start_token: int = 2,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    activation_dropout_rate: float = 0.0,
    remat: bool = False,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Weights start as N(0, 0.02), biases as 0.

    Args:
      vocab_size, num_encoder_layers, num_decoder_layers, features,
        num_encoder_heads, num_decoder_heads: sizes.
      patterns: of the encoder, one for all layers, or one per layer.
      max_positions, max_target_positions: longest input and output.
      position_offset: unused rows before both tables of positions; BART has 2.
      max_globals: the most global tokens in a row; 0 for a model without
        global projections.
      encoder_mlp_features, decoder_mlp_features: 4 * features by default.
      mlp: as of `longjax.nn.MLP`.
      scale_embedding: multiply embeddings of tokens by sqrt(features).
      pad_token, bos_token, eos_token, decoder_start_token: numbers of these
        tokens; the decoder starts with the last one.
      dropout_rate: on the embeddings and on what each sublayer adds.
      attention_dropout_rate: on the attention weights.
      activation_dropout_rate: inside the MLPs.
      remat: recompute each block in the backward pass instead of storing it.
      dtype: of the activations; norms and logits are float32.
      param_dtype: of the parameters.
      implementation: passed to `longjax.attention`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: patterns of another count than layers or that are causal,
        names that do not exist, or sizes that do not fit.
    """
    check_sizes(
      vocab_size=vocab_size,
      num_encoder_layers=num_encoder_layers,
      num_decoder_layers=num_decoder_layers,
      features=features,
      num_encoder_heads=num_encoder_heads,
      num_decoder_heads=num_decoder_heads,
      max_positions=max_positions,
      max_target_positions=max_target_positions,
    )
    check_sizes(0, position_offset=position_offset, max_globals=max_globals)
    check_rate('dropout_rate', dropout_rate)
    self.vocab_size = vocab_size
    self.features = features
    self.num_encoder_heads = num_encoder_heads
    self.num_decoder_heads = num_decoder_heads
    self.patterns = encoder_patterns(
      patterns, num_encoder_layers, num_encoder_heads
    )
    self.max_positions = max_positions
    self.max_target_positions = max_target_positions
    self.position_offset = position_offset
    self.max_globals = max_globals
    self.scale_embedding = scale_embedding
    self.pad_token = pad_token
    self.bos_token = bos_token
    self.eos_token = eos_token
    self.decoder_start_token = decoder_start_token
    self.dropout_rate = dropout_rate
    self.attention_dropout_rate = attention_dropout_rate
    self.activation_dropout_rate = activation_dropout_rate
    self.remat = remat
    self.dtype = jnp.dtype(dtype)
    kwargs = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
    attention_kwargs = dict(
      dropout_rate=attention_dropout_rate,
      implementation=implementation,
      **kwargs,
    )

    def table(rows):
      return nnx.Embed(rows, features, embedding_init=NORMAL_INIT, **kwargs)

    def norm():
      return make_norm('layer', features, param_dtype=param_dtype, rngs=rngs)

    def block(attention, mlp_features, cross_attention=None):
      return PostNormBlock(
        features,
        attention,
        cross_attention=cross_attention,
        mlp_features=mlp_features,
        mlp=mlp,
        dropout_rate=dropout_rate,
        activation_dropout_rate=activation_dropout_rate,
        **kwargs,
      )

    self.embedding = table(vocab_size)
    # Not trained, as in BART.
    self.output_bias = nnx.Param(jnp.zeros((1, vocab_size), param_dtype))
    self.encoder_positions = table(max_positions + position_offset)
    self.encoder_norm = norm()
    self.encoder_layers = nnx.List(
      block(
        GlobalAttention(
          features,
          num_encoder_heads,
          pattern=pattern,
          global_projections=max_globals > 0,
          **attention_kwargs,
        ),
        encoder_mlp_features,
      )
      for pattern in self.patterns
    )
    self.decoder_positions = table(max_target_positions + position_offset)
    self.decoder_norm = norm()
    self.decoder_layers = nnx.List(
      block(
        Attention(
          features,
          num_decoder_heads,
          pattern=Full(),
          use_bias=True,
          **attention_kwargs,
        ),
        decoder_mlp_features,
        CrossAttention(features, num_decoder_heads, **attention_kwargs),
      )
      for _ in range(num_decoder_layers)
    )

  def __call__(
    self,
    tokens,
    decoder_tokens,
    *,
    mask=None,
    global_mask=None,
    dropout_key=None,
  ):
    """Logits of the token after each of `decoder_tokens`.

    Args:
      tokens: int [batch, source length].
      decoder_tokens: int [batch, target length], beginning with
        `decoder_start_token`; padding on the right changes nothing before it.
        Where the source is split over devices, each has all of these.
      mask: 1 for tokens, 0 for padding; by default `tokens != pad_token`.
        Positions are counted from the first of `tokens`, padding or not: pad
        on the right.
      global_mask: 1 for global tokens; by default the first token.
      dropout_key: turns dropout on.

    Returns:
      float32 [batch, target length, vocab_size].

    Raises:
      ValueError: shapes that do not fit, more tokens than positions, a token
        outside of the vocabulary, more global tokens than `max_globals`, a row
        that begins with padding when its first token is to be global. Inside
        `jax.jit`, where the last three cannot be seen, the row is NaN.

    Warns:
      UserWarning: `global_mask` has no global token.
    """
    _shape('tokens', tokens)
    batch, length = _shape('decoder_tokens', decoder_tokens)
    if batch != len(tokens):
      raise ValueError(
        f'tokens and decoder_tokens must have one batch, got {len(tokens)} and '
        f'{batch}'
      )
    self._check_target(length)
    outside_of('decoder_tokens', decoder_tokens, self.vocab_size)
    states, segment_ids = self.encode(
      tokens, mask=mask, global_mask=global_mask, dropout_key=dropout_key
    )
    count = len(self.encoder_layers)
    axis = shards.sequence_axis()
    # Of split sources every device has the whole target.
    with shards.whole_sequence():
      x = self._embed(
        'decoder_tokens',
        decoder_tokens,
        jnp.arange(length),
        self.decoder_positions,
        self.decoder_norm,
        fold_in(dropout_key, count + 1),
      )
      for layer, block in enumerate(self.decoder_layers):
        key = fold_in(dropout_key, count + 2 + layer)

        def run(x, states, block=block, key=key):
          source = block.cross_attention.source(states, segment_ids, axis)
          return block(x, states=source, dropout_key=key)

        x = (jax.checkpoint(run) if self.remat else run)(x, states)
      return self._logits(x)

  def encode(self, tokens, *, mask=None, global_mask=None, dropout_key=None):
    """(states [batch, length, features], segment ids int32 [batch, length]).

    Segment ids are -1 at padding, where states mean nothing. Arguments as of a
    call.
    """
    return self.encode_prepared(
      self.prepare(tokens, mask, global_mask), dropout_key
    )

  def prepare(self, tokens, mask=None, global_mask=None) -> tuple:
    """Arrays for `encode_prepared`, with all checks: to be called where the
    arguments can be seen, when the rest is compiled."""
    tokens = jnp.asarray(tokens)
    batch, here = _shape('tokens', tokens)
    length = shards.whole_length(here)
    if length > self.max_positions:
      raise ValueError(
        f'{length} tokens are more than the {self.max_positions} positions of '
        f'the encoder; `{CONVERT} FOLDER NEW_FOLDER --length={length}` makes a '
        'longer one'
      )
    outside_of('tokens', tokens, self.vocab_size)
    check_like('mask', mask, tokens.shape)
    check_like('global_mask', global_mask, tokens.shape)
    real = tokens != self.pad_token if mask is None else mask > 0
    global_tokens, bad = self._globals(batch, real, global_mask)
    segment_ids = jnp.where(real, 0, -1).astype(jnp.int32)
    return tokens, segment_ids, global_tokens, bad

  def encode_prepared(self, prepared: tuple, dropout_key=None):
    """`encode` of what `prepare` returned."""
    tokens, segment_ids, global_tokens, bad = prepared
    here = tokens.shape[1]
    count = len(self.encoder_layers)
    x = self._embed(
      'tokens',
      tokens,
      shards.first_position(here) + jnp.arange(here),
      self.encoder_positions,
      self.encoder_norm,
      fold_in(dropout_key, count),
    )
    x = jnp.where(bad[:, None, None], jnp.nan, x)
    for layer, block in enumerate(self.encoder_layers):
      run = functools.partial(
        block,
        segment_ids=segment_ids,
        global_tokens=global_tokens,
        dropout_key=fold_in(dropout_key, layer),
      )
      x = (jax.checkpoint(run) if self.remat else run)(x)
    return x, segment_ids

  def init_state(
    self, states, segment_ids, max_length: int, rows_each: int = 1
  ) -> DecodingState:
    """To decode from what `encode` returned.

    Args:
      states, segment_ids: the encoder's.
      max_length: tokens that will be decoded at most.
      rows_each: rows for each batch entry, such as beams; they stand side by
        side and share keys and values of the states.
    """
    self._check_target(max_length)
    rows = len(states) * rows_each
    cache = Cache(
      tuple(
        block.attention.init_cache(rows, max_length)
        for block in self.decoder_layers
      ),
      lengths=jnp.zeros(rows, jnp.int32),
      limit=max_length,
    )
    sources = tuple(
      block.cross_attention.source(states, segment_ids)
      for block in self.decoder_layers
    )
    return DecodingState(cache, sources)

  def decode(self, tokens, state: DecodingState):
    """Logits after each of the next tokens, int [rows, length], of all rows.

    Returns:
      (float32 [rows, length, vocab_size], new state).
    """
    cache = state.cache
    positions, lengths = cache.next_positions(jnp.ones(tokens.shape, bool))
    x = self._embed(
      'tokens',
      tokens,
      positions,
      self.decoder_positions,
      self.decoder_norm,
      None,
    )
    layers = []
    for block, layer_cache, source in zip(
      self.decoder_layers, cache.layers, state.sources, strict=True
    ):
      x, layer_cache = block(
        x, positions=positions, cache=layer_cache, states=source
      )
      layers.append(layer_cache)
    overflowed = cache.overflowed(lengths)[:, None, None]
    logits = jnp.where(overflowed, jnp.nan, self._logits(x))
    cache = dataclasses.replace(cache, layers=tuple(layers), lengths=lengths)
    return logits, dataclasses.replace(state, cache=cache)

  def _globals(self, batch, real, mask):
    none = jnp.zeros(batch, bool)
    if not self.max_globals:
      if mask is not None and (is_traced(mask) or np.any(mask)):
        raise ValueError(
          'global_mask is given to a model without global projections '
          '(max_globals=0)'
        )
      return None, none
    if mask is None:
      here = real.shape[1]
      numbers = shards.first_position(here) + jnp.arange(here)
      first = jnp.broadcast_to(numbers == 0, real.shape)
      found, _ = find_globals(first, real, 1)
      return found, begins_with_padding(real, 'the first token is global')
    found, bad = find_globals(mask, real, self.max_globals)
    if found is None:
      warnings.warn(
        'LED is trained with the first token global, and global_mask has none',
        stacklevel=4,
      )
    return found, bad

  def _check_target(self, length):
    if length > self.max_target_positions:
      raise ValueError(
        f'{length} decoder tokens are more than the '
        f'{self.max_target_positions} positions of the decoder'
      )

  def _embed(self, name, tokens, positions, table, norm, dropout_key):
    x = look_up(self.embedding, name, tokens)
    if self.scale_embedding:
      x = x * math.sqrt(self.features)
    x = norm(x + table(positions + self.position_offset)).astype(self.dtype)
    return dropout(x, self.dropout_rate, dropout_key)

  def _logits(self, x):
    logits = jnp.einsum(
      'btf,vf->btv',
      x,
      self.embedding.embedding[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    bias = jax.lax.stop_gradient(self.output_bias[...])
    return logits + bias.astype(jnp.float32)


def _shape(name, tokens):
  shape = np.shape(tokens)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f'{name} must be [batch, length >= 1], got shape {shape}')
  return shape
