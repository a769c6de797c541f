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
from longjax.nn.embedding import dropout, fold_in
from longjax.ops.attention import attention
from longjax.patterns import Full, Pattern


def global_positions(mask, max_globals: int):
  """Where the global tokens are, as `longjax.attention` takes them.

  Args:
    mask: bool [batch, length], True for global tokens.
    max_globals: columns of the result.

  Returns:
    int32 [batch, min(max_globals, length)]: their positions in order, -1 where
    a row has fewer; of a row that has more, the first ones.
  """
  length = mask.shape[1]
  where = jnp.where(mask, jnp.arange(length, dtype=jnp.int32), length)
  first = jnp.sort(where, axis=1)[:, :max_globals]
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
    attend = functools.partial(
      attention,
      dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
      implementation=self.implementation,
    )
    out = attend(
      self._heads(self.query, x),
      self._heads(self.key, x),
      self._heads(self.value, x),
      self.pattern,
      global_tokens=global_tokens,
      segment_ids=segment_ids,
      dropout_key=dropout_key,
    )
    out = out.reshape(batch, length, -1)
    if global_tokens is None:
      return self.output(out)
    if segment_ids is None:
      segment_ids = jnp.zeros((batch, length), jnp.int32)
    given = global_tokens >= 0
    at = jnp.where(given, global_tokens, 0)
    ids = jnp.take_along_axis(jnp.asarray(segment_ids), at, axis=1)
    ids = jnp.where(given, ids, -1)
    q = self._heads(
      self.global_query, jnp.take_along_axis(x, at[..., None], axis=1)
    )
    dropout_key = fold_in(dropout_key, 1)
    if at.shape[1] * self.num_heads <= x.shape[2] // 2:
      rows = self._few_rows(q, x, ids, segment_ids, dropout_key)
    else:
      rows = attend(
        q,
        self._heads(self.global_key, x),
        self._heads(self.global_value, x),
        Full(causal=False),
        segment_ids=(ids, segment_ids),
        dropout_key=dropout_key,
      )
    # The window's result in these rows, and its gradient, go nowhere; of
    # padding it is 0.
    at = jnp.where(ids >= 0, global_tokens, length)
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
    weights = jax.nn.softmax(
      jnp.where(seen[:, :, None], logits * self.head_dim**-0.5, -jnp.inf)
    )
    weights = dropout(weights, self.dropout_rate, dropout_key)
    mixed = jnp.einsum('bght,btf->bghf', weights.astype(self.dtype), x)
    bias = self.global_value.bias[...].reshape(shape[1:])
    # Without dropout the weights sum to 1.
    bias = bias * weights.sum(axis=3, keepdims=True)
    rows = jnp.einsum('bghf,fhd->bghd', mixed, value)
    return rows + bias.astype(self.dtype)

  def _heads(self, linear, x):
    return linear(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
