"""Longformer's sliding and dilated windows (arXiv 2004.05150, section 3.1)."""

import dataclasses
import math

import numpy as np

from longjax.patterns.base import Branch, Pattern, as_positions, check_integer


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Pattern):
  """Keys i - left * d, ..., i, ..., i + right * d in steps of the dilation d.

  `left` and `right` count the keys strictly on either side of the query, so
  left + right + 1 keys are seen: Longformer's two-sided window of total width
  w is SlidingWindow(w // 2, w // 2).

  Attributes:
    left, right: keys seen before and after self, >= 0; math.inf for all.
    dilation: d >= 1, one for all heads or a tuple with one per head. The paper
      prints dilation as the number of skipped tokens: its 0 is our 1.
  """

  left: float
  right: float = 0
  dilation: int | tuple[int, ...] = 1

  def __post_init__(self):
    check_integer('SlidingWindow left', self.left, 0, allow_inf=True)
    check_integer('SlidingWindow right', self.right, 0, allow_inf=True)
    if isinstance(self.dilation, list):
      object.__setattr__(self, 'dilation', tuple(self.dilation))
    for d in self._dilations or (self.dilation,):
      check_integer('SlidingWindow dilation', d, 1)

  @classmethod
  def from_hf(cls, attention_window: int, *, causal=False, dilation=1):
    """From Hugging Face's `attention_window`, the even two-sided total.

    Hugging Face's 512 is 256 keys on each side (and self); the original
    release of the paper's code counts one side only: its 256 is the same.
    """
    check_integer('attention_window', attention_window, 2)
    if attention_window % 2:
      raise ValueError(
        f'attention_window counts both sides and must be even, got '
        f'{attention_window}'
      )
    side = attention_window // 2
    return cls(side, 0 if causal else side, dilation)

  @classmethod
  def from_flash(cls, window_size: tuple[int, int]):
    """From flash-attention's `window_size` (left, right), -1 for no bound."""
    left, right = (math.inf if side == -1 else side for side in window_size)
    return cls(left, right)

  @property
  def _dilations(self) -> tuple[int, ...]:
    return self.dilation if isinstance(self.dilation, tuple) else ()

  @property
  def causal(self) -> bool:
    return self.right == 0

  def check_heads(self, num_heads):
    if self._dilations and len(self._dilations) != num_heads:
      raise ValueError(
        f'SlidingWindow has {len(self._dilations)} dilations '
        f'{self._dilations} for {num_heads} heads: give one per head'
      )

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    self.check_heads(num_heads)
    d = np.asarray(self._dilations)[head] if self._dilations else self.dilation
    difference = as_positions(q_pos) - as_positions(k_pos)
    seen = difference % d == 0
    if self.left != math.inf:
      seen = seen & (difference <= self.left * d)
    if self.right != math.inf:
      seen = seen & (-difference <= self.right * d)
    return seen.astype(np.int32)

  def branches(self, num_heads):
    self.check_heads(num_heads)
    if not self._dilations:
      return (Branch(self.left, self.right, stride=self.dilation),)
    return tuple(
      Branch(
        self.left,
        self.right,
        stride=d,
        heads=tuple(h for h, own in enumerate(self._dilations) if own == d),
      )
      for d in sorted(set(self._dilations))
    )

  def reach(self):
    furthest = max(self._dilations or (self.dilation,))
    # 0 * inf is nan: a side of no keys reaches nowhere.
    return tuple(s * furthest if s else 0 for s in (self.left, self.right))


@dataclasses.dataclass(frozen=True)
class Full(Pattern):
  """Every key (up to and including the query itself when `causal`)."""

  causal: bool = True

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    difference = as_positions(q_pos) - as_positions(k_pos)
    # The head joins only for its shape.
    seen = (difference >= 0) | (not self.causal) & (np.asarray(head) >= 0)
    return seen.astype(np.int32)

  def branches(self, num_heads):
    return (Branch(right=0 if self.causal else math.inf),)

  def reach(self):
    return (math.inf, 0 if self.causal else math.inf)
