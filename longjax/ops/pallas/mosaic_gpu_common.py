"""What the Mosaic GPU kernels share: their tiles, and arrays about rows.

A kernel's programs have `groups` compute warpgroups and one memory warpgroup.
Each compute warpgroup owns `own` rows (queries going forward and for dQ, keys
for dK and dV) and all of them walk the same tiles of `walk` rows, which the
memory warpgroup brings into a ring of `stages` slots: `mosaic_gpu_ring`. Which
of them there are, and what is seen of a tile, is in `mosaic_gpu_masks`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as jax_config
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops import dropout
from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Operands, Spec

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# A tile in registers, a number for each of its rows, one for each column.
TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
# Finite, so that a tile of which nothing is seen gives exp2(-inf - it) = 0.
LOWEST = -1e30
# What a program may use on Hopper.
SHARED_MEMORY = 232448
HEAD_SIZES = (32, 64, 96, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16)
# Registers of a thread by number of compute warpgroups: memory, compute. Their
# sum over all warpgroups must not exceed what the launch got (3 * 168 = 504,
# 4 * 128 = 512), else the hardware waits for ever; nothing here checks it.
REGISTERS = {1: None, 2: (24, 240), 3: (32, 160)}


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """Tiles of a kernel.

  Attributes:
    own: rows of a compute warpgroup, a multiple of 64.
    walk: rows of a walked tile, a multiple of 32.
    stages: slots of the ring.
    groups: compute warpgroups.
    p_in_smem: probabilities become operands of a product through shared memory
      and not in registers; always so in the interpreter, which knows no other
      way.
    take_turns: going forward, where there are two compute warpgroups and two
      stages, one uses the tensor cores while the other is at its softmax.
  """

  own: int = 64
  walk: int = 64
  stages: int = 2
  groups: int = 2
  p_in_smem: bool = False
  take_turns: bool = False

  def __post_init__(self):
    for name, multiple in (('own', 64), ('walk', 32), ('stages', 1)):
      value = getattr(self, name)
      if value < multiple or value % multiple:
        raise ValueError(
          f'{name} must be a positive multiple of {multiple}, got {value}'
        )
    if self.groups not in REGISTERS:
      raise ValueError(
        f'groups must be one of {(*REGISTERS,)}, got {self.groups}'
      )

  @property
  def rows(self) -> int:
    """Rows of a program."""
    return self.groups * self.own

  @property
  def alternates(self) -> bool:
    # With one slot they would wait for each other for ever: the first for the
    # next tile, the second for its turn to leave this one.
    return self.take_turns and self.groups == 2 and self.stages > 1


def default_config(head_size: int, *, prefix_q: bool = False) -> GpuConfig:
  """Tiles of the forward kernel, for which ptxas needs no spills.

  Args:
    head_size: one of HEAD_SIZES.
    prefix_q: whether there is a prefix with queries of its own, which take as
      much shared memory again as the queries.
  """
  if head_size == 256:
    return GpuConfig(walk=32 if prefix_q else 64, take_turns=True)
  # Three stages of 128 keys of 128 numbers would be 48 bytes too many.
  stages = 2 if head_size == 128 else 3
  return GpuConfig(walk=128, stages=stages, take_turns=True)


def resolve(config: GpuConfig, interpret: Any) -> GpuConfig:
  """The config that the kernel gets, given its `interpret` argument."""
  forced = jax_config.pallas_tpu_interpret_mode_context_manager.value
  if interpret or forced:
    return dataclasses.replace(config, p_in_smem=True)
  return config


def check(spec: Spec, x: Operands) -> None:
  """Refuses what no kernel here computes.

  Raises:
    NotImplementedError: with the reason.
  """
  sequences, _, residues, heads, size = x.q.shape
  del sequences

  def refuse(reason):
    raise NotImplementedError(reason)

  dtypes = {y.dtype for y in (x.q, x.k, x.v)}
  if x.prefix is not None:
    m = x.prefix
    dtypes |= {y.dtype for y in (m.k, m.v, m.q) if y is not None}
  if len(dtypes) > 1:
    refuse(f'q, k and v have different dtypes: {sorted(map(str, dtypes))}')
  if x.q.dtype not in DTYPES:
    refuse(f'the products are of bfloat16 or float16, not {x.q.dtype}')
  if size not in HEAD_SIZES:
    refuse(f'head size {size} is none of {HEAD_SIZES}')
  if x.v.shape[-1] != size:
    refuse(f'value size {x.v.shape[-1]} differs from head size {size}')
  if heads % x.k.shape[3]:
    refuse(f'{heads} heads are no multiple of {x.k.shape[3]} key heads')
  if heads > 65535:
    refuse(f'{heads} heads are more than the 65535 of a grid')
  if not spec.scale > 0:
    refuse(f'the running maximum needs a positive scale, not {spec.scale}')
  if x.prefix is not None and residues > 1:
    refuse(f'a prefix needs one residue, not {residues}')


# --- What is known of each query and key --------------------------------------


def pad_rows(y, axis: int, multiple: int, value=0):
  """Pads an axis to a multiple."""
  missing = -y.shape[axis] % multiple
  if not missing:
    return y
  widths = [(0, 0)] * y.ndim
  widths[axis] = (0, missing)
  return jnp.pad(y, widths, constant_values=value)


class Notes(NamedTuple):
  """For each row, padded: ids, encoded so that equal ones see each other, and
  dropout's words. None where there is no such feature.

  Of keys [G, R, S]; of prefix keys [G, M]; of queries ids are [G, R, P] and
  words [G, C, H, P].
  """

  ids: jax.Array | None
  words: jax.Array | None


def query_notes(spec: Spec, x: Operands, multiple: int) -> Notes:
  """Notes of the queries, their number padded to a multiple."""
  ids = words = None
  _, num_queries, residues, heads, _ = x.q.shape
  if x.q_ids is not None:
    ids = jnp.where(x.q_ids < 0, -1, x.q_ids).swapaxes(1, 2)
    ids = pad_rows(ids, 2, multiple, -1)
  if spec.dropout_rate:
    if spec.residues is None:
      residue = np.arange(residues)[:, None, None]
    else:
      residue = np.asarray(spec.residues)[:, None]
    row = np.arange(num_queries) * residues + residue
    words = dropout.query_words(
      x.seed,
      _column(x, contract.BATCH_ROW, 4),
      _column(x, contract.FIRST_HEAD, 4) + np.arange(heads)[:, None],
      _column(x, contract.Q_POSITION, 4) + row,
    )
    words = pad_rows(words, 3, multiple)
  return Notes(ids, words)


def key_notes(spec: Spec, x: Operands, multiple: int) -> Notes:
  """Notes of the keys, their number padded to a multiple."""
  ids = words = None
  _, num_keys, residues, _, _ = x.k.shape
  if x.k_ids is not None:
    ids = jnp.where(x.k_ids < 0, -2, x.k_ids).swapaxes(1, 2)
    ids = pad_rows(ids, 2, multiple, -2)
  if spec.dropout_rate:
    row = np.arange(num_keys) * residues + np.arange(residues)[:, None]
    position = _column(x, contract.K_POSITION, 3) + row
    words = pad_rows(dropout.key_words(x.seed, position), 2, multiple)
  return Notes(ids, words)


def prefix_notes(spec: Spec, x: Operands, multiple: int):
  """(rows [G, M], notes) of the prefix keys, padded to a multiple."""
  m = x.prefix
  ids = words = None
  if m.ids is not None:
    ids = pad_rows(jnp.where(m.ids < 0, -2, m.ids), 1, multiple, -2)
  if spec.dropout_rate:
    position = _column(x, contract.K_POSITION, 2) + m.row
    words = pad_rows(dropout.key_words(x.seed, position), 1, multiple)
  return pad_rows(m.row, 1, multiple, contract.NOWHERE), Notes(ids, words)


def _column(x, number, rank):
  return x.where[:, number].reshape(-1, *[1] * (rank - 1))
