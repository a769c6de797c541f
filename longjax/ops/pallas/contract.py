"""What a band kernel computes: one contract for every Pallas backend.

The arrays hold G independent sequences (batch rows, or batch rows times
segments), each of P query rows and S key rows of R residues: position
a * R + c of a sequence is row a of residue c. That is a plain reshape of
[batch, length, heads, head size], so dilation and LongNet's thinning are
addressing, and nothing is copied:

    q [G, P, R, H, D]    k, v [G, S, R, K, D]

A query of residue c meets keys of residue c only. Every head walks all R
residues, C = R (dilation), unless `residues` names one for each head, C = 1
(thinning): results are then compact,

    out [G, P, C, H, D]    lse [G, C, H, P]

and rows that were not selected do not occur in them.

Query row a sees key row b of its sequence g where

    -right <= a + shift - b <= left  and  begin <= b < end

with the five numbers in row g of `where`, which may be traced: one compiled
kernel serves layers of all windows, and shards. Segment ids, where given, must
be equal and not negative as well. A prefix adds M more keys to the same
softmax, which every query sees but for those in its band.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

# Columns of `where`. All are in rows, but for the positions.
LEFT, RIGHT, SHIFT, BEGIN, END = range(5)
# Absolute positions of query and key row 0 of residue 0, the batch row, and
# the number of head 0: what dropout hashes.
Q_POSITION, K_POSITION, BATCH_ROW, FIRST_HEAD = range(5, 9)
COLUMNS = 9

# For `left` and `right` without a bound; for prefix keys that do not exist.
UNBOUNDED = 2**30
NOWHERE = -(2**30)


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part.

  Attributes:
    scale: of the products q . k.
    soft_cap: c in c * tanh(logit / c), or None.
    dropout_rate: share of the weights dropped (on the numerator only).
    reach: (left, right), upper bounds of all `left` and `right` in `where`;
      UNBOUNDED if unknown. Bounds the grid where that must be static.
    residues: one for each query head, or None for all R.
    prefix_causal: queries see no prefix key after themselves.
  """

  scale: float
  soft_cap: float | None = None
  dropout_rate: float = 0.0
  reach: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
  residues: tuple[int, ...] | None = None
  prefix_causal: bool = True


class Prefix(NamedTuple):
  """M extra keys per sequence; only with R = 1.

  Attributes:
    q: the queries as the prefix keys meet them (LM-Infinite rotates them to
      the distance ceiling), or None if they meet them as they meet the band.
    row: where each key would stand among the key rows (it need not be there):
      seen by query row a unless the band sees it there (interval, `begin` and
      `end`), and, if prefix_causal, where row <= a + shift. NOWHERE: no key.
    ids: segment ids of the keys; given exactly where the operands have them.
  """

  k: Float[Array, 'G M K D']
  v: Float[Array, 'G M K D']
  row: Int[Array, 'G M']
  q: Float[Array, 'G P 1 H D'] | None = None
  ids: Int[Array, 'G M'] | None = None


class Operands(NamedTuple):
  """The traced part; H is a multiple of K (GQA).

  where: the columns above, one row for each sequence. seed: two words, where
  there is dropout.
  """

  q: Float[Array, 'G P R H D']
  k: Float[Array, 'G S R K D']
  v: Float[Array, 'G S R K D']
  where: Int[Array, 'G 9']
  q_ids: Int[Array, 'G P R'] | None = None
  k_ids: Int[Array, 'G S R'] | None = None
  seed: UInt32[Array, '2'] | None = None
  prefix: Prefix | None = None


class Gradients(NamedTuple):
  """Cotangents, in the dtype of q (those of the prefix keys in float32).

  With `residues`, rows are compact (C = 1) and k, v have a head for each query
  head: heads of one group may select different rows.
  """

  q: Float[Array, 'G P C H D']
  k: Float[Array, 'G S C K D']
  v: Float[Array, 'G S C K D']
  prefix_q: Float[Array, 'G P 1 H D'] | None = None
  prefix_k: Float[Array, 'G M K D'] | None = None
  prefix_v: Float[Array, 'G M K D'] | None = None


def where_rows(
  sequences: int,
  *,
  left=UNBOUNDED,
  right=0,
  shift=0,
  begin=0,
  end=UNBOUNDED,
  q_position=0,
  k_position=0,
  batch_row=0,
  first_head=0,
) -> Int[Array, 'G 9']:
  """`where` from scalars or arrays [G]."""
  columns = (
    left,
    right,
    shift,
    begin,
    end,
    q_position,
    k_position,
    batch_row,
    first_head,
  )
  return jnp.stack(
    [
      jnp.broadcast_to(jnp.asarray(c, jnp.int32), (sequences,)) for c in columns
    ],
    axis=1,
  )


# Every backend module has these three functions. `lse` and `delta` of the
# backward pass are [G, C, H, P] float32 of the *final* result (into which this
# band may have been merged), delta = rowsum(dout * out) - dlse; a row with
# lse +inf gets and gives no gradient. dout, like q, is [G, P, R, H, D].
#
#   check(spec, x)                              NotImplementedError(reason)
#   forward(spec, x, *, config, interpret)   -> (out, lse)
#   backward(spec, x, lse, delta, dout, *, configs, interpret) -> Gradients
#
# Rows that see nothing: out 0, lse -inf.
