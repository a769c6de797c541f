"""Attention of whatever part of the sequence a device has.

What layers call: `longjax.attention` where sequences are whole, and what equals
it where `split` says that they are not.
"""

import jax

from longjax.ops.attention import attention
from longjax.patterns import Full, Pattern
from longjax.sharding import exchange, shards
from longjax.sharding.attention import sharded_attention


def self_attention(q, k, v, pattern: Pattern, *, positions=0, **options):
  """Attention among the sequence's own rows, [batch, length, heads, size].

  Args:
    positions: absolute position of the whole sequence's first row.
    **options: further ones of `longjax.attention`.
  """
  options['dropout_row'] = shards.first_row(len(q))
  axis = shards.sequence_axis()
  if axis is not None:
    return sharded_attention(
      q, k, v, pattern, axis_name=axis, positions=positions, **options
    )
  return attention(
    q,
    k,
    v,
    pattern,
    q_positions=positions,
    kv_positions=positions,
    **options,
  )


def attention_to_all(q, k, v, *, axis_name, segment_ids, **options):
  """Attention of few queries to all of a sequence's rows, both ways.

  Args:
    q: [batch, queries, heads, size], the same on all devices of the axis.
    k, v: [batch, length, heads, size], the rows here.
    axis_name: along which the rows are split, or None; as `sequence_axis` says
      where they were made.
    segment_ids: of queries and of keys.
    **options: further ones of `longjax.attention`.
  """
  pattern = Full(causal=False)
  options = options | {
    'segment_ids': segment_ids,
    'dropout_row': shards.first_row(len(q)),
  }
  if axis_name is None:
    return attention(q, k, v, pattern, **options)
  out, lse = attention(
    exchange.varying(q, axis_name),
    k,
    v,
    pattern,
    kv_positions=jax.lax.axis_index(axis_name) * k.shape[1],
    return_lse=True,
    **options,
  )
  out, _ = exchange.merge_over_axis(out, lse, axis_name)
  return exchange.varying(out, axis_name)
