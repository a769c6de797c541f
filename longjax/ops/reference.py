"""The definition of every attention here: dense, float32, O(T * S).

For one head, with c(i, j) how often query i sees key j and s(i, j) the logit
that the position scheme gives the pair at the pattern's distance,

  out_i = sum_j c_ij exp(s_ij) v_j / sum_j c_ij exp(s_ij)
  lse_i = log sum_j c_ij exp(s_ij)

Nothing here knows of branches, blocks or views (but for the option to detach
LongNet's mixing weights, which is defined by branches), so that everything
else can be tested against it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.dropout import keep_mask
from longjax.ops.merge import merge
from longjax.positions import Position


def attend(
  call: Call,
) -> tuple[Float[Array, 'B T H E'], Float[Array, 'B T H']]:
  """(out, lse) of a checked call, in float32 (float64 for float64)."""
  num_heads = call.q.shape[2]
  dtype = jnp.promote_types(call.q.dtype, jnp.float32)
  repeats = num_heads // call.k.shape[2]
  q = call.q.astype(dtype)
  k, v = (
    jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (call.k, call.v)
  )

  s = _logits(call, q, k)
  if call.logit_soft_cap is not None:
    s = call.logit_soft_cap * jnp.tanh(s / call.logit_soft_cap)
  keep = _kept(call)
  parts = [_softmax(s, c, keep, v) for c in _multiplicities(call, num_heads)]
  out, lse = merge(parts, detach_weights=call.pattern.detached)
  return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def _pairs(q_values, k_values):
  """[b, T], [b, S] -> broadcastable over [B, H, T, S]."""
  return q_values[:, None, :, None], k_values[:, None, None, :]


def _logits(call, q, k) -> Float[Array, 'B H T S']:
  position = call.position or Position()
  at = call.where
  distance = call.pattern.distance(at.q_pos[:, :, None], at.k_pos[:, None, :])

  @jax.checkpoint
  def one_query(row):
    query, distance = row
    return position.logits(query, k, distance, call.scale)

  rows = jax.lax.map(one_query, (q.swapaxes(0, 1), distance.swapaxes(0, 1)))
  return rows.transpose(1, 2, 0, 3)


def _multiplicities(call, num_heads):
  """The parts that are merged: one, or one a branch where weights detach."""
  at, pattern = call.where, call.pattern
  q_pos, k_pos = _pairs(at.q_pos, at.k_pos)
  visible = (q_pos >= 0) & (k_pos >= 0)
  if at.q_doc is not None:
    q_doc, k_doc = _pairs(at.q_doc, at.k_doc)
    visible = visible & (q_doc == k_doc)
  head = np.arange(num_heads)[:, None, None]
  if pattern.detached:
    parts = []
    for branch in pattern.branches(num_heads):
      offsets = np.asarray(branch.offsets or [0] * num_heads)[:, None, None]
      parts.append(branch.sees(q_pos, k_pos, offsets).astype(jnp.int32))
  else:
    parts = [pattern.multiplicity(q_pos, k_pos, head, num_heads)]
  parts = [jnp.where(visible, c, 0) for c in parts]
  if call.global_tokens is not None:
    q_abs, k_abs = _pairs(at.q_abs, at.k_abs)
    tokens = call.global_tokens[:, None, None, None, :]
    named = ((k_abs[..., None] == tokens) & (tokens >= 0)).any(-1)
    if pattern.causal:
      named = named & (k_abs <= q_abs)
    only_named = (visible & named & (sum(parts) == 0)).astype(jnp.int32)
    # max(c, named): a global key that a branch shows anyway counts as there.
    parts = (
      [*parts, only_named] if pattern.detached else [parts[0] + only_named]
    )
  return parts


def _kept(call):
  if not call.dropout_rate:
    return 1.0
  batch, _, num_heads, _ = call.q.shape
  keep = keep_mask(
    call.dropout_seed,
    call.dropout_rate,
    call.first_row + np.arange(batch)[:, None, None, None],
    np.arange(num_heads)[:, None, None],
    *_pairs(call.where.q_abs, call.where.k_abs),
  )
  return keep / (1 - call.dropout_rate)


def _softmax(s, c, keep, v):
  """(out, lse) of the softmax over keys with multiplicities c."""
  s = jnp.where(c > 0, s, -jnp.inf)
  largest = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
  largest = jnp.where(largest == -jnp.inf, 0.0, largest)
  p = c * jnp.exp(s - largest)
  total = p.sum(axis=-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  out = jnp.einsum(
    'bhts,bshe->bhte', p * keep / total, v, precision=jax.lax.Precision.HIGHEST
  )
  lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
  return out, lse[..., 0]
