"""Heads split instead of the sequence, for the time of one attention.

DeepSpeed-Ulysses' way (arXiv 2309.14509): an all-to-all turns shards of the
sequence with all heads into the whole sequence with a share of the heads, and
another one turns the result back. Every pattern stays what it is on one device,
but each device holds whole rows of the sequence for its heads, and there can be
no more devices than kv heads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longjax.ops.attention import attention
from longjax.patterns import Pattern
from longjax.positions import Position
from longjax.sharding import exchange
from longjax.sharding.parts import share_of_heads


def all_to_all_attention(
  q: Float[Array, 'B T H D'],
  k: Float[Array, 'B T K D'],
  v: Float[Array, 'B T K E'],
  pattern: Pattern,
  *,
  axis_name: str,
  position: Position | None = None,
  positions: int | Int[Array, ''] | Int[Array, 'B'] = 0,
  segment_ids: Int[Array, 'B T'] | None = None,
  dropout_rate: float = 0.0,
  return_lse: bool = False,
  **options,
):
  """`sharded_attention` by exchanging heads for rows; inside `shard_map`.

  Args: as for `sharded_attention`.

  Raises:
    ValueError: where the axis' size does not divide heads and kv heads.
    NotImplementedError: for a pattern that differs between devices' heads, and
      for dropout, which names entries by their head.
  """
  if dropout_rate:
    raise NotImplementedError(
      f'all_to_all with dropout_rate {dropout_rate}: entries are named by '
      'their head, and devices have different ones'
    )
  devices = jax.lax.axis_size(axis_name)
  heads, kv_heads = q.shape[2], k.shape[2]
  if kv_heads % devices:
    raise ValueError(
      f'all_to_all over {devices} devices needs them to divide the {kv_heads} '
      'kv heads'
    )
  pattern = share_of_heads(pattern, heads, devices)
  if position is not None:
    own = jax.lax.axis_index(axis_name) * (heads // devices)
    own = own + jnp.arange(heads // devices)
    position = exchange.varying(position, axis_name).of_heads(own, heads)
  if segment_ids is not None:
    segment_ids = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)

  def rows_for_heads(x):
    return jax.lax.all_to_all(x, axis_name, 2, 1, tiled=True)

  out, lse = attention(
    *map(rows_for_heads, (q, k, v)),
    pattern,
    position=position,
    q_positions=positions,
    kv_positions=positions,
    segment_ids=segment_ids,
    return_lse=True,
    **options,
  )
  out, lse = (
    jax.lax.all_to_all(y, axis_name, 1, 2, tiled=True) for y in (out, lse)
  )
  return (out, lse) if return_lse else out
