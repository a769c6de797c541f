"""The one public attention function."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longjax.ops import dispatch
from longjax.ops.call import Call
from longjax.ops.coordinates import locate
from longjax.ops.dropout import seed_of
from longjax.patterns import Pattern
from longjax.positions import Position, XPos

Positions = int | Int[Array, ''] | Int[Array, 'B'] | Int[Array, 'B T']


def attention(
  q: Float[Array, 'B T H D'],
  k: Float[Array, 'B S K D'],
  v: Float[Array, 'B S K E'],
  pattern: Pattern,
  *,
  position: Position | None = None,
  q_positions: Positions = 0,
  kv_positions: Positions = 0,
  global_tokens: Int[Array, 'B G'] | None = None,
  segment_ids: Int[Array, 'B T'] | tuple | None = None,
  dropout_rate: float = 0.0,
  dropout_key: Array | None = None,
  dropout_row: int | Int[Array, ''] = 0,
  scale: float | None = None,
  logit_soft_cap: float | None = None,
  implementation: str | Sequence[str] | None = None,
  return_lse: bool = False,
):
  """Attention in which `pattern` says who sees whom.

  Softmax and sums are float32 whatever the dtype. Any length >= 1 is served; a
  query that sees no key gets 0, lse -inf and no gradient. Reverse-mode
  differentiable in q, k, v and the arrays of `position`.

  Args:
    q, k, v: queries [batch, length, heads, head size], keys and values
      [batch, kv length, kv heads, head size]; kv heads divide heads (GQA, MQA).
      All float32, bfloat16 or float16 (or float64 where JAX has it enabled).
    pattern: `SlidingWindow`, `Dilated`, `Lambda`, `Full` or `SelfExtend`.
    position: applied inside (queries and keys arrive un-rotated): `RoPE`,
      `XPos`, `ALiBi`, `TransformerXL` or None.
    q_positions, kv_positions: absolute position of the first query and key,
      shared or per batch row [batch], possibly traced; or of every one,
      [batch, length], where -1 marks an empty slot (ring-buffer caches).
    global_tokens: absolute positions of keys that every query may see; -1 for
      none, duplicates count once. With a causal pattern, only keys at or before
      the query.
    segment_ids: [batch, length], or a pair for queries and keys: equal ids see
      each other, negative ids neither see nor are seen. A token's position is
      counted from the first of its id (if positions are given one by one, they
      are taken as they are).
    dropout_rate, dropout_key: share of attention weights dropped, by a hash of
      (key, batch row, head, query position, key position).
    dropout_row: number of the first batch row, where these are some of more.
    scale: of the products q . k; 1 / sqrt(head size) if None.
    logit_soft_cap: c in c * tanh(logit / c), after scale and bias.
    implementation: 'mosaic_gpu', 'mosaic_tpu', 'cudnn', 'xla', 'reference', a
      sequence of them to try in order, or None for the platform's order.
    return_lse: also return the log of the softmax denominators.

  Returns:
    [batch, length, heads, value size] in q's dtype; with `return_lse`, a pair
    with float32 [batch, length, heads] (natural logarithm, after the soft cap,
    before dropout), differentiable too.

  Raises:
    ValueError: arguments that do not fit together, naming the value.
    NotImplementedError: the implementation asked for cannot do this.
  """
  _check_arrays(q, k, v)
  batch, num_queries, num_heads, head_dim = q.shape
  num_keys = k.shape[1]
  if not isinstance(pattern, Pattern):
    raise ValueError(f'pattern must be a longjax Pattern, got {pattern!r}')
  pattern.check_heads(num_heads)
  if position is not None:
    if not isinstance(position, Position):
      raise ValueError(f'position must be a longjax Position, got {position!r}')
    position.check(num_heads, head_dim)
  _check_positions('q_positions', q_positions, batch, num_queries)
  _check_positions('kv_positions', kv_positions, batch, num_keys)
  ranks = np.ndim(q_positions), np.ndim(kv_positions)
  if isinstance(position, XPos):
    ahead = pattern.reach()[1]
    if global_tokens is not None and not pattern.causal:
      ahead = math.inf
    if ranks == (0, 0) and _plain_zero(q_positions, kv_positions):
      ahead = min(ahead, num_keys - 1)
    position.check_reach(ahead)
  if segment_ids is not None:
    segment_ids = _check_segments(segment_ids, batch, num_queries, num_keys)
    if (ranks[0] == 2) != (ranks[1] == 2):
      raise ValueError(
        'with segment_ids, q_positions and kv_positions must both be arrays of '
        f'rank 2 or neither, got ranks {ranks}'
      )
  if global_tokens is not None:
    global_tokens = _check_globals(global_tokens, batch)
  if not 0 <= dropout_rate < 1:
    raise ValueError(f'dropout_rate must be in [0, 1), got {dropout_rate}')
  if dropout_rate and dropout_key is None:
    raise ValueError(f'dropout_rate {dropout_rate} needs a dropout_key')
  if logit_soft_cap is not None and not logit_soft_cap > 0:
    raise ValueError(f'logit_soft_cap must be > 0, got {logit_soft_cap}')
  call = Call(
    q=q,
    k=k,
    v=v,
    pattern=pattern,
    position=position,
    where=locate(num_queries, num_keys, q_positions, kv_positions, segment_ids),
    contiguous=max(ranks) < 2,
    global_tokens=global_tokens,
    dropout_rate=float(dropout_rate),
    dropout_seed=seed_of(dropout_key) if dropout_rate else None,
    first_row=dropout_row,
    scale=head_dim**-0.5 if scale is None else float(scale),
    logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
    return_lse=return_lse,
  )
  out, lse = dispatch.run(call, implementation)
  out = out.astype(q.dtype)
  return (out, lse) if return_lse else out


def _plain_zero(*positions):
  return all(isinstance(p, int) and p == 0 for p in positions)


def _check_arrays(q, k, v):
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f'{name} must be [batch, length, heads, head size], all >= 1, got '
        f'shape {x.shape}'
      )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
      raise ValueError(
        f'{name} must be float32, bfloat16 or float16, got {x.dtype}'
      )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f'q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}'
    )
  if k.shape[:3] != v.shape[:3]:
    raise ValueError(
      f'k and v differ in batch, length or heads: {k.shape} and {v.shape}'
    )
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
    raise ValueError(
      f'q and k differ in batch or head size: {q.shape} and {k.shape}'
    )
  if q.shape[2] % k.shape[2]:
    raise ValueError(f'{k.shape[2]} kv heads do not divide {q.shape[2]} heads')


def _is_integer(x) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.integer)


def _check_positions(name, positions, batch, length):
  shape = np.shape(positions)
  if not _is_integer(positions) or shape not in ((), (batch,), (batch, length)):
    raise ValueError(
      f'{name} must be whole numbers of shape (), ({batch},) or ({batch}, '
      f'{length}), got {jnp.result_type(positions)} {shape}'
    )


def _check_segments(segment_ids, batch, num_queries, num_keys):
  pair = segment_ids
  if not isinstance(pair, tuple | list):
    pair = (pair, pair)
  wanted = ((batch, num_queries), (batch, num_keys))
  shapes = tuple(np.shape(x) for x in pair)
  if shapes != wanted or not all(_is_integer(x) for x in pair):
    raise ValueError(
      f'segment_ids must be whole numbers of shapes {wanted} (queries, keys), '
      f'got {shapes}'
    )
  return tuple(pair)


def _check_globals(global_tokens, batch):
  shape = np.shape(global_tokens)
  if len(shape) != 2 or shape[0] != batch or not _is_integer(global_tokens):
    raise ValueError(
      f'global_tokens must be whole numbers of shape ({batch}, G), got {shape}'
    )
  return jnp.asarray(global_tokens, jnp.int32) if shape[1] else None
