"""Tables of tiles, defaults where there is none, and what does not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from longjax.ops import mosaic_gpu, mosaic_tpu
from longjax.ops.pallas import contract, tiling
from longjax.ops.pallas.mosaic_gpu_common import (
  HEAD_SIZES,
  SHARED_MEMORY,
  GpuConfig,
)
from longjax.ops.pallas.mosaic_tpu_common import VMEM_BYTES, TpuConfig

GPU, TPU = mosaic_gpu.TILES, mosaic_tpu.TILES
KIND = 'NVIDIA H200'


def operands(
  size=64,
  dtype=jnp.bfloat16,
  *,
  ids=False,
  prefix=False,
  prefix_q=False,
  length=4096,
  residues=1,
):
  """Shapes of Operands: nothing is computed."""

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype)

  def integers(*shape):
    return array(*shape, dtype=jnp.int32)

  rows = array(2, length, residues, 8, size)
  keys = array(2, length, residues, 2, size)
  x = contract.Operands(rows, keys, keys, integers(2, contract.COLUMNS))
  if ids:
    numbers = integers(2, length, residues)
    x = x._replace(q_ids=numbers, k_ids=numbers)
  if prefix or prefix_q:
    few = array(2, 10, 2, size)
    x = x._replace(
      prefix=contract.Prefix(
        few,
        few,
        integers(2, 10),
        rows if prefix_q else None,
        integers(2, 10) if ids else None,
      )
    )
  return x


SPEC = contract.Spec(scale=1.0)


def entry(kernel='forward', **more):
  fields = dict(
    kernel=kernel,
    head_size=64,
    prefix_q=False,
    featured=False,
    residues=False,
    config=dict(walk=96, stages=3),
    times=[[dict(walk=96, stages=3), 12.5], [dict(walk=128), 'spills']],
  )
  return {**fields, **more}


@pytest.fixture
def ship(tmp_path, monkeypatch):
  """Writes a table where the package's are looked for."""
  monkeypatch.setattr(tiling, '_FOLDER', tmp_path)
  tiling.table.cache_clear()

  def write(*entries, kind=KIND):
    table = {'device': kind, 'tiles': list(entries)}
    tiling.path_of(kind).write_text(json.dumps(table))
    tiling.table.cache_clear()

  yield write
  tiling.table.cache_clear()


def test_without_a_table_the_backend_chooses(ship):
  x = operands()
  for kind in (None, KIND):
    for tiles in (GPU, TPU):
      for kernel in tiling.KERNELS:
        config = tiling.config_for(tiles, kind, kernel, SPEC, x)
        assert config == tiles.default(kernel, SPEC, x)
        assert isinstance(config, tiles.config)


def test_measured_tiles_come_before_the_default(ship):
  ship(entry(), entry('dkv', config=dict(walk=32)))
  x = operands()
  for kernel, wanted in (
    ('forward', GpuConfig(walk=96, stages=3)),
    ('dkv', GpuConfig(walk=32)),
    ('dq', GPU.default('dq', SPEC, x)),
  ):
    assert tiling.config_for(GPU, KIND, kernel, SPEC, x) == wanted
  # Another device has a table of its own.
  other = tiling.config_for(GPU, 'NVIDIA H100', 'forward', SPEC, x)
  assert other == GPU.default('forward', SPEC, x)


@pytest.mark.parametrize(
  ('features', 'spec', 'x'),
  [
    (dict(head_size=128), SPEC, operands(128)),
    (dict(featured=True), SPEC, operands(ids=True)),
    (
      dict(featured=True),
      dataclasses.replace(SPEC, dropout_rate=0.1),
      operands(),
    ),
    (dict(prefix_q=True), SPEC, operands(prefix_q=True)),
    (
      dict(residues=True),
      dataclasses.replace(SPEC, residues=(0,) * 8),
      operands(residues=2),
    ),
    (dict(dtype='float16'), SPEC, operands(dtype=jnp.float16)),
  ],
)
def test_an_entry_is_for_one_kind_of_call(ship, features, spec, x):
  ship(entry(**features))
  wanted = GpuConfig(walk=96, stages=3)
  assert tiling.config_for(GPU, KIND, 'forward', spec, x) == wanted
  plain = operands()
  default = GPU.default('forward', SPEC, plain)
  assert tiling.config_for(GPU, KIND, 'forward', SPEC, plain) == default


def test_a_dtype_of_its_own_comes_first(ship):
  ship(
    entry(config=dict(block_q=256, block_k=256)),
    entry(config=dict(block_q=128, block_k=128), dtype='float32'),
  )
  for dtype, rows in ((jnp.bfloat16, 256), (jnp.float32, 128)):
    config = tiling.config_for(
      TPU, KIND, 'forward', SPEC, operands(dtype=dtype)
    )
    assert config == TpuConfig(rows, rows)


@pytest.mark.parametrize(
  ('tiles', 'too_large'),
  [
    (GPU, dict(own=128, walk=256, stages=6, groups=3)),
    (TPU, dict(block_q=4096, block_k=2048)),
  ],
)
def test_tiles_that_do_not_fit_are_made_smaller(ship, tiles, too_large):
  x = operands(128, prefix_q=True)
  for kernel in tiling.KERNELS:
    ship(entry(kernel, head_size=128, prefix_q=True, config=too_large))
    large = tiles.config(**too_large)
    assert tiles.memory(kernel, SPEC, x, large) > tiles.capacity
    config = tiling.config_for(tiles, KIND, kernel, SPEC, x)
    assert tiles.memory(kernel, SPEC, x, config) <= tiles.capacity
    assert config != large


def test_where_nothing_fits_is_a_refusal(ship):
  small = dataclasses.replace(GPU, capacity=1000)
  with pytest.raises(NotImplementedError, match='and there are 1000'):
    tiling.config_for(small, None, 'dq', SPEC, operands())


@pytest.mark.parametrize('size', HEAD_SIZES)
@pytest.mark.parametrize('ids', [False, True])
@pytest.mark.parametrize('prefix', [{}, dict(prefix=True), dict(prefix_q=True)])
def test_defaults_fit_unchanged(size, ids, prefix):
  spec = dataclasses.replace(SPEC, dropout_rate=0.1 * ids)
  x = operands(size, ids=ids, **prefix)
  for tiles, capacity in ((GPU, SHARED_MEMORY), (TPU, VMEM_BYTES)):
    assert tiles.capacity == capacity
    for kernel in tiling.KERNELS:
      config = tiles.default(kernel, spec, x)
      used = tiling.config_for(tiles, None, kernel, spec, x)
      if (tiles, kernel, size) == (GPU, 'dq', 256) and 'prefix_q' in prefix:
        # The one that is made smaller: both queries of two warpgroups.
        config = dataclasses.replace(config, groups=1)
      assert used == config


def test_shrinking_ends_and_every_step_is_a_config():
  for tiles, config in (
    (GPU, GpuConfig(own=192, walk=224, stages=7, groups=3)),
    (TPU, TpuConfig(1024, 640)),
  ):
    seen = []
    while config is not None:
      seen.append(config)
      config = tiles.smaller(config)
    assert 3 < len(seen) == len(set(seen)) < 30
  assert seen[-1] == TpuConfig(128, 128)


@pytest.mark.parametrize(
  ('wrong', 'reason'),
  [
    (dict(config=dict(wlak=96)), 'wlak'),
    (dict(config=dict(walk=97)), 'walk must be'),
  ],
)
def test_a_wrong_table_is_an_error(wrong, reason):
  text = json.dumps({'tiles': [entry(**wrong)]})
  with pytest.raises(ValueError, match=f'here: .*{reason}'):
    tiling.parse(GpuConfig, text, 'here')


def test_an_incomplete_or_repeated_entry_is_an_error():
  lacking = entry()
  del lacking['featured']
  for entries, reason in (
    ([lacking], 'lacks'),
    ([entry(), entry()], 'two entries'),
  ):
    with pytest.raises(ValueError, match=reason):
      tiling.parse(GpuConfig, json.dumps({'tiles': entries}), 'here')


def test_names_of_files():
  names = {
    'NVIDIA H200': 'nvidia_h200.json',
    'NVIDIA H100 80GB HBM3': 'nvidia_h100_80gb_hbm3.json',
    'TPU v5 lite': 'tpu_v5_lite.json',
  }
  for kind, name in names.items():
    assert tiling.path_of(kind).name == name


def test_what_is_shipped_can_be_read():
  for path in tiling._FOLDER.glob('*.json'):
    text = path.read_text()
    kind = json.loads(text)['device']
    assert tiling.path_of(kind) == path
    tiles = TPU if kind.startswith('TPU') else GPU
    assert tiling.parse(tiles.config, text, path.name)
