"""Attention on any platform, with every feature, in linear memory.

A pattern's branches (and the global keys, if any) are computed one after the
other (`tasks`), each in the view in which its keys are an interval, and merged.
The gradient is written by hand: only the merged (out, lse) is kept, and each
branch's share follows from them (delta = rowsum(dO * O) - dLSE).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longjax.ops.call import Call, named
from longjax.ops.encode import encode, put_heads, take_apart, take_heads
from longjax.ops.merge import merge
from longjax.ops.tasks import tasks_of
from longjax.patterns import GroupedDistance
from longjax.positions import XPos


def attend(
  call: Call,
) -> tuple[Float[Array, 'B T H E'], Float[Array, 'B T H']]:
  """(out in q's dtype, lse) of a checked call."""
  if call.where.q_doc is not None and isinstance(call.position, XPos):
    distances = {b.distance for b in call.pattern.branches(call.q.shape[2])}
    if any(isinstance(d, GroupedDistance) for d in distances):
      raise NotImplementedError(
        'xPos around the middle of a block of queries needs one document in '
        'it, and SelfExtend tells positions that restart in each of several'
      )
  return _attend_jit(*take_apart(call))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, x, auxiliary):
  return _forward(static, x, auxiliary)[0]


def _forward(static, x, auxiliary):
  batch, num_queries, num_heads, _ = x.q.shape
  parts, merged = [], None
  encoded = {}
  for task in tasks_of(static, x, auxiliary):
    if task.distance not in encoded:
      encoded[task.distance] = encode(static, x, auxiliary, task.distance)
    encoded, merged, parts = _one_at_a_time(encoded, merged, parts)
    run = functools.partial(
      task.forward, encoded[task.distance], x.position, auxiliary
    )
    if static.pattern.detached:
      parts.append(run())
    elif task.heads is None:
      merged = run(merged or ())
    else:
      part = run()
      if merged is None:
        shape = (batch, num_queries, num_heads)
        merged = (
          jnp.zeros((*shape, x.v.shape[-1]), part[0].dtype),
          jnp.full(shape, -jnp.inf, part[1].dtype),
        )
      # Each head is in few branches: only its own rows are merged.
      mine = tuple(take_heads(y, task.heads, 2) for y in merged)
      mine = merge([mine, part])
      merged = tuple(
        put_heads(y, new, task.heads, 2)
        for y, new in zip(merged, mine, strict=True)
      )
  if static.pattern.detached:
    merged = merge(parts)
  out, lse = merged
  out, lse = named(out.astype(x.q.dtype), lse)
  outs = [named(*part)[0] for part in parts]
  return (out, lse), (x, auxiliary, out, lse, outs)


def _backward(static, residuals, cotangents):
  x, auxiliary, out, lse, outs = residuals
  dout, dlse = cotangents
  # A row that sees nothing has no softmax denominator to speak of.
  dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)
  delta = _row_sum(dout, out) - dlse

  encoded, pulls, sums, dposition = {}, {}, {}, None
  for number, task in enumerate(tasks_of(static, x, auxiliary)):
    if task.distance not in encoded:
      show = functools.partial(
        encode, static, auxiliary=auxiliary, distance=task.distance
      )
      encoded[task.distance], pulls[task.distance] = jax.vjp(show, x)
    encoded, sums, dout = _one_at_a_time(encoded, sums, dout)
    if static.pattern.detached:
      # With the weights held fixed, each part answers for itself.
      delta = _row_sum(dout, outs[number]) - dlse
    d, dp = task.backward(
      encoded[task.distance], x.position, auxiliary, lse, delta, dout
    )
    old = sums.get(task.distance)
    sums[task.distance] = d if old is None else _add(old, d)
    dposition = dp if dposition is None else _add(dposition, dp)

  dx = None
  for distance, value in encoded.items():
    cotangent = jax.tree.map(
      lambda d, y: d.astype(y.dtype), sums[distance], value
    )
    (d,) = pulls[distance](cotangent)
    dx = d if dx is None else _add(dx, d)
  dx = dx._replace(position=_add(dx.position, dposition))
  return dx, None


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


def _one_at_a_time(*trees):
  """Arrays that exist only once all of them do.

  What the next task needs waits for the last one's result, lest the buffers of
  all tasks exist at the same time.
  """
  # Distances, which are keys here, have no order, as JAX wants of dicts.
  arrays = [list(x.values()) if isinstance(x, dict) else x for x in trees]
  arrays = jax.lax.optimization_barrier(arrays)
  return tuple(
    dict(zip(x, y, strict=True)) if isinstance(x, dict) else y
    for x, y in zip(trees, arrays, strict=True)
  )


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _row_sum(dout, out):
  dtype = jnp.promote_types(dout.dtype, jnp.float32)
  return (dout.astype(dtype) * out.astype(dtype)).sum(axis=-1)
