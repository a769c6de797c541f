"""A call of attention by the Pallas kernels of one backend.

As in `ops.xla`, the pattern's branches are computed one after the other
(`parts`) and merged; only the merged (out, lse) is kept for the gradient, from
which each branch's share follows (delta = rowsum(dO * O) - dLSE).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longjax.ops.call import Call, named
from longjax.ops.encode import Differentiable, encode, take_apart
from longjax.ops.merge import merge
from longjax.ops.pallas.parts import Shown, differentiable, parts_of
from longjax.ops.pallas.tiling import KERNELS, Tiles, config_for
from longjax.ops.tasks import GlobalTask
from longjax.positions import RoPE


@dataclasses.dataclass(frozen=True)
class Kernels:
  """A backend, and where it runs.

  Attributes:
    module: has `check`, `forward` and `backward` of `contract`.
    tiles: what it says of its tiles; None if it has none.
    device_kind: of the device, as JAX names it: what tiles are chosen for.
    programs: so many keep the device busy; a call of fewer is split over the
      keys, into pieces of at least `piece`.
  """

  module: Any
  tiles: Tiles | None = None
  device_kind: str | None = None
  programs: int = 1
  piece: int = 1024

  def forward(self, spec, x):
    return self.module.forward(spec, x, config=self._config('forward', spec, x))

  def backward(self, spec, x, lse, delta, dout):
    configs = None
    if self.tiles is not None:
      configs = tuple(self._config(kernel, spec, x) for kernel in KERNELS[1:])
    return self.module.backward(spec, x, lse, delta, dout, configs=configs)

  def _config(self, kernel, spec, x):
    if self.tiles is None:
      return None
    return config_for(self.tiles, self.device_kind, kernel, spec, x)


def attend(
  call: Call, kernels: Kernels
) -> tuple[Float[Array, 'B T H D'], Float[Array, 'B T H']]:
  """(out in q's dtype, lse) of a checked call.

  Raises:
    NotImplementedError: with the reason, for what the kernels cannot do.
  """
  _check(call)
  return _attend_jit(kernels, *take_apart(call))


def _check(call):
  def refuse(reason):
    raise NotImplementedError(reason)

  where = call.where
  if call.position is not None and not isinstance(call.position, RoPE):
    refuse(
      f'position {type(call.position).__name__} changes logits inside the '
      f'tiles, and the kernels take rotated queries and keys: RoPE or None'
    )
  if not call.contiguous:
    refuse(
      'q_positions or kv_positions of every token: keys in any order are no '
      'interval'
    )
  if call.v.shape[3] != call.q.shape[3]:
    refuse(
      f'value size {call.v.shape[3]} differs from head size {call.q.shape[3]}'
    )
  offsets = [y for y in (where.q_offset, where.k_offset) if y is not None]
  for branch in call.pattern.branches(call.q.shape[2]):
    if branch.earlier or branch.columns is not None:
      refuse(
        f'{call.pattern}: the keys of earlier segments that a query sees are '
        f'no band around it'
      )
    divided = min(branch.segment, branch.block) < math.inf
    if where.q_doc is not None and (divided or branch.start != math.inf):
      refuse(
        f'segment_ids with {call.pattern}: where its segments or start keys '
        f'lie in each document depends on the data'
      )
    if divided and offsets:
      refuse(
        f'q_positions or kv_positions with {call.pattern}: segments start '
        f'where the positions say, which is known only for a plain 0'
      )
    if branch.stride > 1 and any(y.ndim for y in offsets):
      refuse(
        f'positions of each batch row with dilation {branch.stride}: each row '
        f'would have residue classes of its own'
      )
    if branch.start != math.inf and (branch.stride > 1 or divided):
      refuse(f'start keys of a dilated or segmented branch: {branch}')
    if branch.block != math.inf and (
      branch.stride > 1 or branch.segment < math.inf
    ):
      refuse(f'blocks of a dilated or segmented branch: {branch}')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, static, x, auxiliary):
  return _forward(kernels, static, x, auxiliary)[0]


def _forward(kernels, static, x, auxiliary):
  parts, more = parts_of(kernels, static, x, auxiliary)
  shown = Shown(static, x, auxiliary.where)
  results, outs = [], []
  for part in parts:
    operands = part.operands(shown, auxiliary)
    kernels.module.check(part.spec, operands)
    out, lse = kernels.forward(part.spec, operands)
    results.append((part.heads, *part.restore(out, lse)))
  if more:
    task = GlobalTask(static, x)
    encoded = encode(static, x, auxiliary, task.distance)
    out, lse = task.forward(encoded, x.position, auxiliary)
    results.append((range(x.q.shape[2]), out, lse))
  out, lse = _merge_heads(results, x.q)
  if auxiliary.where.q_offset is not None and not static.pattern.causal:
    # Queries before position 0 do not exist; a causal one sees nothing there.
    nobody = (auxiliary.where.q_abs < 0)[:, :, None]
    out = jnp.where(nobody[..., None], 0, out)
    lse = jnp.where(nobody, -jnp.inf, lse)
  out, lse = named(out.astype(x.q.dtype), lse)
  if static.pattern.detached:
    outs = [named(*result)[0] for _, *result in results]
  return (out, lse), (x, auxiliary, out, lse, outs)


def _merge_heads(results, q):
  """Merges (heads, out, lse) over the runs of heads that they cut."""
  num_heads = q.shape[2]
  cuts = {0, num_heads}
  cuts |= {end for heads, _, _ in results for end in (heads.start, heads.stop)}
  cuts = sorted(cuts)
  merged = []
  for first, end in zip(cuts, cuts[1:], strict=False):
    mine = [
      tuple(y[:, :, first - h.start : end - h.start] for y in (out, lse))
      for h, out, lse in results
      if h.start <= first and end <= h.stop
    ]
    merged.append(merge(mine))
  if len(merged) == 1:
    return merged[0]
  return tuple(jnp.concatenate(y, 2) for y in zip(*merged, strict=True))


def _backward(kernels, static, residuals, cotangents):
  x, auxiliary, out, lse, outs = residuals
  dout, dlse = cotangents
  # A row that sees nothing has no softmax denominator to speak of.
  nothing = lse == -jnp.inf
  dlse = jnp.where(nothing, 0.0, dlse)
  lse = jnp.where(nothing, jnp.inf, lse)
  delta = _row_sum(dout, out) - dlse

  parts, more = parts_of(kernels, static, x, auxiliary)
  shown = Shown(static, x, auxiliary.where)
  cotangents = []
  for number, part in enumerate(parts):
    heads = slice(part.heads.start, part.heads.stop)
    if static.pattern.detached:
      # With the weights held fixed, each part answers for itself.
      delta = _row_sum(dout, outs[number]) - dlse
    gradients = kernels.backward(
      part.spec,
      part.operands(shown, auxiliary),
      part.of_rows(lse, jnp.inf),
      part.of_rows(delta, 0),
      part.of_queries(dout[:, :, heads]),
    )
    cotangents.append(part.cotangents(gradients))

  # The way back to q, k and v is the transpose of a linear one, in float32
  # whatever their dtype: sums over parts are rounded once.
  def all_operands(q, k, v):
    shown = Shown(static, x._replace(q=q, k=k, v=v), auxiliary.where)
    return [differentiable(p.operands(shown, auxiliary)) for p in parts]

  wide = [y.astype(jnp.float32) for y in (x.q, x.k, x.v)]
  _, pull = jax.vjp(all_operands, *wide)
  dx = pull(cotangents)
  if more:
    if static.pattern.detached:
      delta = _row_sum(dout, outs[-1]) - dlse
    task = GlobalTask(static, x)
    show = functools.partial(
      encode, static, auxiliary=auxiliary, distance=task.distance
    )
    encoded, pull = jax.vjp(show, x)
    d, _ = task.backward(
      encoded,
      x.position,
      auxiliary,
      lse,
      delta,
      dout.astype(jnp.float32),
    )
    (d,) = pull(jax.tree.map(lambda d, y: d.astype(y.dtype), d, encoded))
    dx = [
      a + b.astype(a.dtype) for a, b in zip(dx, (d.q, d.k, d.v), strict=True)
    ]
  dq, dk, dv = (
    d.astype(y.dtype) for d, y in zip(dx, (x.q, x.k, x.v), strict=True)
  )
  return Differentiable(dq, dk, dv, x.position), None


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=(0, 1))


def _row_sum(dout, out):
  return (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
