"""Which device a kernel is taken for, and refusals elsewhere."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import longjax
from longjax.ops import dispatch
from longjax.ops.pallas import devices
from tests.ops.helpers import qkv


@pytest.mark.parametrize(
  ('kind', 'wanted'),
  [
    ('NVIDIA H200', True),
    ('NVIDIA H100 80GB HBM3', True),
    ('NVIDIA GH200 480GB', True),
    ('NVIDIA H800', True),
    ('NVIDIA A100-SXM4-80GB', False),
    ('NVIDIA B200', False),
    ('NVIDIA GB200', False),
    ('NVIDIA GeForce RTX 4090', False),
  ],
)
def test_hopper_by_name(kind, wanted):
  assert (
    devices.is_hopper(jax.sharding.AbstractDevice(kind, 1, 'gpu')) == wanted
  )


def test_hopper_by_capability():
  def device(capability, platform='gpu'):
    return types.SimpleNamespace(
      platform=platform, device_kind='?', compute_capability=capability
    )

  assert devices.is_hopper(device('9.0'))
  assert not devices.is_hopper(device('10.0'))
  assert not devices.is_hopper(device('9.0', 'rocm'))


def _mesh(kind, platform):
  device = jax.sharding.AbstractDevice(kind, 1, platform)
  return jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)


def test_the_device_that_is_compiled_for():
  assert devices.device() == jax.devices()[0]
  with jax.default_device(jax.devices('cpu')[0]):
    assert devices.device().platform == 'cpu'
  with jax.default_device('cpu'):
    assert devices.device().platform == 'cpu'
  with jax.sharding.use_abstract_mesh(_mesh('TPU v6 lite', 'tpu')):
    assert devices.device().device_kind == 'TPU v6 lite'


def test_interpreting_is_asked_of_the_context():
  assert not devices.interpreted(plgpu.InterpretGPUParams)
  with plgpu.force_gpu_interpret_mode():
    assert devices.interpreted(plgpu.InterpretGPUParams)
    assert not devices.interpreted(pltpu.InterpretParams)
  with pltpu.force_tpu_interpret_mode():
    assert devices.interpreted(pltpu.InterpretParams)


def lower(implementation, mesh=None):
  x = [
    jax.ShapeDtypeStruct(y.shape, y.dtype)
    for y in qkv(length=64, size=64, dtype=jnp.bfloat16)
  ]

  def attend(*x):
    return longjax.attention(
      *x, longjax.SlidingWindow(9), implementation=implementation
    )

  if mesh is None:
    return jax.jit(attend).lower(*x)
  platform = mesh.abstract_device.platform
  platform = 'cuda' if platform == 'gpu' else platform
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(attend).trace(*x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
  ('implementation', 'mesh', 'reason'),
  [
    ('mosaic_gpu', None, "Hopper .* is 'cpu' of platform 'cpu'"),
    ('mosaic_gpu', _mesh('NVIDIA B200', 'gpu'), "'NVIDIA B200'"),
    ('mosaic_tpu', None, "for TPUs, and the device is 'cpu'"),
    ('mosaic_tpu', _mesh('NVIDIA H200', 'gpu'), "'NVIDIA H200'"),
  ],
)
def test_elsewhere_it_is_refused(implementation, mesh, reason):
  with pytest.raises(NotImplementedError, match=reason):
    lower(implementation, mesh)


def test_on_its_own_device_it_is_lowered():
  for implementation, kind, platform, call in (
    ('mosaic_gpu', 'NVIDIA H200', 'gpu', 'mosaic_gpu'),
    ('mosaic_tpu', 'TPU v5 lite', 'tpu', 'tpu_custom_call'),
  ):
    text = lower(implementation, _mesh(kind, platform)).as_text()
    assert call in text


def test_the_platforms_own_order_finds_it(monkeypatch, caplog):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  dispatch._log_once.cache_clear()
  assert 'mosaic_gpu' in lower(None, _mesh('NVIDIA H200', 'gpu')).as_text()
  assert not caplog.records
  with caplog.at_level('INFO', logger='longjax'):
    for _ in range(2):
      lower(None, _mesh('NVIDIA A100', 'gpu'))
  (first, *more) = [r.getMessage() for r in caplog.records]
  assert first.startswith('not using mosaic_gpu: the kernels use what only')
  # cuDNN is not here.
  assert len(more) == 1 and more[0].startswith('not using cudnn: ')
