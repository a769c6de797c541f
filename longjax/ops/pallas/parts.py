"""The kernel calls that one call of attention is made of.

A `Part` is one branch of the pattern (for some neighbouring heads): how q, k
and v become the `Operands` of a kernel, and how its results and gradients come
back. Branches differ only in how the sequence is addressed:

  window                    one sequence a batch row
  dilation d                the same, in d residue classes
  LongNet's (w, r)          one sequence a segment, in r residue classes, of
                            which every head walks its own
  a block and the last      one sequence a block, with the keys of two
  few queries, many keys    one sequence a piece of the keys

All of it is reshapes, and padding where a length does not divide. Start keys
and global keys are the prefix of a window's call.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from longjax.ops.encode import told
from longjax.ops.merge import merge
from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Gradients, Operands, Prefix, Spec
from longjax.patterns import Branch

# Keys are split over programs in pieces of at least this many.
_TILE = 128


def parts_of(kernels, static, x, auxiliary) -> tuple[list['Part'], bool]:
  """The parts, and whether global keys are left to compute besides."""
  pattern, num_heads = static.pattern, x.q.shape[2]
  branches, start = pattern.branches(num_heads), 0
  if _are_band_and_start(pattern, branches):
    branches, start = branches[:1], branches[1].start
  # A prefix leaves out what one interval of one sequence shows, no more.
  plain = len(branches) == 1 and _is_plain(branches[0], num_heads)
  own_globals = auxiliary.global_tokens is not None and plain
  parts = [
    Part(kernels, static, x, auxiliary.where, branch, heads, start, own_globals)
    for branch in branches
    for heads in _runs(branch.heads, num_heads, num_heads // x.k.shape[2])
  ]
  return parts, auxiliary.global_tokens is not None and not own_globals


def _is_plain(branch, num_heads):
  every = branch.heads is None or len(branch.heads) == num_heads
  whole = branch.start == branch.segment == branch.block == math.inf
  return every and whole and branch.stride == 1


def _are_band_and_start(pattern, branches):
  """Whether there are a band and the start keys before it: a Λ."""
  if len(branches) != 2:
    return False
  band, start = branches
  return (
    band == Branch(left=band.left, right=0)
    and start
    == Branch(
      right=-band.left - 1, start=start.start, distance=pattern.far_distance
    )
    and start.start != math.inf
  )


def _runs(heads, num_heads: int, group: int) -> list[range]:
  """Neighbouring heads, which hold whole groups or lie in one."""
  if heads is None or len(heads) == num_heads:
    return [range(num_heads)]
  runs = []
  for run in np.split(heads, np.flatnonzero(np.diff(heads) != 1) + 1):
    first, end = int(run[0]), int(run[-1]) + 1
    while first < end:
      whole = first + (end - first) // group * group
      if first % group or whole == first:
        whole = min(end, -(-(first + 1) // group) * group)
      runs.append(range(first, whole))
      first = whole
  return runs


class Shown:
  """q and k as a distance has the position scheme show them, each once."""

  def __init__(self, static, x, where):
    self.x, self._static, self._where = x, static, where
    self._known = {}

  def told_keys(self, distance):
    return told(self._static, self._where, distance)[1]

  def rotate(self, y, positions):
    if self.x.position is None:
      return y
    return self.x.position.rotate(y, positions[..., None])

  def queries(self, distance):
    return self._once('q', distance)

  def keys(self, distance):
    return self._once('k', distance)

  def _once(self, name, distance):
    if (name, distance) not in self._known:
      positions = told(self._static, self._where, distance)
      self._known[name, distance] = self.rotate(
        getattr(self.x, name), positions[name == 'k']
      )
    return self._known[name, distance]


def differentiable(x: Operands) -> Gradients:
  """The arrays that have a gradient, in their place."""
  m = x.prefix or Prefix(None, None, None)
  return Gradients(x.q, x.k, x.v, m.q, m.k, m.v)


class Part:
  """One kernel call.

  Attributes:
    heads: global numbers of its query heads.
    spec: what is static for the kernel.
  """

  def __init__(
    self,
    kernels,
    static,
    x,
    where,
    branch: Branch,
    heads: range,
    start: int,
    own_globals: bool,
  ):
    self.static, self.branch, self.heads = static, branch, heads
    self.batch, self.num_queries, num_heads, _ = x.q.shape
    self.num_keys, kv_heads = x.k.shape[1:3]
    group = num_heads // kv_heads
    self._kv = slice(heads.start // group, (heads.stop - 1) // group + 1)
    self._moving = where.q_offset is not None or where.k_offset is not None
    # Positions before it are start keys; those of moved keys begin anywhere.
    self.start = start if self._moving else min(start, self.num_keys)
    self.own_globals = own_globals
    self.residues = branch.stride
    # Rows of queries and keys in a sequence, in positions.
    self.queries, self.keys, self.segments = self.num_queries, self.num_keys, 1
    if branch.segment < max(self.num_queries, self.num_keys):
      self.segments = -(-self.num_queries // branch.segment)
      self.queries = self.keys = branch.segment
    # Whether a sequence has the keys of the one before it, too.
    self.twice = branch.block < max(self.num_queries, self.num_keys)
    if self.twice:
      self.segments = -(-self.num_queries // branch.block)
      self.queries, self.keys = branch.block, 2 * branch.block
    self.pieces = self._pieces(kernels)
    self._by_id = where.q_doc is not None or self._ragged()
    residues = None
    if branch.offsets is not None:
      residues = tuple(branch.offsets[h] for h in heads)
    reach = (_bounded(side) for side in (branch.left, branch.right))
    self.spec = Spec(
      scale=static.scale,
      soft_cap=static.soft_cap,
      dropout_rate=static.dropout_rate,
      reach=tuple(reach),
      residues=residues,
      prefix_causal=static.pattern.causal,
    )

  def _pieces(self, kernels):
    """Into how many pieces the keys are cut, so that no core stands idle."""
    branch, prefix = self.branch, self.start or self.own_globals
    bounded = max(branch.left, branch.right) != math.inf
    divided = self.segments > 1 or self.twice
    if bounded or prefix or divided or self.residues > 1:
      return 1
    programs = self.batch * len(self.heads) * -(-self.num_queries // _TILE)
    most = self.num_keys // kernels.piece
    return max(1, min(kernels.programs // programs, most))

  def _ragged(self):
    """Whether a row holds keys that do not exist and yet could be seen."""
    if self.residues == 1:
      return False  # `end` tells
    if self._moving:
      return True
    ends = {self.keys, self.num_keys % self.keys}
    if not any(end % self.residues for end in ends):
      return False
    # Behind the last query, there is nothing to see for any that exists.
    return self.branch.right > 0 or self.num_queries > self.num_keys

  # --- Addressing ------------------------------------------------------------

  def _sequences(self, y, length, fill=0):
    """[B, L, ...] -> [G, rows, R, ...], of `length` positions each."""
    y = _fit(y, self.segments * length, fill)
    y = y.reshape(self.batch * self.segments, length, *y.shape[2:])
    rows = -(-length // self.residues)
    y = _fit(y, rows * self.residues, fill)
    return y.reshape(y.shape[0], rows, self.residues, *y.shape[2:])

  def of_queries(self, y, fill=0):
    """[B, T, ...] -> [G, P, R, ...]."""
    return self._each_piece(self._sequences(y, self.queries, fill))

  def _each_piece(self, y):
    return y if self.pieces == 1 else jnp.repeat(y, self.pieces, axis=0)

  def _of_keys(self, y, lead, fill=0):
    """[B, S, ...] -> [G, S', R, ...], after `lead` empty slots."""
    if self.pieces > 1:
      y = _fit(y, self.pieces * self._piece, fill)
      return y.reshape(-1, self._piece, 1, *y.shape[2:])
    if self.twice:
      y = self._sequences(y, self.queries, fill)
      y = y.reshape(self.batch, self.segments, *y.shape[1:])
      before = jnp.full_like(y[:, :1], fill)
      y = jnp.concatenate(
        [jnp.concatenate([before, y[:, :-1]], axis=1), y], axis=2
      )
      return y.reshape(-1, *y.shape[2:])
    if not isinstance(lead, int):
      room = self.num_keys + self.residues - 1
      empty = jnp.full((y.shape[0], room, *y.shape[2:]), fill, y.dtype)
      y = jax.lax.dynamic_update_slice_in_dim(empty, y, lead, 1)
      return self._sequences(y, room, fill)
    return self._sequences(y, self.keys, fill)

  @property
  def _piece(self):
    return -(-self.num_keys // (self.pieces * _TILE)) * _TILE

  def of_rows(self, y, fill):
    """[B, T, heads] -> [G, C, heads, P]."""
    y = self.of_queries(y[:, :, self.heads.start : self.heads.stop], fill)
    if self.spec.residues is not None:
      # No sum, a choice: 0 + inf is inf.
      y = jnp.where(self._own, y, 0).sum(2, keepdims=True)
    return y.transpose(0, 2, 3, 1)

  @property
  def _own(self):
    """[R, heads]: whether a head walks the residue."""
    return np.arange(self.residues)[:, None] == np.asarray(self.spec.residues)

  def restore(self, out, lse):
    """Results -> ([B, T, heads, D], [B, T, heads])."""
    lse = lse.transpose(0, 3, 1, 2)
    if self.spec.residues is not None:
      out = jnp.where(self._own[:, :, None], out, 0)
      lse = jnp.where(self._own, lse, -jnp.inf)
    if self.pieces > 1:
      out, lse = (
        y.reshape(self.batch, self.pieces, *y.shape[1:]) for y in (out, lse)
      )
      out, lse = merge([(out[:, i], lse[:, i]) for i in range(self.pieces)])
    return self._positions(out), self._positions(lse)

  def _positions(self, y):
    """[G, P, R, ...] -> [B, T, ...]."""
    y = y.reshape(y.shape[0], -1, *y.shape[3:])[:, : self.queries]
    y = y.reshape(self.batch, -1, *y.shape[2:])
    return y[:, : self.num_queries]

  # --- Operands and gradients ------------------------------------------------

  def operands(self, shown: Shown, auxiliary) -> Operands:
    x, where = shown.x, auxiliary.where
    distance = self.branch.distance
    heads = slice(self.heads.start, self.heads.stop)
    q_offset, k_offset = (
      0 if y is None else y for y in (where.q_offset, where.k_offset)
    )
    lead = 0
    if self.residues > 1 and self._moving:
      # Keys are moved so that they lie in the residue classes of their queries.
      lead = (k_offset - q_offset) % self.residues
    q_ids = k_ids = None
    if self._by_id:
      q_ids = self.of_queries(self._ids(where.q_doc, self.num_queries), -1)
      k_ids = self._ids(where.k_doc, self.num_keys)
      if self.residues > 1:
        k_ids = jnp.where(where.k_pos < 0, -1, k_ids)
      k_ids = self._of_keys(k_ids, lead, -1)
    return Operands(
      self.of_queries(shown.queries(distance)[:, :, heads]),
      self._of_keys(shown.keys(distance)[:, :, self._kv], lead),
      self._of_keys(x.v[:, :, self._kv], lead),
      self._where(auxiliary, q_offset, k_offset, lead),
      q_ids,
      k_ids,
      auxiliary.seed,
      self._prefix(shown, auxiliary, k_offset),
    )

  def _ids(self, doc, length):
    return jnp.zeros((self.batch, length), jnp.int32) if doc is None else doc

  def _where(self, auxiliary, q_offset, k_offset, lead):
    branch, sequences = self.branch, self.segments * self.pieces
    part = jnp.tile(jnp.arange(sequences), self.batch)

    def each(y):
      """Of each sequence, from a scalar or one for each batch row."""
      return jnp.repeat(y, sequences) if jnp.ndim(y) else y

    q_offset, k_offset = each(q_offset), each(k_offset)
    shift = (q_offset - k_offset + lead) // self.residues
    # Positions below 0 do not exist. (Ids tell where there are residues.)
    begin = jnp.maximum(-k_offset, 0) if self.residues == 1 else 0
    end = -(-(self.num_keys + lead) // self.residues)
    if branch.start != math.inf:
      end = jnp.minimum(end, branch.start - k_offset)
    q_first = k_first = 0
    if self.segments > 1 or self.twice:
      q_first = k_first = part * self.queries
      if self.twice:
        shift = self.queries
        k_first = q_first - shift
        begin = jnp.where(part == 0, shift, 0)
      end = jnp.clip(self.num_keys - k_first, 0, self.keys)
      end = -(-end // self.residues)
    if self.pieces > 1:
      k_first = part * self._piece
      begin, end = (jnp.clip(y - k_first, 0, self._piece) for y in (begin, end))
      shift = shift - k_first
    return contract.where_rows(
      self.batch * sequences,
      left=_bounded(branch.left),
      right=_bounded(branch.right),
      shift=shift,
      begin=begin,
      end=end,
      q_position=q_offset + q_first,
      k_position=k_offset - lead + k_first,
      batch_row=each(auxiliary.batch_row),
      first_head=self.heads.start,
    )

  def _prefix(self, shown, auxiliary, k_offset):
    if not self.start and not self.own_globals:
      return None
    slots, exists = self._prefix_slots(auxiliary, k_offset)
    distance = self.static.pattern.far_distance
    x, where = shown.x, auxiliary.where
    if isinstance(slots, np.ndarray):
      take = functools.partial(_first, len(slots[0]))
    else:
      take = functools.partial(_take, slots)
    q = None
    if x.position is not None and distance != self.branch.distance:
      q = self.of_queries(shown.queries(distance))
    ids = None
    if where.k_doc is not None:
      ids = take(where.k_doc)
    return Prefix(
      shown.rotate(take(x.k), take(shown.told_keys(distance))),
      take(x.v),
      jnp.broadcast_to(
        jnp.where(exists, slots, contract.NOWHERE), (self.batch, slots.shape[1])
      ),
      q,
      ids,
    )

  def _prefix_slots(self, auxiliary, k_offset):
    """Slots [b, M] of start keys and global keys, and which of them there are.

    Numpy, and plainly the first slots, where that is known.
    """
    first = np.arange(self.start)[None]
    if not self._moving and not self.own_globals:
      return first, True
    offset = jnp.reshape(k_offset, (-1, 1))
    positions, wanted = first, first >= 0
    if self.own_globals:
      tokens = auxiliary.global_tokens
      earlier = np.tri(tokens.shape[1], k=-1, dtype=bool)
      again = (tokens[:, :, None] == tokens[:, None]) & earlier
      # Start keys are there already.
      new = (tokens >= self.start) & ~again.any(-1)
      positions, wanted = (
        jnp.concatenate(
          [jnp.broadcast_to(y, (self.batch, self.start)), more], 1
        )
        for y, more in ((positions, tokens), (wanted, new))
      )
    slots = positions - offset
    exists = wanted & (slots >= 0) & (slots < self.num_keys)
    return jnp.clip(slots, 0, self.num_keys - 1), exists

  def cotangents(self, gradients: Gradients) -> Gradients:
    """Of `differentiable(operands)`, in float32."""
    gradients = jax.tree.map(lambda y: y.astype(jnp.float32), gradients)
    if self.spec.residues is None:
      return gradients
    own = self._own[:, :, None]

    def spread(y):
      return jnp.where(own, y, 0)

    def of_kv_heads(y):
      """Sums over the query heads of each kv head."""
      y = spread(y)
      kv_heads = self._kv.stop - self._kv.start
      return y.reshape(*y.shape[:3], kv_heads, -1, y.shape[-1]).sum(4)

    return Gradients(
      spread(gradients.q), of_kv_heads(gradients.k), of_kv_heads(gradients.v)
    )


def _bounded(side) -> int:
  limit = contract.UNBOUNDED
  return int(max(-limit, min(side, limit)))


def _fit(y, length, fill=0):
  """Axis 1 cut or filled up to the length."""
  missing = length - y.shape[1]
  if missing < 0:
    return y[:, :length]
  if not missing:
    return y
  widths = [(0, 0)] * y.ndim
  widths[1] = (0, missing)
  return jnp.pad(y, widths, constant_values=fill)


def _first(count, y):
  return y[:, :count]


def _take(slots, y):
  """y [b, S, ...] at slots [b, M]."""
  extra = (1,) * (y.ndim - 2)
  return jnp.take_along_axis(y, slots.reshape(*slots.shape, *extra), axis=1)
