"""Attention of a decoder to an encoder's states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT
from longjax.nn.embedding import check_rate
from longjax.sharding import attention_to_all


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['keys', 'values', 'segment_ids'],
  meta_fields=['axis_name'],
)
@dataclasses.dataclass(frozen=True)
class Source:
  """What one layer keeps of the encoder's states.

  Attributes:
    keys, values: [batch, source length, heads, head_dim], of the part of the
      source that is here.
    segment_ids: int [batch, source length]; negative is padding.
    axis_name: the mesh axis along which the source is split, or None.
  """

  keys: jax.Array
  values: jax.Array
  segment_ids: jax.Array
  axis_name: str | None = None


class CrossAttention(nnx.Module):
  """Every query sees all of the source but its padding; biases everywhere."""

  def __init__(
    self,
    features: int,
    num_heads: int,
    *,
    dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    if features % num_heads:
      raise ValueError(
        f'features={features} is not divisible by num_heads={num_heads}'
      )
    check_rate('attention dropout rate', dropout_rate)
    self.num_heads = num_heads
    self.dropout_rate = dropout_rate
    self.implementation = implementation
    linear = functools.partial(
      nnx.Linear,
      features,
      features,
      kernel_init=kernel_init,
      dtype=jnp.dtype(dtype),
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.query, self.key = linear(), linear()
    self.value, self.output = linear(), linear()

  def source(self, states, segment_ids, axis_name=None) -> Source:
    """Keys and values of states [batch, source length, features], once.

    Args:
      states, segment_ids: of the source, or of the part of it that is here.
      axis_name: the mesh axis along which it is split, or None.
    """
    shape = (*states.shape[:2], self.num_heads, -1)
    keys, values = self.key(states), self.value(states)
    return Source(
      keys.reshape(shape), values.reshape(shape), segment_ids, axis_name
    )

  def __call__(self, x, source: Source, dropout_key=None):
    """Attends from x [rows, length, features] to the source.

    Args:
      x: rows are a multiple of the source's batch: several rows in a row, such
        as the beams of a search, share one source, which is not copied.
      source: as `source` made it.
      dropout_key: turns dropout of the attention weights on.

    Returns:
      [rows, length, features].
    """
    batch = source.keys.shape[0]
    # The queries of all rows of a source side by side, as if one row.
    q = self.query(x).reshape(batch, -1, self.num_heads, source.keys.shape[-1])
    out = attention_to_all(
      q,
      source.keys,
      source.values,
      axis_name=source.axis_name,
      segment_ids=(jnp.zeros(q.shape[:2], jnp.int32), source.segment_ids),
      dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
      dropout_key=dropout_key,
      implementation=self.implementation,
    )
    return self.output(out.reshape(x.shape))
