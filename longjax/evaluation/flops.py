"""How many operations a decoder takes: by the pairs that are seen, and as the
LongNet paper counts them.

A multiplication and the addition of its product are two operations. Norms,
activations and softmaxes are left out, as everywhere.
"""

import dataclasses
import math

import numpy as np

from longjax.patterns import Dilated, Full, Pattern
from longjax.patterns.base import Branch


def visible_pairs(
  pattern: Pattern, length: int, num_heads: int
) -> tuple[int, ...]:
  """For each head, how many (query, key) pairs of a sequence are seen.

  A key that several parts of the pattern show counts as often.
  """
  pairs, known = [0] * num_heads, {}
  for branch in pattern.branches(num_heads):
    heads = range(num_heads) if branch.heads is None else branch.heads
    for number, head in enumerate(heads):
      own = branch.columns or branch.offsets
      own = None if own is None else own[number]
      if (branch, own) not in known:
        known[branch, own] = _count(branch, own, length)
      pairs[head] += known[branch, own]
  return tuple(pairs)


def _count(branch: Branch, own: int | None, length: int) -> int:
  """Pairs that one head sees; `own` is its offset or first column."""
  if branch == Branch(
    right=branch.right,
    segment=branch.segment,
    stride=branch.stride,
    offsets=branch.offsets,
    heads=branch.heads,
  ) and not (branch.offsets is None and branch.stride > 1):
    # Segments, thinned: each has as many pairs as the others.
    def pairs(rows):
      kept = max(0, -(-(rows - (own or 0)) // branch.stride))
      return kept * kept if branch.right else kept * (kept + 1) // 2

    whole = int(min(branch.segment, length))
    if branch.right in (0, math.inf):
      return length // whole * pairs(whole) + pairs(length % whole)
  queries = np.arange(length)
  lo, hi = branch.bounds(queries)
  hi = np.minimum(hi, length - 1)
  if branch.columns is not None:
    # before[j]: how many keys before j are among the columns.
    before = np.cumsum(np.r_[0, branch.in_columns(queries, own)])
    seen = before[np.maximum(hi, -1) + 1] - before[np.minimum(lo, length)]
  else:
    stride = branch.stride
    seen = (hi - queries) // stride + (queries - lo) // stride + 1
  if branch.offsets is not None:
    seen = np.where(branch.residue(queries) == own, seen, 0)
  return int(np.maximum(seen, 0)[lo <= hi].sum())


def paper_keys(pattern: Pattern, length: int) -> float | None:
  """Keys of a query as LongNet counts them (equations 16 and 17), or None.

  sum_i w_i / r_i^2, the mean over heads and rows, without the half that
  causality leaves out; `length` for full attention. Other patterns: None.
  """
  if isinstance(pattern, Full):
    return float(length)
  if isinstance(pattern, Dilated):
    return pattern.keys_per_query(length)
  return None


@dataclasses.dataclass(frozen=True)
class LayerFlops:
  """Operations of one layer in a forward pass over one sequence.

  Attributes:
    projections: of queries, keys, values and the output.
    mlp: its two (gated: three) projections.
    attention: q . k and the sum of values, of the pairs that are seen.
    paper_attention: the same as the paper counts it, None where it does not.
    keys: that a query sees, the mean over heads and rows.
  """

  projections: int
  mlp: int
  attention: int
  paper_attention: float | None
  keys: float

  @property
  def rest(self) -> int:
    return self.projections + self.mlp


@dataclasses.dataclass(frozen=True)
class DecoderFlops:
  """Operations of a forward pass over one sequence.

  Attributes:
    layers: of each layer.
    read_out: of the logits, which the paper leaves out.
  """

  layers: tuple[LayerFlops, ...]
  read_out: int

  @property
  def total(self) -> int:
    return self.read_out + sum(x.rest + x.attention for x in self.layers)

  @property
  def paper_total(self) -> float | None:
    """As in the paper's figure 6; None unless all layers have its count."""
    if any(x.paper_attention is None for x in self.layers):
      return None
    return sum(x.rest + x.paper_attention for x in self.layers)


def decoder_flops(
  length: int,
  *,
  vocab_size: int,
  features: int,
  num_heads: int,
  patterns,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  mlp_features: int | None = None,
  mlp: str = 'gelu',
) -> DecoderFlops:
  """Operations of a `DecoderLM` with these arguments; the backward pass has
  twice as many.

  Args:
    length: of the sequence.
    patterns: one for each layer.
    **others: as of `DecoderLM`.
  """
  head_dim = features // num_heads if head_dim is None else head_dim
  kv_heads = num_heads if num_kv_heads is None else num_kv_heads
  hidden = 4 * features if mlp_features is None else mlp_features
  width = num_heads * head_dim
  matrices = 3 if mlp in ('swiglu', 'geglu') else 2
  projections = 2 * length * features * (2 * width + 2 * kv_heads * head_dim)
  layers, known = [], {}
  for pattern in patterns:
    if pattern not in known:
      pairs = sum(visible_pairs(pattern, length, num_heads))
      keys = paper_keys(pattern, length)
      known[pattern] = LayerFlops(
        projections=projections,
        mlp=2 * length * features * hidden * matrices,
        attention=4 * head_dim * pairs,
        paper_attention=None if keys is None else 4 * width * length * keys,
        keys=pairs / (num_heads * length),
      )
    layers.append(known[pattern])
  return DecoderFlops(tuple(layers), 2 * length * features * vocab_size)


def table(flops: DecoderFlops) -> str:
  """Lines for a person: GFLOP of each layer, equal neighbours together."""
  head = (
    'layer',
    'keys a query',
    'projections',
    'MLP',
    'attention',
    'attention as in the paper',
  )
  rows, groups = [head], []
  for layer in flops.layers:
    if groups and groups[-1][0] == layer:
      groups[-1][1] += 1
    else:
      groups.append([layer, 1])
  first = 1
  for layer, count in groups:
    last = first + count - 1
    rows.append(
      (
        f'{first}' if count == 1 else f'{first}-{last}',
        f'{layer.keys:,.1f}',
        *map(_giga, (layer.projections, layer.mlp, layer.attention)),
        '-' if layer.paper_attention is None else _giga(layer.paper_attention),
      )
    )
    first = last + 1
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(text.rjust(w) for text, w in zip(row, widths, strict=True))
    for row in rows
  )


def _giga(flops: float) -> str:
  return f'{flops / 1e9:,.3f}'
