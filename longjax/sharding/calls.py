"""One attention call of one device, as the sharded paths make several of."""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from longjax.ops.attention import attention
from longjax.patterns import Pattern
from longjax.positions import Position


@dataclasses.dataclass(frozen=True)
class Options:
  """What all calls of one attention share."""

  dropout_rate: float
  scale: float | None
  logit_soft_cap: float | None
  implementation: str | tuple[str, ...] | None

  @property
  def implementations(self) -> tuple[str, ...]:
    """Those that were named."""
    named = self.implementation or ()
    return (named,) if isinstance(named, str) else named


class Dropout(NamedTuple):
  """What names the entries that are dropped.

  Attributes:
    key: None for no dropout.
    first_row: number of the first batch row.
  """

  key: Array | None
  first_row: int | Int[Array, ''] = 0


class Rows(NamedTuple):
  """Neighbouring rows of the sequence.

  Attributes:
    x: arrays [batch, rows, heads, size]: queries, or keys and values.
    first: absolute position of the first one, scalar or [batch]; or of all of
      them, [batch, rows].
    ids: [batch, rows] documents, or None.
  """

  x: tuple[Float[Array, 'B T H D'], ...]
  first: Int[Array, ''] | Int[Array, 'B']
  ids: Int[Array, 'B T'] | None = None

  def cut(self, start, stop):
    """Some of the rows; both ends are plain numbers."""
    part = [y[:, start:stop] for y in self.x]
    ids = None if self.ids is None else self.ids[:, start:stop]
    return Rows(tuple(part), self.first + start, ids)


@dataclasses.dataclass(frozen=True)
class Shard:
  """What a device has, and what it computes of it."""

  options: Options
  axis_name: str
  rows: Rows  # q, k and v
  position: Position | None
  dropout: Dropout
  start: int | None  # position of the whole sequence's first row, if known

  @property
  def length(self) -> int:
    return self.rows.x[0].shape[1]

  @property
  def devices(self) -> int:
    return jax.lax.axis_size(self.axis_name)

  @property
  def queries(self) -> Rows:
    return self.rows._replace(x=self.rows.x[:1])

  @property
  def keys(self) -> Rows:
    return self.rows._replace(x=self.rows.x[1:])

  def attend(self, pattern, queries: Rows, keys: Rows, **more):
    """(out, lse); see `call`."""
    return call(
      self.options,
      pattern,
      queries,
      keys,
      self.position,
      self.dropout,
      **more,
    )


def call(
  options: Options,
  pattern: Pattern,
  queries: Rows,
  keys: Rows,
  position: Position | None,
  dropout: Dropout,
  **more,
):
  """(out, lse) of queries that see these keys by a pattern."""
  ids = None
  if queries.ids is not None:
    ids = (queries.ids, keys.ids)
  return attention(
    *queries.x,
    *keys.x,
    pattern,
    position=position,
    q_positions=queries.first,
    kv_positions=keys.first,
    segment_ids=ids,
    dropout_rate=options.dropout_rate,
    dropout_key=dropout.key,
    dropout_row=dropout.first_row,
    scale=options.scale,
    logit_soft_cap=options.logit_soft_cap,
    implementation=options.implementation,
    return_lse=True,
    **more,
  )
