"""LongNet's dilated attention (arXiv 2307.02486, sections 2.2 and 2.3), and
how it is evaluated beyond the length it was trained at."""

import dataclasses
import math

import numpy as np

from longjax.patterns.base import Branch, Pattern, as_positions, check_integer
from longjax.patterns.longformer import Full

_OFFSETS = ('paper', 'torchscale')


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
  """A mixture of dilated attentions, one for each (w_i, r_i).

  For (w, r) the sequence is cut into segments of w positions and head j keeps
  the rows u of a segment with u mod r == s_j, as queries and as keys (equations
  3-5 and 13-15). The mixture weighs each part by its softmax denominator
  (equations 9-10), which is one softmax over all parts' keys together: a key
  seen by several parts counts as often as it is seen.

  Attributes:
    segment_lengths: w_i >= 1.
    ratios: r_i, 1 <= r_i <= w_i.
    causal: whether queries see only keys up to themselves.
    offsets: the rule for s_j: 'paper' is j mod r (heads interleaved),
      'torchscale' is j // ceil(H / r) (contiguous groups of heads), as needed
      for weights trained with the torchscale library.
    detach_weights: gradients skip the mixing weights, as in torchscale; False
      is the exact gradient of the softmax.
  """

  segment_lengths: tuple[int, ...]
  ratios: tuple[int, ...]
  causal: bool = True
  offsets: str = 'paper'
  detach_weights: bool = False

  def __post_init__(self):
    lengths, ratios = tuple(self.segment_lengths), tuple(self.ratios)
    object.__setattr__(self, 'segment_lengths', lengths)
    object.__setattr__(self, 'ratios', ratios)
    if len(lengths) != len(ratios) or not ratios:
      raise ValueError(
        'Dilated needs as many ratios as segment lengths, at least one; got '
        f'{len(lengths)} segment lengths {lengths} and {len(ratios)} ratios '
        f'{ratios}'
      )
    for w, r in zip(lengths, ratios, strict=True):
      check_integer('Dilated segment length', w, 1)
      check_integer('Dilated ratio', r, 1)
      if r > w:
        raise ValueError(f'Dilated ratio {r} is above its segment length {w}')
    if self.offsets not in _OFFSETS:
      raise ValueError(
        f'Dilated offsets {self.offsets!r} is not one of {_OFFSETS}'
      )

  @property
  def detached(self) -> bool:
    return self.detach_weights

  def head_offsets(self, ratio: int, num_heads: int) -> tuple[int, ...]:
    """s_j of every head for one ratio, by the chosen rule."""
    if self.offsets == 'paper':
      return tuple(j % ratio for j in range(num_heads))
    group = -(-num_heads // ratio)
    return tuple(j // group for j in range(num_heads))

  def keys_per_query(self, length: float = math.inf) -> float:
    """Sum of w / r^2: keys that a query meets, the mean over heads.

    The paper's count (equation 17), without causal halving: in (w, r) a query
    meets w / r keys, in a share of 1 / r of the heads; no w is above `length`.
    """
    parts = zip(self.segment_lengths, self.ratios, strict=True)
    return sum(min(w, length) / r**2 for w, r in parts)

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    total = 0
    for w, r in zip(self.segment_lengths, self.ratios, strict=True):
      s = np.asarray(self.head_offsets(r, num_heads))[head]
      seen = (q_pos // w == k_pos // w) & (q_pos % w % r == s)
      seen = seen & (k_pos % w % r == s)
      if self.causal:
        seen = seen & (k_pos <= q_pos)
      total = total + seen.astype(np.int32)
    return total

  def branches(self, num_heads):
    return tuple(
      Branch(
        right=0 if self.causal else math.inf,
        stride=r,
        segment=w,
        # With r = 1 every row takes part in every head.
        offsets=self.head_offsets(r, num_heads) if r > 1 else None,
      )
      for w, r in zip(self.segment_lengths, self.ratios, strict=True)
    )

  def reach(self):
    furthest = max(self.segment_lengths) - 1
    return (furthest, 0 if self.causal else furthest)


@dataclasses.dataclass(frozen=True)
class BlockwiseCausal(Pattern):
  """A causal pattern, of which only the query's block and the last are seen.

  Blockwise causal attention (arXiv 2212.10554), with which LongNet and its
  baselines are evaluated beyond the length l that they were trained at:
  positions are cut into blocks of l / 2, and a query sees its own block, up to
  itself, and the block before it. No distance reaches l.

  A `Dilated` pattern stays as it is where each of its segments divides l / 2 or
  is l long: it never shows what lies further back.

  Attributes:
    block: l / 2 >= 1.
    pattern: what the model was trained with.
  """

  block: int
  pattern: Pattern = Full()

  def __post_init__(self):
    check_integer('BlockwiseCausal block', self.block, 1)
    if not isinstance(self.pattern, Pattern) or not self.pattern.causal:
      raise ValueError(
        f'BlockwiseCausal is for causal patterns, got {self.pattern!r}'
      )

  @property
  def causal(self) -> bool:
    return True

  @property
  def detached(self) -> bool:
    return self.pattern.detached

  @property
  def far_distance(self):
    return self.pattern.far_distance

  def check_heads(self, num_heads):
    self.pattern.check_heads(num_heads)

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    near = k_pos // self.block >= q_pos // self.block - 1
    return near * self.pattern.multiplicity(q_pos, k_pos, head, num_heads)

  def distance(self, q_pos, k_pos):
    return self.pattern.distance(q_pos, k_pos)

  def branches(self, num_heads):
    return tuple(
      branch
      if self._within_reach(branch)
      else dataclasses.replace(branch, block=self.block)
      for branch in self.pattern.branches(num_heads)
    )

  def _within_reach(self, branch) -> bool:
    """Whether the branch sees no key that lies further back anyway."""
    inside = not self.block % branch.segment or branch.segment == 2 * self.block
    return inside and not branch.earlier

  def reach(self):
    left, right = self.pattern.reach()
    return (min(left, 2 * self.block - 1), right)
