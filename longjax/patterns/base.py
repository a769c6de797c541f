"""The two ideas of the room: patterns and the branches they are sums of.

For one head, let c(i, j) in {0, 1, 2, ...} be how often query i sees key j.
A `Pattern` says what c is (`multiplicity`) and which distance the position
scheme is told (`distance`); these two are the definition. A pattern is also a
sum of `Branch`es, each simple enough to be computed without a mask over the
whole length: c(i, j) is the number of branches in which i sees j.

All functions take integer positions as numpy or jax arrays (or ints) and
broadcast them. Everything here is static: frozen, hashable, no arrays inside.
"""

import dataclasses
import math
import numbers

import jax
import numpy as np
from jaxtyping import Bool, Int

Array = jax.Array | np.ndarray

# Bounds of visible key positions; one less than the int32 limit, so that the
# limit itself can stand for "no key here".
FURTHEST = 2**31 - 2
# Positions go up to 2**30, so that adding a bound of this size cannot overflow.
_LONGEST = 2**30 - 2


def check_integer(name: str, value, least: int, *, allow_inf: bool = False):
  """Raises ValueError unless `value` is a whole number >= `least`."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if allow_inf and value == math.inf:
    return
  if not whole or value < least:
    or_inf = ' or math.inf' if allow_inf else ''
    raise ValueError(
      f'{name} must be a whole number >= {least}{or_inf}, got {value!r}'
    )


def as_positions(x) -> Int[Array, '...']:
  return x if hasattr(x, 'dtype') else np.asarray(x, np.int32)


def numpy_of(x):
  """numpy for numpy arrays (pictures, tests), jax.numpy for jax arrays."""
  return np if isinstance(x, np.ndarray | np.generic) else jax.numpy


@dataclasses.dataclass(frozen=True)
class TrueDistance:
  """Positions are told as they are: distance = query - key."""

  affine = True
  step = 1  # What is told of neighbours differs by so much at most.

  def largest(self, span):
    """The largest distance told of pairs that are at most `span` apart."""
    return span

  def queries(self, positions):
    return positions

  def keys(self, positions):
    return positions


@dataclasses.dataclass(frozen=True)
class CappedDistance:
  """Every pair is told the one distance `cap` (LM-Infinite's ceiling).

  The query is told position `cap` and the key position 0.
  """

  cap: int
  affine = False
  step = 1

  def largest(self, span):
    return min(self.cap, span)

  def queries(self, positions):
    return 0 * positions + self.cap

  def keys(self, positions):
    return 0 * positions


@dataclasses.dataclass(frozen=True)
class CacheDistance:
  """StreamingLLM's: positions in a cache that holds `cache` keys.

  The newest query there is never told a position beyond the last slot's, and
  the first keys keep theirs.
  """

  cache: int
  affine = False
  step = 1

  def largest(self, span):
    return min(self.cache - 1, span)

  def queries(self, positions):
    last = self.cache - 1
    return numpy_of(as_positions(positions)).minimum(positions, last)

  def keys(self, positions):
    return positions


@dataclasses.dataclass(frozen=True)
class GroupedDistance:
  """Self-Extend: floor-divided positions, continuous at distance `window`."""

  group: int
  window: int
  affine = False
  step = 1

  def largest(self, span):
    # Of two pairs as far apart, rounding may tell one a distance more.
    return min(self.queries(span), span) + 1

  def queries(self, positions):
    return positions // self.group + self.window - self.window // self.group

  def keys(self, positions):
    return positions // self.group


@dataclasses.dataclass(frozen=True)
class StridedDistance:
  """Rows are numbered `step` positions apart: what is left of a sequence once
  it is thinned, as devices exchange it."""

  step: int
  affine = False

  def largest(self, span):
    return self.step * span

  def queries(self, positions):
    return positions * self.step

  def keys(self, positions):
    return positions * self.step


Distance = (
  TrueDistance
  | CappedDistance
  | CacheDistance
  | GroupedDistance
  | StridedDistance
)
TRUE_DISTANCE = TrueDistance()


@dataclasses.dataclass(frozen=True)
class Branch:
  """One simple part of a pattern: a view, an interval, heads, a distance.

  Query i sees key j when all of these hold:

  * view: i and j are congruent modulo `stride`; with `offsets`, both lie on
    the rows (position mod segment) mod stride == offsets[head]; with `columns`,
    columns[head] <= j mod segment < columns[head] + width.
  * interval: i - left * stride <= j <= i + right * stride, j < start,
    i // segment == j // segment (j // segment < i // segment, if `earlier`) and
    j // block >= i // block - 1.

  `left` and `right` count steps of `stride`. Both ends of the interval grow
  with i, which is all that a blocked implementation needs.

  Attributes:
    left, right: steps seen to either side; math.inf for no bound.
    stride: the dilation.
    start: only the first `start` positions are seen.
    segment: queries and keys must lie in the same segment of this length.
    earlier: keys must lie in an earlier segment than the query, instead.
    block: keys lie in the query's block of this length or the one before it,
      or after them.
    offsets: per head of the branch, which rows of a segment take part; None
      for all residue classes.
    columns: per head of the branch, the first of the `width` neighbouring keys
      of each segment that take part; None for all. Not with a stride.
    heads: global numbers of the heads that have this branch; None for all.
    distance: what the position scheme is told.
  """

  left: float = math.inf
  right: float = math.inf
  stride: int = 1
  start: float = math.inf
  segment: float = math.inf
  earlier: bool = False
  block: float = math.inf
  offsets: tuple[int, ...] | None = None
  columns: tuple[int, ...] | None = None
  width: int = 0
  heads: tuple[int, ...] | None = None
  distance: Distance = TRUE_DISTANCE

  def bounds(self, q_pos):
    """Inclusive bounds (lo, hi) of the key positions in the interval."""
    q_pos = as_positions(q_pos)
    xp = numpy_of(q_pos)
    lo, hi = 0 * q_pos, 0 * q_pos + FURTHEST
    if self.left != math.inf:
      lo = xp.maximum(lo, q_pos - min(self.left * self.stride, _LONGEST))
    if self.right != math.inf:
      hi = xp.minimum(hi, q_pos + min(self.right * self.stride, _LONGEST))
    if self.start != math.inf:
      hi = xp.minimum(hi, self.start - 1)
    if self.segment != math.inf:
      first = q_pos // self.segment * self.segment
      if self.earlier:
        hi = xp.minimum(hi, first - 1)
      else:
        lo = xp.maximum(lo, first)
        hi = xp.minimum(hi, first + self.segment - 1)
    if self.block != math.inf:
      lo = xp.maximum(lo, (q_pos // self.block - 1) * self.block)
    return lo, hi

  def steps(self) -> tuple[float, float]:
    """Furthest steps of `stride` seen to the left and to the right."""
    inside = math.inf if self.earlier else self.segment - 1
    behind = min(inside, 2 * self.block - 1)
    return tuple(
      side if limit == math.inf else min(side, limit // self.stride)
      for side, limit in ((self.left, behind), (self.right, inside))
    )

  def residue(self, pos):
    """What must be equal, besides the interval, for i to see j."""
    pos = as_positions(pos)
    if self.offsets is None:
      return pos % self.stride
    return (pos % self.segment) % self.stride

  def in_columns(self, k_pos, column) -> Bool[Array, '...']:
    """Whether keys lie in the columns that begin at `column`."""
    within = as_positions(k_pos) % self.segment
    return (column <= within) & (within < column + self.width)

  def sees(self, q_pos, k_pos, own=None) -> Bool[Array, '...']:
    """Whether queries see keys; `own` is the head's of offsets or columns."""
    lo, hi = self.bounds(q_pos)
    residue = self.residue(q_pos)
    seen = (lo <= k_pos) & (k_pos <= hi) & (residue == self.residue(k_pos))
    if self.offsets is not None:
      seen = seen & (residue == own)
    if self.columns is not None:
      seen = seen & self.in_columns(k_pos, own)
    return seen


class Pattern:
  """Base class of the patterns; see the module's docstring."""

  @property
  def causal(self) -> bool:
    """Whether no query sees a key after itself."""
    raise NotImplementedError

  @property
  def detached(self) -> bool:
    """Whether gradients skip the weights that mix the branches."""
    return False

  @property
  def far_distance(self):
    """What a key that only `global_tokens` make visible is told."""
    return TRUE_DISTANCE

  def check_heads(self, num_heads: int):
    """Raises ValueError if the pattern cannot serve `num_heads` heads."""

  def multiplicity(
    self, q_pos, k_pos, head, num_heads: int
  ) -> Int[Array, '...']:
    """How often query i sees key j: the definition.

    Args:
      q_pos, k_pos: absolute positions, whole numbers >= 0, broadcastable.
      head: head number(s), an int or a numpy array broadcastable with them.
      num_heads: how many heads there are.
    """
    raise NotImplementedError

  def distance(self, q_pos, k_pos) -> Int[Array, '...']:
    """The distance that the position scheme is told for a pair."""
    return as_positions(q_pos) - as_positions(k_pos)

  def branches(self, num_heads: int) -> tuple[Branch, ...]:
    """Branches whose indicators sum to `multiplicity`."""
    raise NotImplementedError

  def reach(self) -> tuple[float, float]:
    """Furthest positions (left, right) seen, over heads.

    Start and global keys do not count; math.inf where there is no bound.
    """
    raise NotImplementedError

  def draw(self, length: int, **kwargs):
    """Draws `multiplicity` over `length` positions; see `patterns.draw`."""
    from longjax.patterns import draw  # matplotlib is needed only here

    return draw.draw(self, length, **kwargs)
