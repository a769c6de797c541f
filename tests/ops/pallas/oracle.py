"""The contract of the Pallas kernels, computed densely; and random operands."""

import jax
import jax.numpy as jnp
import numpy as np

from longjax.ops.dropout import keep_mask
from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Gradients, Operands, Prefix, Spec


def _per_head(spec, y):
  """[G, rows, R, heads, ...] -> [G, C, heads, rows, ...]."""
  if spec.residues is None:
    return jnp.moveaxis(y, 1, 3)
  heads = [y[:, :, r, h] for h, r in enumerate(spec.residues)]
  return jnp.stack(heads, 1)[:, None]


def dense(spec: Spec, x: Operands):
  """(out [G, P, C, H, D], lse [G, C, H, P]) in float32."""
  f32 = jnp.float32
  q, k, v = (y.astype(f32) for y in (x.q, x.k, x.v))
  sequences, num_q, residues, heads, _ = q.shape
  num_k, group = k.shape[1], heads // k.shape[3]
  k, v = (jnp.repeat(y, group, axis=3) for y in (k, v))
  q, k, v = (_per_head(spec, y) for y in (q, k, v))

  def column(number):
    return x.where[:, number].reshape(-1, 1, 1, 1, 1)

  a, b = jnp.arange(num_q)[:, None], jnp.arange(num_k)
  at = a + column(contract.SHIFT)
  begin, end = column(contract.BEGIN), column(contract.END)
  left, right = column(contract.LEFT), column(contract.RIGHT)

  def in_band(b):
    return (at - b <= left) & (at - b >= -right) & (b >= begin) & (b < end)

  seen = in_band(b)
  q_ids = None
  if x.q_ids is not None:

    def spread(ids):
      return _per_head(
        spec, jnp.broadcast_to(ids[:, :, :, None], (*ids.shape, heads))
      )

    q_ids = spread(x.q_ids)[..., None]
    k_ids = spread(x.k_ids)[..., None, :]
    seen = seen & (q_ids == k_ids) & (q_ids >= 0)
  s = jnp.einsum('gchpd,gchsd->gchps', q, k, precision='highest')

  if spec.residues is None:
    residue = jnp.arange(residues).reshape(1, -1, 1, 1, 1)
  else:
    residue = jnp.asarray(spec.residues).reshape(1, 1, -1, 1, 1)
  q_position = column(contract.Q_POSITION) + a * residues + residue
  k_position = column(contract.K_POSITION) + b * residues + residue
  shape = s.shape
  seen, k_position = (jnp.broadcast_to(y, shape) for y in (seen, k_position))

  if x.prefix is not None:
    m = x.prefix
    met = q if m.q is None else _per_head(spec, m.q.astype(f32))
    pk, pv = (
      jnp.repeat(y.astype(f32), group, axis=2).swapaxes(1, 2)[:, None]
      for y in (m.k, m.v)
    )
    ps = jnp.einsum('gchpd,gchsd->gchps', met, pk, precision='highest')
    row = m.row[:, None, None, None, :]
    p_seen = (row != contract.NOWHERE) & ~in_band(row)
    if spec.prefix_causal:
      p_seen = p_seen & (row <= at)
    if q_ids is not None:
      ids = m.ids[:, None, None, None, :]
      p_seen = p_seen & (ids == q_ids) & (q_ids >= 0)
    p_position = column(contract.K_POSITION) + row
    p_seen, p_position = (
      jnp.broadcast_to(y, ps.shape) for y in (p_seen, p_position)
    )
    s, v, seen, k_position = (
      jnp.concatenate(pair, axis)
      for pair, axis in (
        ((ps, s), -1),
        ((pv, v), -2),
        ((p_seen, seen), -1),
        ((p_position, k_position), -1),
      )
    )

  s = s * spec.scale
  if spec.soft_cap is not None:
    s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
  s = jnp.where(seen, s, -jnp.inf)
  lse = jax.nn.logsumexp(s, axis=-1)
  p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
  if spec.dropout_rate:
    head = jnp.arange(heads).reshape(1, 1, -1, 1, 1)
    keep = keep_mask(
      x.seed,
      spec.dropout_rate,
      column(contract.BATCH_ROW),
      column(contract.FIRST_HEAD) + head,
      q_position,
      k_position,
    )
    p = jnp.where(keep, p / (1 - spec.dropout_rate), 0.0)
  out = jnp.einsum('gchps,gchsd->gchpd', p, v, precision='highest')
  return jnp.moveaxis(out, 3, 1), lse


def forward_and_backward(spec: Spec, x: Operands, dout, dlse):
  """(out, lse, delta, Gradients) in float32.

  Args:
    dout: [G, P, R, H, D]; of `residues`, only the rows selected count.
    dlse: [G, C, H, P].

  Returns: besides the results, the delta that a kernel's `backward` is given.
  """

  def f(q, k, v, prefix_q, prefix_k, prefix_v):
    y = x._replace(q=q, k=k, v=v)
    if x.prefix is not None:
      y = y._replace(
        prefix=x.prefix._replace(q=prefix_q, k=prefix_k, v=prefix_v)
      )
    return dense(spec, y)

  m = x.prefix or Prefix(None, None, None)
  arguments = jax.tree.map(
    lambda y: y.astype(jnp.float32), (x.q, x.k, x.v, m.q, m.k, m.v)
  )
  (out, lse), pull = jax.vjp(f, *arguments)
  compact = jnp.moveaxis(_per_head(spec, dout.astype(jnp.float32)), 3, 1)
  dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)
  delta = jnp.moveaxis((compact * out).sum(-1), 1, 3) - dlse
  dq, dk, dv, *rest = pull((compact, dlse))
  if spec.residues is not None:
    # Per query head, which the repeat over the group has summed: take the
    # gradients of a call in which every query head has its own keys.
    group = x.q.shape[3] // x.k.shape[3]
    if group > 1:
      own = x._replace(
        k=jnp.repeat(x.k, group, axis=3), v=jnp.repeat(x.v, group, axis=3)
      )
      return forward_and_backward(spec, own, dout, dlse)
    dq, dk, dv = (jnp.moveaxis(_per_head(spec, y), 3, 1) for y in (dq, dk, dv))
  return out, lse, delta, Gradients(dq, dk, dv, *rest)


def operands(
  seed=0,
  *,
  sequences=1,
  num_queries=128,
  num_keys=None,
  residues=1,
  heads=2,
  kv_heads=None,
  size=64,
  dtype=jnp.bfloat16,
  ids=False,
  prefix=0,
  prefix_q=False,
  dropout=False,
  **where,
) -> Operands:
  """Random operands; `where` are arguments of `contract.where_rows`."""
  rng = np.random.default_rng(seed)
  num_keys = num_keys or num_queries
  kv_heads = kv_heads or heads

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  def some_ids(*shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.int32)

  q_ids = k_ids = m = None
  if ids:
    q_ids = some_ids(sequences, num_queries, residues)
    k_ids = some_ids(sequences, num_keys, residues)
  if prefix:
    row = rng.integers(-num_keys // 2, num_keys, (sequences, prefix))
    row[:, -1] = contract.NOWHERE
    m = Prefix(
      normal(sequences, prefix, kv_heads, size),
      normal(sequences, prefix, kv_heads, size),
      jnp.asarray(row, jnp.int32),
      normal(sequences, num_queries, 1, heads, size) if prefix_q else None,
      some_ids(sequences, prefix) if ids else None,
    )
  return Operands(
    normal(sequences, num_queries, residues, heads, size),
    normal(sequences, num_keys, residues, kv_heads, size),
    normal(sequences, num_keys, residues, kv_heads, size),
    contract.where_rows(sequences, **where),
    q_ids,
    k_ids,
    jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32) if dropout else None,
    m,
  )
