"""The Sparse Transformer's fixed pattern (arXiv 1904.10509, section 4.3).

The baseline that LongNet is compared with in its tables.
"""

import dataclasses
import math

import numpy as np

from longjax.patterns.base import Branch, Pattern, as_positions, check_integer
from longjax.patterns.longnet import Dilated


@dataclasses.dataclass(frozen=True)
class FixedSparse(Pattern):
  """A query's own block, and a few keys of every block before it.

  Positions are cut into blocks of length l. A query sees the keys of its own
  block up to itself (the paper's A1), and of each earlier block the `summary`
  keys of one sub-block (its A2). Heads take distinct sub-blocks, the first head
  the last one of a block, and begin anew where sub-blocks run out.

  One query sees l + (i / l) c keys at most, so that the cost grows with the
  square of the length, divided by l / c.

  Attributes:
    block: l >= 1.
    summary: c, 1 <= c <= l.
  """

  block: int
  summary: int

  def __post_init__(self):
    check_integer('FixedSparse block', self.block, 1)
    check_integer('FixedSparse summary', self.summary, 1)
    if self.summary > self.block:
      raise ValueError(
        f'FixedSparse summary {self.summary} is above its block {self.block}'
      )

  @classmethod
  def matching(cls, dilated: Dilated, length: int, block: int = 2048):
    """The pattern of about the same cost at a length, in LongNet's accounting.

    A query meets `Dilated.keys_per_query` there, and block + (length / block) c
    here.

    Raises:
      ValueError: where no c from 1 to block makes them equal.
    """
    check_integer('length', length, 1)
    check_integer('FixedSparse block', block, 1)
    keys = dilated.keys_per_query(length)
    summary = round((keys - min(block, length)) * block / length)
    if not 1 <= summary <= block:
      raise ValueError(
        f'{dilated} has {keys:.0f} keys a query at length {length}: with '
        f'blocks of {block} that takes a summary of {summary}, not one of '
        f'1 ... {block}'
      )
    return cls(block, summary)

  @property
  def causal(self) -> bool:
    return True

  def columns(self, num_heads: int) -> tuple[int, ...]:
    """Where in a block each head's sub-block begins."""
    sub_blocks = self.block // self.summary
    return tuple(
      self.block - self.summary * (1 + head % sub_blocks)
      for head in range(num_heads)
    )

  def multiplicity(self, q_pos, k_pos, head, num_heads):
    q_pos, k_pos = as_positions(q_pos), as_positions(k_pos)
    first = np.asarray(self.columns(num_heads))[head]
    within = k_pos % self.block - first
    own = (q_pos // self.block == k_pos // self.block) & (k_pos <= q_pos)
    summary = (within >= 0) & (within < self.summary)
    summary = summary & (k_pos // self.block < q_pos // self.block)
    return (own | summary).astype(np.int32)

  def branches(self, num_heads):
    return (
      Branch(right=0, segment=self.block),
      Branch(
        segment=self.block,
        earlier=True,
        columns=self.columns(num_heads),
        width=self.summary,
      ),
    )

  def reach(self):
    return (math.inf, 0)
