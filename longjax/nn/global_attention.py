"""Longformer's self-attention: a window, and tokens that see everything.

arXiv 2004.05150, section 3.1. Every token sees its window and the global
tokens, in one softmax; a global token's own row is attention to all tokens,
with projections of its own.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT, Attention
from longjax.nn.embedding import fold_in
from longjax.ops.dropout import keep_mask, seed_of
from longjax.patterns import Pattern
from longjax.sharding import attention_to_all, self_attention, shards


def global_positions(mask, max_globals: int):
  """Where the global tokens are, as `longjax.attention` takes them.

  Args:
    mask: bool [batch, length], True for global tokens.
    max_globals: columns of the result.

  Returns:
    int32 [batch, min(max_globals, length)]: their positions in order, -1 where
    a row has fewer; of a row that has more, the first ones.
  """
  here = mask.shape[1]
  length = shards.whole_length(here)
  numbers = shards.first_position(here) + jnp.arange(here, dtype=jnp.int32)
  where = jnp.where(mask, numbers, length)
  first = jnp.sort(where, axis=1)[:, :max_globals]
  # Of each shard's first ones, the first.
  first = jnp.sort(shards.gather(first), axis=1)[:, :max_globals]
  return jnp.where(first == length, -1, first)


class GlobalAttention(Attention):
  """Self-attention with global tokens; all projections have biases.

  `query`, `key` and `value` serve the window and, for all other tokens, the
  global keys too; `global_query`, `global_key` and `global_value` serve the
  rows of global tokens. `output` is shared. Without `global_projections` it is
  plain attention over the pattern.
  """

  def __init__(
    self,
    features: int,
    num_heads: int,
    *,
    pattern: Pattern,
    global_projections: bool = True,
    dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      features,
      num_heads,
      pattern=pattern,
      use_bias=True,
      dropout_rate=dropout_rate,
      kernel_init=kernel_init,
      dtype=dtype,
      param_dtype=param_dtype,
      implementation=implementation,
      rngs=rngs,
    )
    self.global_projections = global_projections
    if not global_projections:
      return
    linear = functools.partial(
      nnx.Linear,
      features,
      features,
      kernel_init=kernel_init,
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.global_query, self.global_key = linear(), linear()
    self.global_value = linear()

  def __call__(
    self, x, *, segment_ids=None, global_tokens=None, dropout_key=None
  ):
    """Attends within x [batch, length, features].

    Args:
      x: inputs.
      segment_ids: int [batch, length]; negative is padding, whose rows are the
        bias of `output`.
      global_tokens: int [batch, globals], positions, each once; -1 for none.
      dropout_key: turns dropout of the attention weights on.

    Returns:
      [batch, length, features].

    Raises:
      ValueError: global tokens without projections for them.
    """
    if global_tokens is not None and not self.global_projections:
      raise ValueError(
        'global_tokens are given to a layer with global_projections=False'
      )
    batch, length, _ = x.shape
    options = dict(
      dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
      implementation=self.implementation,
    )
    out = self_attention(
      self._heads(self.query, x),
      self._heads(self.key, x),
      self._heads(self.value, x),
      self.pattern,
      global_tokens=global_tokens,
      segment_ids=segment_ids,
      dropout_key=dropout_key,
      **options,
    )
    out = out.reshape(batch, length, -1)
    if global_tokens is None:
      return self.output(out)
    if segment_ids is None:
      segment_ids = jnp.zeros((batch, length), jnp.int32)
    given = global_tokens >= 0
    ids = shards.rows_at(jnp.asarray(segment_ids), global_tokens)
    ids = jnp.where(given, ids, -1)
    q = self._heads(self.global_query, shards.rows_at(x, global_tokens))
    dropout_key = fold_in(dropout_key, 1)
    if ids.shape[1] * self.num_heads <= x.shape[2] // 2:
      rows = self._few_rows(q, x, ids, segment_ids, dropout_key)
    else:
      rows = attention_to_all(
        q,
        self._heads(self.global_key, x),
        self._heads(self.global_value, x),
        axis_name=shards.sequence_axis(),
        segment_ids=(ids, segment_ids),
        dropout_key=dropout_key,
        **options,
      )
    # The window's result in these rows, and its gradient, go nowhere; of
    # padding it is 0.
    at = global_tokens - shards.first_position(length)
    at = jnp.where((ids >= 0) & (at >= 0), at, length)
    out = out.at[jnp.arange(batch)[:, None], at].set(
      rows.reshape(*at.shape, -1), mode='drop'
    )
    return self.output(out)

  def _few_rows(self, q, x, ids, segment_ids, dropout_key):
    """Attention of few queries without a key and a value of every token.

    As q . (W k) = (W^T q) . k, the projections move to the other side of the
    sums, where there are as many rows as queries and heads; the keys' bias
    adds the same to all logits of a query, and drops out.

    Args:
      q: [batch, globals, heads, head_dim].
      x: [batch, length, features].
      ids, segment_ids: of queries and tokens.
      dropout_key: of the attention weights.

    Returns:
      [batch, globals, heads, head_dim].
    """
    shape = (-1, self.num_heads, self.head_dim)
    key, value = (
      linear.kernel[...].astype(self.dtype).reshape(shape)
      for linear in (self.global_key, self.global_value)
    )
    logits = jnp.einsum(
      'bghf,btf->bght',
      jnp.einsum('bghd,fhd->bghf', q, key),
      x,
      preferred_element_type=jnp.float32,
    )
    # Rows of no token, which are not used, may see anything: no 0 / 0.
    seen = (ids[..., None] == segment_ids[:, None]) | (ids[..., None] < 0)
    logits = jnp.where(seen[:, :, None], logits * self.head_dim**-0.5, -jnp.inf)
    largest = shards.largest_in_sequence(logits.max(axis=3, keepdims=True))
    weights = jnp.exp(logits - jax.lax.stop_gradient(largest))
    total = shards.sum_over_sequence(weights.sum(axis=3, keepdims=True))
    weights = self._drop(weights / total, dropout_key)
    mixed = jnp.einsum(
      'bght,btf->bghf',
      weights.astype(self.dtype),
      x,
      preferred_element_type=jnp.float32,
    )
    mixed, kept = shards.sum_over_sequence(
      (mixed, weights.sum(axis=3, keepdims=True))
    )
    mixed = mixed.astype(self.dtype)
    # Without dropout the weights sum to 1.
    bias = self.global_value.bias[...].reshape(shape[1:]) * kept
    rows = jnp.einsum('bghf,fhd->bghd', mixed, value)
    return rows + bias.astype(self.dtype)

  def _drop(self, weights, key):
    """Dropout of weights [batch, globals, heads, length]."""
    if key is None or not self.dropout_rate:
      return weights
    batch, queries, heads, length = weights.shape
    kept = keep_mask(
      seed_of(key),
      self.dropout_rate,
      (shards.first_row(batch) + jnp.arange(batch))[:, None, None, None],
      jnp.arange(heads)[:, None],
      jnp.arange(queries)[:, None, None],
      shards.first_position(length) + jnp.arange(length),
    )
    return jnp.where(kept, weights / (1 - self.dropout_rate), 0)

  def _heads(self, linear, x):
    return linear(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
