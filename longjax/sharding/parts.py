"""Parts of a pattern, as patterns: what one device computes at a time."""

import dataclasses
import math

import numpy as np

from longjax.patterns import TRUE_DISTANCE, Branch, Pattern
from longjax.patterns.base import as_positions, numpy_of


@dataclasses.dataclass(frozen=True)
class Branches(Pattern):
  """Some branches of a pattern, as a pattern of their own."""

  parts: tuple[Branch, ...]
  of: Pattern

  @property
  def causal(self) -> bool:
    return self.of.causal

  @property
  def detached(self) -> bool:
    return self.of.detached

  def check_heads(self, num_heads):
    self.of.check_heads(num_heads)

  def branches(self, num_heads):
    return self.parts

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    head, total = np.asarray(head), 0
    for part in self.parts:
      own = part.offsets or part.columns
      heads = part.heads or range(num_heads)
      # A head that the branch is not of has no own rows; any will do.
      place = np.zeros(num_heads, int)
      place[list(heads)] = np.arange(len(heads))
      of_head = None if own is None else np.asarray(own)[place[head]]
      seen = part.sees(q_pos, k_pos, of_head) & np.isin(head, list(heads))
      total = total + seen.astype(np.int32)
    return total

  def distance(self, q_pos, k_pos):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    told = q_pos - k_pos
    for part in self.parts:
      if part.distance != TRUE_DISTANCE:
        lo, hi = part.bounds(q_pos)
        other = part.distance.queries(q_pos) - part.distance.keys(k_pos)
        inside = (lo <= k_pos) & (k_pos <= hi)
        told = numpy_of(told).where(inside, other, told)
    return told

  def reach(self):
    sides = [(0, 0)]
    for part in self.parts:
      if part.start == math.inf or part.right > 0:
        step = part.stride * part.distance.step
        sides.append(tuple(side * step for side in part.steps()))
    return tuple(max(side) for side in zip(*sides, strict=True))


@dataclasses.dataclass(frozen=True)
class GlobalsOnly(Pattern):
  """No keys but `global_tokens`, less those that a pattern shows anyway."""

  of: Pattern

  @property
  def causal(self) -> bool:
    return self.of.causal

  @property
  def far_distance(self):
    return self.of.far_distance

  def check_heads(self, num_heads):
    self.of.check_heads(num_heads)

  def branches(self, num_heads):
    del num_heads
    return ()

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    return self.of.multiplicity(q_pos, k_pos, head, num_heads)

  def distance(self, q_pos, k_pos):
    return self.of.distance(q_pos, k_pos)

  def reach(self):
    return (0, 0)


@dataclasses.dataclass(frozen=True)
class SomeHeads(Pattern):
  """A pattern as some of its heads have it, numbered anew from 0."""

  of: Pattern
  heads: tuple[int, ...]
  num_heads: int  # of the whole pattern

  @property
  def causal(self) -> bool:
    return self.of.causal

  @property
  def detached(self) -> bool:
    return self.of.detached

  @property
  def far_distance(self):
    return self.of.far_distance

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    head = np.asarray(self.heads)[np.asarray(head)]
    return self.of.multiplicity(q_pos, k_pos, head, self.num_heads)

  def distance(self, q_pos, k_pos):
    return self.of.distance(q_pos, k_pos)

  def branches(self, num_heads):
    del num_heads
    parts = (self._of(part) for part in self.of.branches(self.num_heads))
    return tuple(part for part in parts if part is not None)

  def _of(self, branch):
    theirs = branch.heads or tuple(range(self.num_heads))
    mine = [head for head in self.heads if head in theirs]
    if not mine:
      return None

    def pick(values):
      if values is None:
        return None
      return tuple(values[theirs.index(head)] for head in mine)

    numbers = tuple(self.heads.index(head) for head in mine)
    return dataclasses.replace(
      branch,
      heads=None if len(mine) == len(self.heads) else numbers,
      offsets=pick(branch.offsets),
      columns=pick(branch.columns),
    )

  def reach(self):
    return self.of.reach()


def share_of_heads(pattern: Pattern, num_heads: int, shares: int) -> SomeHeads:
  """The pattern of each of `shares` equal runs of heads.

  Raises:
    NotImplementedError: where they differ, so that devices would run different
      programs.
    ValueError: where `shares` does not divide the heads.
  """
  if num_heads % shares:
    raise ValueError(f'{num_heads} heads cannot be split over {shares} devices')
  size = num_heads // shares
  first, *others = (
    SomeHeads(pattern, tuple(range(start, start + size)), num_heads)
    for start in range(0, num_heads, size)
  )
  for other in others:
    if other.branches(size) != first.branches(size):
      raise NotImplementedError(
        f'{pattern} differs between heads {first.heads} and {other.heads}, '
        'which are to be on different devices'
      )
  return first
