"""Attention to the whole sequence: keys travel around a ring of devices.

After n - 1 hops every device has seen every other's keys, and none has ever
held more than its own and the ones that visit. Results over visiting keys are
merged by log-sum-exp. The gradient is written by hand, since nothing of a visit
may be kept: keys travel a second time, what was computed of them is computed
again, and their cotangents travel with them, home in the end.

Of causal patterns the first devices would do next to nothing. Rows are dealt
out in zig-zag order instead: of 2 n pieces, device i computes pieces i and
2 n - 1 - i, which makes two pieces' worth of work at every visit for everyone.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longjax.ops.merge import merge
from longjax.patterns import Pattern
from longjax.sharding.calls import Options, Rows, call


@dataclasses.dataclass(frozen=True)
class Ring:
  """The static part of a call."""

  pattern: Pattern
  options: Options
  axis_name: str
  zigzag: bool

  def attend(self, queries, keys, position, dropout):
    return call(self.options, self.pattern, queries, keys, position, dropout)

  @property
  def size(self):
    return jax.lax.axis_size(self.axis_name)

  def pass_on(self, tree):
    """What the device before had."""
    pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
    return jax.tree.map(
      lambda x: jax.lax.ppermute(x, self.axis_name, pairs), tree
    )


def ring_attention(pattern, options, axis_name, rows: Rows, position, dropout):
  """(out, lse) of the shard's queries over all keys of the sequence.

  Args:
    pattern: what is seen, by absolute positions.
    rows: q, k and v of the shard, [batch, length, heads, size] each.
    position: as for `longjax.attention`.
  """
  length, size = rows.x[0].shape[1], jax.lax.axis_size(axis_name)
  zigzag = pattern.causal and size > 1 and not length % 2
  static = Ring(pattern, options, axis_name, zigzag)
  x, ids = rows.x, rows.ids
  if zigzag:
    x, ids = deal((x, ids), axis_name)
  # Where the whole sequence begins.
  first = rows.first - jax.lax.axis_index(axis_name) * length
  out = _ring(static, (*x, position), (ids, first, dropout))
  return deal(out, axis_name, back=True) if zigzag else out


def deal(tree, axis_name, *, back=False):
  """Moves shards [batch, length, ...] into zig-zag order, or back.

  Device i comes to hold the half shards i and 2 n - 1 - i of the sequence, the
  earlier one first.
  """
  size, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  owner = [min(piece, 2 * size - 1 - piece) for piece in range(2 * size)]
  # Each device owns one even and one odd piece, before and after.
  routes = [[(i, owner[2 * i + odd]) for i in range(size)] for odd in (0, 1)]
  # Whether a device's earlier dealt piece, number `rank`, is the odd one.
  swapped = rank % 2 == 1

  def move(x):
    halves = jnp.split(x, 2, axis=1)
    if back:
      routes_back = [[(to, of) for of, to in route] for route in routes]
      halves = _swap(swapped, *halves)
      return jnp.concatenate(
        [
          jax.lax.ppermute(half, axis_name, route)
          for half, route in zip(halves, routes_back, strict=True)
        ],
        axis=1,
      )
    moved = [
      jax.lax.ppermute(half, axis_name, route)
      for half, route in zip(halves, routes, strict=True)
    ]
    return jnp.concatenate(_swap(swapped, *moved), axis=1)

  return jax.tree.map(move, tree)


def _swap(condition, a, b):
  return jnp.where(condition, b, a), jnp.where(condition, a, b)


class _Visit(NamedTuple):
  """One call of a visit.

  Which pieces its queries and keys are: for each piece of the shard True,
  False, or a traced boolean where it depends on who visits.
  """

  queries: tuple
  keys: tuple


def _visits(static, rank, source):
  """What a device computes of a visitor's keys; `source` None is itself."""
  if not static.zigzag:
    return [_Visit((True,), (True,))]
  second_first = _Visit((False, True), (True, False))
  if source is None:
    first_first = _Visit((True, False), (True, False))
    second_second = _Visit((False, True), (False, True))
    return [first_first, second_first, second_second]
  # Of pieces (i, 2n - 1 - i) and (j, 2n - 1 - j), the later queries see the
  # earlier keys; for i > j the earlier queries see the earlier keys besides,
  # and for i < j the later queries see the later keys. Nobody sees more.
  before = source < rank
  either = before, ~before
  return [second_first, _Visit(either, either)]


def _pieces(static, tree, ids, first, owner):
  """The shard of device `owner` as one Rows, or two in zig-zag order."""
  length = tree[0].shape[1]
  if not static.zigzag:
    return [Rows(tree, first + owner * length, ids)]
  half = length // 2
  whole = Rows(tree, first, ids)
  numbers = owner, 2 * static.size - 1 - owner
  return [
    whole.cut(start, start + half)._replace(first=first + number * half)
    for start, number in zip((0, half), numbers, strict=True)
  ]


def _pick(mask, pieces):
  """The piece whose mask is true."""
  if len(pieces) == 1 or mask[0] is True:
    return pieces[0]
  if mask[0] is False:
    return pieces[1]
  return jax.tree.map(functools.partial(jnp.where, mask[0]), *pieces)


def _masked(mask, x, otherwise):
  return x if mask is True else jnp.where(mask, x, otherwise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, x, auxiliary):
  return _forward(static, x, auxiliary)[0]


def _forward(static, x, auxiliary):
  q, k, v, position = x
  ids, first, dropout = auxiliary
  rank = jax.lax.axis_index(static.axis_name)
  queries = _pieces(static, (q,), ids, first, rank)

  def visit(state, visitor, source):
    *kv, visitor_ids = visitor
    owner = rank if source is None else source
    keys = _pieces(static, tuple(kv), visitor_ids, first, owner)
    for one in _visits(static, rank, source):
      out, lse = static.attend(
        _pick(one.queries, queries),
        _pick(one.keys, keys),
        position,
        dropout,
      )
      state = [
        old
        if mask is False
        else merge([old, (out, _masked(mask, lse, -jnp.inf))])
        for mask, old in zip(one.queries, state, strict=True)
      ]
    return state

  wide = jnp.promote_types(q.dtype, jnp.float32)
  state = [
    (
      jnp.zeros((*rows.x[0].shape[:3], v.shape[3]), wide),
      jnp.full(rows.x[0].shape[:3], -jnp.inf, wide),
    )
    for rows in queries
  ]
  state = visit(state, (k, v, ids), None)

  def step(carry, hop):
    state, visitor = carry
    visitor = static.pass_on(visitor)
    state = visit(state, visitor, (rank - hop) % static.size)
    return (state, visitor), None

  (state, _), _ = jax.lax.scan(
    step, (state, (k, v, ids)), jnp.arange(1, static.size)
  )
  out, lse = (
    jnp.concatenate(part, axis=1) for part in zip(*state, strict=True)
  )
  out = out.astype(q.dtype)
  return (out, lse), (x, auxiliary, out, lse)


def _backward(static, residuals, cotangents):
  x, auxiliary, out, lse = residuals
  q, k, v, position = x
  ids, first, dropout = auxiliary
  dout, dlse = cotangents
  rank = jax.lax.axis_index(static.axis_name)
  queries = _pieces(static, (q,), ids, first, rank)
  dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)
  dout = dout.astype(lse.dtype)
  # A visit's share of a query's softmax is exp(its lse - lse); what changing
  # that share does to the loss is measured from this.
  mean = dlse - (dout * out.astype(lse.dtype)).sum(-1)
  results = [
    rows.x for rows in _pieces(static, (lse, dout, dlse, mean), None, first, 0)
  ]

  def one_call(one, queries, keys, results):
    lse, dout, dlse, mean = _pick(one.queries, results)
    rows, visited = _pick(one.queries, queries), _pick(one.keys, keys)

    def attend(q, kv, position):
      return static.attend(
        rows._replace(x=(q,)), visited._replace(x=kv), position, dropout
      )

    (out, own_lse), pull = jax.vjp(attend, *rows.x, visited.x, position)
    share = jnp.exp(jnp.where(lse == -jnp.inf, -jnp.inf, own_lse - lse))
    if static.pattern.detached:
      dshare = dlse
    else:
      dshare = mean + (dout * out.astype(lse.dtype)).sum(-1)
    return pull(((share[..., None] * dout).astype(out.dtype), share * dshare))

  def visit(sums, visitor, source):
    dq, dkv, dposition = sums
    *kv, visitor_ids = visitor
    owner = rank if source is None else source
    keys = _pieces(static, tuple(kv), visitor_ids, first, owner)
    for one in _visits(static, rank, source):
      d, dvisited, dp = one_call(one, queries, keys, results)
      dq = _add_piece(one.queries, dq, d)
      dkv = [
        _add_piece(one.keys, y, dy) for y, dy in zip(dkv, dvisited, strict=True)
      ]
      dposition = jax.tree.map(jnp.add, dposition, dp)
    return dq, dkv, dposition

  def zeros(y):
    return jnp.zeros(y.shape, lse.dtype)

  dq, dkv = zeros(q), [zeros(k), zeros(v)]
  dposition = jax.tree.map(jnp.zeros_like, position)
  dq, dkv, dposition = visit((dq, dkv, dposition), (k, v, ids), None)

  def step(carry, hop):
    dq, dposition, visitor, dkv = carry
    visitor, dkv = static.pass_on((visitor, dkv))
    source = (rank - hop) % static.size
    dq, dkv, dposition = visit((dq, dkv, dposition), visitor, source)
    return (dq, dposition, visitor, dkv), None

  (dq, dposition, _, dkv), _ = jax.lax.scan(
    step, (dq, dposition, (k, v, ids), dkv), jnp.arange(1, static.size)
  )
  dk, dv = static.pass_on(dkv)  # the last hop is home
  return (
    (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dposition),
    None,
  )


def _add_piece(mask, x, d):
  """Adds a piece's cotangent where the piece lies in the shard."""
  if len(mask) == 1:
    return x + d
  low, high = jnp.split(x, 2, axis=1)
  low, high = (
    y if m is False else y + _masked(m, d, 0).astype(y.dtype)
    for y, m in zip((low, high), mask, strict=True)
  )
  return jnp.concatenate([low, high], axis=1)


_ring.defvjp(_forward, _backward)
