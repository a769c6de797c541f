"""A decoder language model whose layers each have a pattern of their own."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import TRANSFORMER_XL
from longjax.nn.cache import Cache, layout
from longjax.nn.embedding import (
  RelativeEmbedding,
  check_rate,
  dropout,
  fold_in,
  relative_embedding,
  token_positions,
)
from longjax.nn.memory import (
  check_remat,
  check_remat_blocks,
  checkpointed,
  through_layers,
)
from longjax.nn.transformer import (
  Block,
  make_norm,
  per_layer,
  sub_norm_inits,
)
from longjax.ops.middle import MiddleKeys
from longjax.patterns import Pattern
from longjax.positions import sinusoidal
from longjax.sharding import shards

ABSOLUTE_POSITIONS = ('sinusoidal', 'learned')
INIT_STD = 0.02  # of all weights


class DecoderLM(nnx.Module):
  """Embedding, pre-norm blocks, a linear read-out over the vocabulary.

  Parameters do not depend on `patterns`: a module built with other windows
  takes the same parameters (`nnx.merge(nnx.split(other)[0], params)`).
  """

  def __init__(
    self,
    vocab_size: int,
    num_layers: int,
    features: int,
    num_heads: int,
    *,
    patterns: Pattern | Sequence[Pattern],
    position='rope',
    max_positions: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_features: int | None = None,
    mlp: str = 'gelu',
    norm: str = 'layer',
    norm_epsilon: float | None = None,
    norm_bias: bool = True,
    norm_scale_std: float = 0.0,
    sub_norm: bool = False,
    final_norm: bool = True,
    parallel: bool = False,
    qk_norm: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tie_embedding: bool = True,
    scale_embedding: bool = False,
    output_bias: bool = False,
    logit_soft_cap: float | None = None,
    zero_init_outputs: bool = False,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    remat: bool | str = False,
    remat_blocks: int = 1,
    mlp_piece: int | None = None,
    scan_layers: bool = False,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Weights start as N(0, 0.02) (but see `sub_norm`), biases as 0.

    Args:
      vocab_size, num_layers, features, num_heads: sizes.
      patterns: one causal pattern for all layers, or one per layer.
      position: 'rope', 'xpos', 'alibi', 'transformer_xl', a scheme such as
        longjax.RoPE(base=1e6), None, or a sequence of these, one per layer;
        or 'sinusoidal' or 'learned', added to the token embeddings. The biases
        u and v of Transformer-XL are shared by its layers.
      max_positions: length of the table, for 'learned' only.
      num_kv_heads: for grouped queries; num_heads by default.
      head_dim: features // num_heads by default.
      mlp_features: hidden size of the MLP; 4 * features by default, which for
        the gated kinds is half as many parameters again.
      mlp: 'gelu' (exact), 'gelu_tanh', 'relu2', 'swiglu' or 'geglu'.
      norm, norm_epsilon, norm_bias: 'layer' (epsilon 1e-5 by default) or 'rms'
        (1e-6, no bias).
      norm_scale_std: norm scales start as N(1, norm_scale_std).
      sub_norm: MAGNETO's: norms also before the output projections of attention
        and MLP, Xavier initial weights, which values, outputs and the MLP have
        times sqrt(ln(2 num_layers)), and an embedding of N(0, 1 / features).
      final_norm: a norm after the last block.
      parallel: attention and MLP of a block read one norm side by side, as in
        GPT-J.
      qk_norm: an RMS norm of queries and keys over head_dim.
      attention_bias, mlp_bias, output_bias: biases of the projections of
        attention, of the MLP, and of the logits.
      tie_embedding: the read-out is the embedding table transposed.
      scale_embedding: multiply embeddings by sqrt(features).
      logit_soft_cap: logits become cap * tanh(logits / cap).
      zero_init_outputs: each block starts as the identity.
      dropout_rate: as in Transformer-XL on embeddings, on relative position
        embeddings, after the output projection of attention, after the
        activation and the output of the MLP, and on the final hidden state.
      attention_dropout_rate: on the attention weights.
      remat: what the backward pass computes again: a name in
        `longjax.nn.memory.POLICIES`; True for all of each block.
      remat_blocks: blocks in a row of which only the first one's input is kept,
        see `longjax.nn.memory.through_layers`.
      mlp_piece: positions of the MLP at a time, which the backward pass
        computes again; None for all, kept.
      scan_layers: a loop over the layers, which then must have one pattern and
        position: compiled once instead of for each.
      dtype: of the activations; norms and logits are float32.
      param_dtype: of the parameters.
      implementation: passed to `longjax.attention`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: for patterns or positions of another count than num_layers, a
        pattern that is not causal, names that do not exist, or sizes that do
        not fit.
    """
    for name, value in (
      ('vocab_size', vocab_size),
      ('num_layers', num_layers),
      ('features', features),
      ('num_heads', num_heads),
    ):
      if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    check_rate('dropout_rate', dropout_rate)
    if (max_positions is not None) != (
      isinstance(position, str) and position == 'learned'
    ):
      raise ValueError(
        "max_positions is needed by position 'learned' and by no other; got "
        f'position={position!r} with max_positions={max_positions}'
      )
    self.vocab_size = vocab_size
    self.num_heads = num_heads
    self.features = features
    self.patterns = per_layer('patterns', patterns, num_layers)
    for layer, pattern in enumerate(self.patterns):
      if not isinstance(pattern, Pattern):
        raise ValueError(
          f'layer {layer}: {pattern!r} is no pattern such as '
          'longjax.SlidingWindow(64)'
        )
      if not pattern.causal:
        raise ValueError(
          f'layer {layer} has {pattern}, which is not causal: a decoder would '
          'see the tokens that it predicts'
        )
    self.absolute = None
    if isinstance(position, str) and position in ABSOLUTE_POSITIONS:
      self.absolute, position = position, None
    layer_positions = per_layer('position', position, num_layers)
    if (
      scan_layers
      and len(set(zip(self.patterns, layer_positions, strict=True))) > 1
    ):
      raise ValueError(
        'scan_layers needs one pattern and position for all layers, got '
        f'{self.patterns} and {layer_positions}'
      )
    self.max_positions = max_positions
    self.scale_embedding = scale_embedding
    self.logit_soft_cap = logit_soft_cap
    self.dropout_rate = dropout_rate
    check_remat(remat)
    check_remat_blocks(remat_blocks, num_layers, scan_layers)
    self.remat = remat
    self.remat_blocks = remat_blocks
    self.scan_layers = scan_layers
    self.dtype = jnp.dtype(dtype)

    init = kernel_init = value_init = nnx.initializers.normal(INIT_STD)
    if sub_norm:
      init = nnx.initializers.normal(features**-0.5)
      kernel_init, value_init = sub_norm_inits(num_layers)
    make_table = functools.partial(
      nnx.Embed,
      features=features,
      embedding_init=init,
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.embedding = make_table(vocab_size)
    if self.absolute == 'learned':
      self.position_embedding = make_table(max_positions)
    self.layers = nnx.List(
      Block(
        features,
        num_heads,
        pattern=layer_pattern,
        position=layer_position,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_features=mlp_features,
        norm=norm,
        norm_epsilon=norm_epsilon,
        norm_bias=norm_bias,
        norm_scale_std=norm_scale_std,
        sub_norm=sub_norm,
        parallel=parallel,
        mlp=mlp,
        qk_norm=qk_norm,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        dropout_rate=dropout_rate,
        attention_dropout_rate=attention_dropout_rate,
        mlp_piece=mlp_piece,
        kernel_init=kernel_init,
        value_init=value_init,
        output_init=(
          nnx.initializers.zeros if zero_init_outputs else value_init
        ),
        dtype=self.dtype,
        param_dtype=param_dtype,
        implementation=implementation,
        rngs=rngs,
      )
      for layer_pattern, layer_position in zip(
        self.patterns, layer_positions, strict=True
      )
    )
    # The patterns of the layers that have Transformer-XL positions.
    self.relative_patterns = tuple(
      block.attention.pattern
      for block in self.layers
      if block.attention.position == TRANSFORMER_XL
    )

    def make_final_norm():
      return make_norm(
        norm,
        features,
        epsilon=norm_epsilon,
        use_bias=norm_bias,
        scale_std=norm_scale_std,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    def parameter(init, *shape):
      return nnx.Param(init(rngs.params(), shape, param_dtype))

    self.final_norm = make_final_norm() if final_norm else None
    self.output = (
      None if tie_embedding else parameter(init, vocab_size, features)
    )
    self.output_bias = (
      parameter(nnx.initializers.zeros, vocab_size) if output_bias else None
    )
    if self.relative_patterns:
      heads = (num_heads, self.layers[0].attention.head_dim)
      self.content_bias = parameter(init, *heads)
      self.position_bias = parameter(init, *heads)

  def __call__(
    self,
    tokens,
    *,
    segment_ids=None,
    positions=0,
    dropout_key=None,
    cache: Cache | None = None,
  ):
    """Logits of the token after each of `tokens`.

    Args:
      tokens: int [batch, length]; a token outside of the vocabulary gives NaN.
      segment_ids: int [batch, length]. Tokens of equal id see each other, those
        of negative id are padding. With a cache each row is one text: only the
        sign counts, and padding takes up no position.
      positions: of the (whole) sequence's first token, an int or int [batch].
        With a cache leave it 0: the cache counts.
      dropout_key: turns dropout on.
      cache: from `init_cache` or an earlier call, which then is a chunk of any
        length. Where the sequence is split over devices, an empty one.

    Returns:
      float32 [batch, length, vocab_size]; with a cache (that, new cache).
      Logits at padding mean nothing.

    Raises:
      ValueError: if the cache ends before the tokens do; inside `jax.jit`,
        where that cannot be seen, the rows concerned become NaN.
    """
    if tokens.ndim != 2 or not tokens.shape[1]:
      raise ValueError(
        f'tokens must have shape [batch, length >= 1], got {tokens.shape}'
      )
    if cache is not None:
      return self._stream(tokens, segment_ids, positions, dropout_key, cache)
    return self.read_out(
      self.hidden(
        tokens,
        segment_ids=segment_ids,
        positions=positions,
        dropout_key=dropout_key,
      )
    )

  def hidden(self, tokens, *, segment_ids=None, positions=0, dropout_key=None):
    """What `read_out` makes logits of; arguments as of a call.

    Returns:
      [batch, length, features].
    """
    if jnp.ndim(positions) > 1:
      raise ValueError(
        'positions must be that of the first token, an int or int [batch], '
        f'got shape {jnp.shape(positions)}'
      )
    length = shards.whole_length(tokens.shape[1])
    each = None
    if self.absolute:
      self._check_positions(length, positions)
      each = token_positions(positions, tokens.shape[1], segment_ids)
    relative = None
    if self.relative_patterns:
      relative = self._relative(length - 1, self.dtype)
      with shards.split():  # These are the same everywhere.
        embeddings = dropout(
          relative.embeddings,
          self.dropout_rate,
          fold_in(dropout_key, len(self.layers)),
        )
      relative = dataclasses.replace(relative, embeddings=embeddings)
    x = self._embed(tokens, segment_ids, each, dropout_key)

    def run(block, number, x):
      call = functools.partial(
        block,
        relative=relative,
        segment_ids=segment_ids,
        positions=positions,
        dropout_key=fold_in(dropout_key, number),
      )
      return checkpointed(call, self.remat)(x)

    x = through_layers(
      run,
      self.layers,
      x,
      scan=self.scan_layers,
      remat_blocks=self.remat_blocks,
    )
    return self._finish(x, dropout_key)

  def _stream(self, tokens, segment_ids, positions, dropout_key, cache):
    """`__call__` with a cache."""
    if dropout_key is not None:
      raise ValueError('dropout_key cannot be given with a cache')
    if not isinstance(positions, int) or positions:
      raise ValueError(
        f'positions cannot be given with a cache, which counts; got {positions}'
      )
    if shards.sequence_axis() is None:
      valid = jnp.ones(tokens.shape, bool)
      if segment_ids is not None:
        valid = segment_ids >= 0
      positions, lengths = cache.next_positions(valid)
    else:
      positions, lengths = self._prefill(tokens, segment_ids, cache)
    relative = None
    if self.relative_patterns:
      # The embeddings lie in the cache, already projected.
      relative = RelativeEmbedding(
        self.content_bias[...], self.position_bias[...], None, 0, 0
      )
    x = self._embed(tokens, segment_ids, jnp.maximum(positions, 0), None)
    layers = []
    for block, layer_cache in zip(self.layers, cache.layers, strict=True):
      x, layer_cache = block(
        x, relative=relative, positions=positions, cache=layer_cache
      )
      layers.append(layer_cache)
    logits = self.read_out(self._finish(x, None))
    overflowed = cache.overflowed(lengths)[:, None, None]
    logits = jnp.where(overflowed, jnp.nan, logits)
    return logits, Cache(tuple(layers), lengths, cache.limit)

  def _prefill(self, tokens, segment_ids, cache):
    """(positions, lengths) of a text that is split, with an empty cache."""
    if segment_ids is not None:
      raise NotImplementedError(
        'segment_ids with a cache, where the text is split over devices'
      )
    batch, here = tokens.shape
    length = shards.whole_length(here)
    if cache.limit is not None and length > cache.limit:
      raise ValueError(
        f'the cache holds max_length={cache.limit} positions, but the text has '
        f'{length}: call init_cache with a larger max_length'
      )
    positions = shards.first_position(here) + jnp.arange(here)
    return jnp.broadcast_to(positions, tokens.shape), jnp.full(batch, length)

  def init_cache(
    self,
    batch_size: int,
    max_length: int | None = None,
    middle_keys: MiddleKeys | None = None,
  ) -> Cache:
    """An empty cache; `longjax.nn.cache` says how large it is.

    For Transformer-XL positions it holds projected embeddings, so it belongs
    to the present parameters.

    Args:
      batch_size: rows.
      max_length: how many positions each layer keeps at most. Needed if some
        layer's pattern has no bound, such as Full.
      middle_keys: LM-Infinite's top-k, for models with `Lambda` patterns. They
        count in calls with one token a row (decoding), in layers from
        `first_layer` on, which then keep every key: needs `max_length`.

    Raises:
      ValueError: if a layer needs `max_length`, or its pattern has no middle.
    """
    if self.max_positions is not None:
      max_length = min(max_length or self.max_positions, self.max_positions)
    middles = [
      middle_keys if middle_keys and layer >= middle_keys.first_layer else None
      for layer in range(len(self.layers))
    ]
    layouts = [
      layout(pattern, self.num_heads, max_length, middle)
      for pattern, middle in zip(self.patterns, middles, strict=True)
    ]
    limits = [limit for *_, limit in layouts if limit is not None]
    limit = min(limits + [self.max_positions or math.inf])
    relative = None
    if self.relative_patterns:
      span = max(pattern.reach()[0] for pattern in self.relative_patterns)
      relative = self._relative(int(min(span, limit - 1)), self.dtype)
    layers = tuple(
      block.attention.init_cache(batch_size, max_length, relative, middle)
      for block, middle in zip(self.layers, middles, strict=True)
    )
    return Cache(
      layers,
      lengths=jnp.zeros(batch_size, jnp.int32),
      limit=None if limit == math.inf else limit,
    )

  def _check_positions(self, length, positions):
    """'learned' has a last position; refuse where lengths are known."""
    first = positions if isinstance(positions, int) else 0
    if self.max_positions is not None and first + length > self.max_positions:
      raise ValueError(
        f'{first + length} positions are needed, but the learned table has '
        f'max_positions={self.max_positions}'
      )

  def _relative(self, span, dtype):
    return relative_embedding(
      self.content_bias[...],
      self.position_bias[...],
      self.relative_patterns,
      self.num_heads,
      self.features,
      span,
      dtype,
    )

  def _embed(self, tokens, segment_ids, positions, dropout_key):
    if segment_ids is not None:
      # Padding may be any number, also one outside of the vocabulary.
      tokens = jnp.where(segment_ids >= 0, tokens, 0)
    x = self.embedding(tokens)
    if self.scale_embedding:
      x = x * math.sqrt(self.features)
    if self.absolute == 'sinusoidal':
      x = x + sinusoidal(positions, self.features).astype(x.dtype)
    elif self.absolute == 'learned':
      x = x + self.position_embedding(positions)
    key = fold_in(dropout_key, len(self.layers) + 1)
    return dropout(x, self.dropout_rate, key)

  def _finish(self, x, dropout_key):
    if self.final_norm is not None:
      x = self.final_norm(x).astype(self.dtype)
    key = fold_in(dropout_key, len(self.layers) + 2)
    return dropout(x, self.dropout_rate, key)

  def read_out(self, x):
    """Logits float32 [batch, length, vocab_size] of `hidden`'s result."""
    table = self.embedding.embedding if self.output is None else self.output
    logits = jnp.einsum(
      'btf,vf->btv',
      x,
      table[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    if self.output_bias is not None:
      logits = logits + self.output_bias[...].astype(jnp.float32)
    if self.logit_soft_cap is not None:
      logits = self.logit_soft_cap * jnp.tanh(logits / self.logit_soft_cap)
    return logits
