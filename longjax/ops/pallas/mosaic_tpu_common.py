"""What the Mosaic TPU kernels share: tiles, and arrays as they are read.

Arrays come as [G, heads, R, rows, D] (`rows_inside`), so that a block is some
rows of one head and one residue, chosen by the block's index map. A tile of
logits is [keys, queries]: what is known of each query (lse, delta, ids) then
lies in lanes, [1, queries], and is stored densely.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longjax.ops.pallas import contract
from longjax.ops.pallas.contract import Operands, Spec

LANES = 128
# A tile of 16 rows is whole for every dtype (8 of float32, 16 of bfloat16).
SUBLANES = 16
# Of the scoped VMEM that a kernel gets unasked: 16 MiB on v5e, more on others.
VMEM_BYTES = 16 * 2**20
# The numbers that lead `where` in scalar memory, of 1 MiB in all.
SMEM_BYTES = 512 * 2**10


@dataclasses.dataclass(frozen=True)
class TpuConfig:
  """Rows of queries and of keys in a tile, multiples of 128.

  Shorter sequences get one tile of their own length. step_k: of a tile, so many
  keys are computed with at a time, and only where some query sees one; the code
  that the compiler unrolls is for so many.
  """

  block_q: int
  block_k: int
  step_k: int = 256

  def __post_init__(self):
    for name, rows in dataclasses.asdict(self).items():
      if rows < LANES or rows % LANES:
        raise ValueError(f'{name} must be a multiple of {LANES}, got {rows}')


def default_config(
  spec: Spec, x: Operands, *, backward: bool = False
) -> TpuConfig:
  """Tiles that fit into VMEM.

  A step of the grid has a fixed price, about that of a tile of 256 x 512
  products of head size 128; so tiles are large, and larger yet where the band
  is wide. Of a narrow band's tiles only some steps are computed.
  """
  wide = min(sum(spec.reach), x.k.shape[1]) >= 4096
  config = TpuConfig(512, 1024 if wide else 512)
  while vmem(spec, x, config, backward=backward) > VMEM_BYTES:
    if config.block_k >= config.block_q:
      config = dataclasses.replace(config, block_k=config.block_k // 2)
    else:
      config = dataclasses.replace(config, block_q=config.block_q // 2)
  return config


def vmem(
  spec: Spec, x: Operands, config: TpuConfig, *, backward: bool = False
) -> int:
  """Bytes of VMEM that the kernels of one pass need, at most: an estimate."""
  p = plan(spec, x, config)
  lanes = _round_up(p.size, LANES)
  own_q = x.prefix is not None and x.prefix.q is not None
  rows_k = max(p.block_k, p.block_m)
  queries, keys, prefix = (n * lanes for n in (p.block_q, rows_k, p.block_m))
  # Of blocks there are two, one of them on its way; sums are float32.
  if backward:
    dq = (3 + 2 * own_q) * queries + 2 * (keys + prefix)
    dkv = (2 + own_q) * queries + 4 * keys
    blocks, sums = max(dq, dkv), max((1 + own_q) * queries, 2 * keys)
    kept = 28
  else:
    blocks, sums = (2 + own_q) * queries + 2 * (keys + prefix), queries
    kept = 20
  pairs = max(p.step_k, p.block_m) * _round_up(p.block_q, LANES)
  # What the compiler keeps of a step's logits with every feature, measured.
  # float32 operands become three bfloat16 parts each.
  parts = 0
  if x.q.dtype == jnp.float32:
    parts = 6 * (2 * queries + 2 * keys)
    kept += 18
  bytes_of_blocks = 2 * blocks * x.q.dtype.itemsize
  return bytes_of_blocks + 4 * sums + kept * pairs + parts


def check(spec: Spec, x: Operands):
  """Raises NotImplementedError, with the reason, for what is not served."""
  sequences, _, residues, _, size = x.q.shape
  if x.q.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f'TPUs compute in float32 and bfloat16, not in {x.q.dtype}'
    )
  if x.v.shape[-1] != size:
    raise NotImplementedError(
      f'values must be as wide as keys, got {x.v.shape[-1]} and {size}'
    )
  if size > 256 or size % 8:
    raise NotImplementedError(
      f'the head size must be a multiple of 8 up to 256, got {size}'
    )
  if x.prefix is not None and residues > 1:
    raise NotImplementedError(
      f'prefix keys go with one residue, got {residues}'
    )
  words = sequences * contract.COLUMNS + len(spec.residues or ())
  if 4 * words > SMEM_BYTES:
    raise NotImplementedError(
      f'{sequences} sequences have {4 * words} bytes of numbers, more than '
      f'{SMEM_BYTES} of scalar memory'
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static sizes of a kernel call; counts of tiles, rows in each.

  num_queries and num_keys are those of the operands, before padding.
  """

  spec: Spec
  sequences: int
  residues: int
  heads: int
  kv_heads: int
  size: int
  num_queries: int
  num_keys: int
  num_prefix: int
  block_q: int
  block_k: int
  block_m: int
  step_k: int
  q_tiles: int
  k_tiles: int
  m_tiles: int
  has_ids: bool

  @property
  def group(self) -> int:
    return self.heads // self.kv_heads

  @property
  def classes(self) -> int:
    """C: the residues that each head walks."""
    return self.residues if self.spec.residues is None else 1

  @property
  def key_heads(self) -> int:
    """Heads of the gradients of keys, each walked by `key_share` heads."""
    return self.kv_heads if self.spec.residues is None else self.heads

  @property
  def key_share(self) -> int:
    return self.heads // self.key_heads

  @property
  def key_steps(self) -> int:
    """Tiles of keys that a tile of queries can meet."""
    return self._steps(self.block_q, self.block_k, self.k_tiles)

  @property
  def query_steps(self) -> int:
    """Tiles of queries that a tile of keys can meet."""
    return self._steps(self.block_k, self.block_q, self.q_tiles)

  def _steps(self, own, walked, tiles):
    rows = own + sum(self.spec.reach)
    return max(1, min(tiles, pl.cdiv(rows - 1, walked) + 1))


def plan(spec: Spec, x: Operands, config: TpuConfig) -> Plan:
  sequences, num_queries, residues, heads, size = x.q.shape
  num_keys, kv_heads = x.k.shape[1], x.k.shape[3]
  num_prefix = 0 if x.prefix is None else x.prefix.k.shape[1]
  block_q, q_tiles = _tiles(num_queries, config.block_q)
  block_k, k_tiles = _tiles(num_keys, config.block_k)
  step_k = math.gcd(block_k, config.step_k) if block_k > LANES else block_k
  block_m, m_tiles = _tiles(num_prefix, min(config.step_k, config.block_k))
  return Plan(
    spec=spec,
    sequences=sequences,
    residues=residues,
    heads=heads,
    kv_heads=kv_heads,
    size=size,
    num_queries=num_queries,
    num_keys=num_keys,
    num_prefix=num_prefix,
    block_q=block_q,
    block_k=block_k,
    block_m=block_m,
    step_k=step_k,
    q_tiles=q_tiles,
    k_tiles=k_tiles,
    m_tiles=m_tiles,
    has_ids=x.q_ids is not None,
  )


def _tiles(rows, block):
  """(rows in a tile, tiles): as even as whole lanes allow."""
  if rows <= LANES:
    return _round_up(rows, SUBLANES), min(rows, 1)
  tiles = pl.cdiv(rows, block)
  block = _round_up(pl.cdiv(rows, tiles), LANES)
  return block, pl.cdiv(rows, block)


def _round_up(rows, multiple):
  return pl.cdiv(rows, multiple) * multiple


# --- Arrays as the kernels read them -----------------------------------------


def rows_inside(y, block: int):
  """[G, rows, R, heads, D] -> [G, heads, R, rows padded to blocks, D]."""
  return jnp.transpose(_pad(y, 1, block), (0, 3, 2, 1, 4))


def rows_outside(y, rows: int):
  """[G, heads, C, padded, D] -> [G, rows, C, heads, D]."""
  return jnp.transpose(y[:, :, :, :rows], (0, 3, 2, 1, 4))


def lanes(y, block: int, value=0):
  """[..., rows] -> [..., 1, rows padded to blocks]."""
  return _pad(y, y.ndim - 1, block, value)[..., None, :]


def _pad(y, axis, block, value=0):
  missing = -y.shape[axis] % block
  if not missing:
    return y
  widths = [(0, 0)] * y.ndim
  widths[axis] = (0, missing)
  return jnp.pad(y, widths, constant_values=value)


def inputs(plan: Plan, x: Operands) -> dict[str, jax.Array]:
  """The arrays that every kernel reads, by the names that `call` knows."""
  arrays = dict(
    q=rows_inside(x.q, plan.block_q),
    k=rows_inside(x.k, plan.block_k),
    v=rows_inside(x.v, plan.block_k),
  )
  if plan.has_ids:
    # One number where queries do not see, another where keys are not seen:
    # then all that is left to ask is whether two are equal.
    arrays['q_ids'] = _ids(x.q_ids.swapaxes(1, 2), plan.block_q, -1)
    arrays['k_ids'] = _ids(x.k_ids.swapaxes(1, 2), plan.block_k, -2)
  m = x.prefix
  if m is not None:
    for name, y in (('prefix_k', m.k), ('prefix_v', m.v)):
      arrays[name] = rows_inside(y[:, :, None], plan.block_m)
    arrays['prefix_row'] = lanes(m.row, plan.block_m, contract.NOWHERE)
    if plan.has_ids:
      arrays['prefix_ids'] = _ids(m.ids, plan.block_m, -2)
    if m.q is not None:
      arrays['prefix_q'] = rows_inside(m.q, plan.block_q)
  return arrays


def _ids(ids, block, none):
  return lanes(jnp.where(ids < 0, none, ids).astype(jnp.int32), block, none)
