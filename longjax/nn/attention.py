"""The attention layer: projections around `longjax.attention`."""

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.cache import LayerCache, init_layer_cache
from longjax.nn.dilated_cache import DilatedCache
from longjax.nn.embedding import RelativeEmbedding, check_rate, distances
from longjax.ops.middle import MiddleKeys
from longjax.ops.weights import attention_weights
from longjax.patterns import Pattern
from longjax.positions import ALiBi, Position, RoPE, TransformerXL, XPos
from longjax.sharding import self_attention, shards

NAMED_POSITIONS = {'rope': RoPE, 'xpos': XPos, 'alibi': ALiBi}
TRANSFORMER_XL = 'transformer_xl'
NORMAL_INIT = nnx.initializers.normal(0.02)


def position_scheme(position) -> Position | str | None:
  """A name, scheme or None -> the scheme, 'transformer_xl' or None.

  Raises:
    ValueError: for an unknown name or anything that is no static scheme.
  """
  if position is None or position == TRANSFORMER_XL:
    return position
  if isinstance(position, str) and position in NAMED_POSITIONS:
    return NAMED_POSITIONS[position]()
  # Schemes that hold arrays would be hidden parameters of the module.
  if isinstance(position, Position) and not jax.tree.leaves(position):
    return position
  raise ValueError(
    f'position {position!r} is not one of '
    f'{(*NAMED_POSITIONS, TRANSFORMER_XL)}, None, or a scheme without arrays '
    'such as longjax.RoPE(base=1e6)'
  )


class Attention(nnx.Module):
  """Self-attention of one layer.

  Four projections without biases (unless `use_bias`), heads of `head_dim`,
  grouped queries when `num_kv_heads` < `num_heads`, optionally an RMS norm of
  each query and key (QK-norm), and a pattern and position scheme of its own.
  With position 'transformer_xl' the layer owns the projection W_r
  [features, heads * head_dim] of the relative embeddings, without bias.
  """

  def __init__(
    self,
    features: int,
    num_heads: int,
    *,
    pattern: Pattern,
    position=None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    use_bias: bool = False,
    qk_norm: bool = False,
    inner_norm: nnx.Module | None = None,
    dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    value_init=None,
    output_init=None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Args, besides those named above:

    position: None, 'rope', 'xpos', 'alibi', 'transformer_xl', or a scheme.
    head_dim: features // num_heads by default.
    inner_norm: of the heads' results side by side, before the output
      projection.
    dropout_rate: of the attention weights.
    value_init, output_init: initializers of these projections, if others.
    dtype: of the activations.
    implementation: passed to `longjax.attention`.

    Raises:
      ValueError: for sizes that do not divide, an unknown position, or a
        pattern or position that cannot serve these heads.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if head_dim is None:
      if features % num_heads:
        raise ValueError(
          f'features={features} is not divisible by num_heads={num_heads}; '
          'give head_dim, or a number of heads that divides it'
        )
      head_dim = features // num_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
      raise ValueError(
        f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}'
      )
    check_rate('attention dropout rate', dropout_rate)
    pattern.check_heads(num_heads)
    self.num_heads = num_heads
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    self.pattern = pattern
    self.position = position_scheme(position)
    if isinstance(self.position, Position):
      self.position.check(num_heads, head_dim)
    self.dropout_rate = dropout_rate
    self.dtype = jnp.dtype(dtype)
    self.implementation = implementation

    def linear(inputs, outputs, init=kernel_init, bias=use_bias):
      return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=init,
        dtype=self.dtype,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    self.query = linear(features, width)
    self.key = linear(features, kv_width)
    self.value = linear(features, kv_width, value_init or kernel_init)
    self.inner_norm = inner_norm
    self.output = linear(width, features, output_init or kernel_init)
    if self.position == TRANSFORMER_XL:
      self.relative = linear(features, width, bias=False)

    def make_norm():
      return nnx.RMSNorm(
        head_dim, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
      )

    self.query_norm = make_norm() if qk_norm else None
    self.key_norm = make_norm() if qk_norm else None

  def project_relative(self, relative: RelativeEmbedding):
    """(r [distances, heads, head_dim], smallest distance) of the layer."""
    bounds = distances(self.pattern, self.num_heads, relative.span)
    rows = self.relative(relative.rows(*bounds))
    return rows.reshape(-1, self.num_heads, self.head_dim), bounds[0]

  def _position(self, relative, cache):
    """What `longjax.attention` is told as position scheme."""
    if self.position != TRANSFORMER_XL:
      return self.position
    if relative is None:
      raise ValueError("position 'transformer_xl' needs relative=")
    # Caches serve causal patterns only, whose smallest distance is 0.
    rows, first = (
      self.project_relative(relative) if cache is None else (cache.relative, 0)
    )
    return TransformerXL(
      relative.content_bias, relative.position_bias, rows, min_distance=first
    )

  def __call__(
    self,
    x,
    *,
    relative: RelativeEmbedding | None = None,
    segment_ids=None,
    positions=0,
    dropout_key=None,
    cache: LayerCache | DilatedCache | None = None,
  ):
    """Attends within x [batch, length, features].

    Args:
      x: inputs, normalised by the caller.
      relative: what the layers share of Transformer-XL positions.
      segment_ids: int [batch, length]; negative is padding.
      positions: of the (whole) sequence's first token, an int or int [batch];
        with a cache int [batch, length], negative for padding.
      dropout_key: turns attention dropout on.
      cache: what earlier calls left behind.

    Returns:
      [batch, length, features], with a cache (that, new cache).
    """
    q, k = self._queries_and_keys(x)
    v = self.value(x).reshape(k.shape)
    if cache is None:
      out = self_attention(
        q,
        k,
        v,
        self.pattern,
        position=self._position(relative, cache),
        positions=positions,
        segment_ids=segment_ids,
        dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
        dropout_key=dropout_key,
        implementation=self.implementation,
      )
      return self._output(out)
    if shards.sequence_axis() is not None:
      return self._prefill(q, k, v, relative, cache)
    out, new_cache = cache.attend(
      q,
      k,
      v,
      positions,
      pattern=self.pattern,
      position=self._position(relative, cache),
      implementation=self.implementation,
    )
    return self._output(out), new_cache

  def _prefill(self, q, k, v, relative, cache):
    """`__call__` with an empty cache and a text that is split over devices."""
    if isinstance(cache, DilatedCache):
      raise NotImplementedError(
        f'{self.pattern}: its cache cannot be filled by a text that is split '
        'over devices: it holds thinned rows of whole segments'
      )
    position = self._position(relative, cache)
    out = self_attention(
      q,
      k,
      v,
      self.pattern,
      position=position,
      implementation=self.implementation,
    )
    return self._output(out), cache.filled(
      k, v, pattern=self.pattern, position=position, num_heads=self.num_heads
    )

  def weights(
    self,
    x,
    *,
    relative: RelativeEmbedding | None = None,
    segment_ids=None,
    positions=0,
  ):
    """How much each query attends to each key, to be looked at; see
    `longjax.attention_weights`. Arguments as of a call.

    Returns:
      float32 [batch, heads, length, length].
    """
    return attention_weights(
      *self._queries_and_keys(x),
      self.pattern,
      position=self._position(relative, None),
      q_positions=positions,
      kv_positions=positions,
      segment_ids=segment_ids,
    )

  def _queries_and_keys(self, x):
    """[batch, length, heads, head_dim] and [..., kv heads, head_dim]."""
    shape = (*x.shape[:2], -1, self.head_dim)
    q, k = self.query(x).reshape(shape), self.key(x).reshape(shape)
    if self.query_norm is not None:
      q = self.query_norm(q).astype(self.dtype)
      k = self.key_norm(k).astype(self.dtype)
    return q, k

  def _output(self, out):
    """[batch, length, heads, head_dim] -> [batch, length, features]."""
    out = out.reshape(*out.shape[:2], -1)
    if self.inner_norm is not None:
      out = self.inner_norm(out).astype(self.dtype)
    return self.output(out)

  def init_cache(
    self,
    batch_size: int,
    max_length: int | None = None,
    relative: RelativeEmbedding | None = None,
    middle: MiddleKeys | None = None,
  ) -> LayerCache | DilatedCache:
    """An empty cache; see `longjax.nn.cache`.

    Args:
      batch_size: rows.
      max_length: positions kept at most.
      relative: for Transformer-XL positions, whose embeddings the cache
        keeps projected.
      middle: middle keys that single queries see too.
    """
    projected = None
    if self.position == TRANSFORMER_XL:
      projected, _ = self.project_relative(relative)
    return init_layer_cache(
      self.pattern,
      batch_size=batch_size,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      max_length=max_length,
      relative=projected,
      middle=middle,
      dtype=self.dtype,
    )
