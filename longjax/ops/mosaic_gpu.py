"""The Pallas kernels for NVIDIA Hopper GPUs as an implementation of attention.

Under `plgpu.force_gpu_interpret_mode` they are interpreted, anywhere.
"""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.pallas import attend as pallas
from longjax.ops.pallas import devices, mosaic_gpu, mosaic_gpu_backward
from longjax.ops.pallas.mosaic_gpu_common import SHARED_MEMORY, GpuConfig
from longjax.ops.pallas.tiling import Tiles

# Multiprocessors of an H100 or H200: so many programs keep it busy.
_MULTIPROCESSORS = 132


def attend(
  call: Call,
) -> tuple[Float[Array, 'B T H D'], Float[Array, 'B T H']]:
  """(out in q's dtype, lse) of a checked call.

  Raises:
    NotImplementedError: on other devices, and what the kernels cannot do.
  """
  kind = None
  if not devices.interpreted(plgpu.InterpretGPUParams):
    device = devices.device()
    if not devices.is_hopper(device):
      raise NotImplementedError(
        f'the kernels use what only Hopper GPUs have (compute capability 9.0), '
        f'and the device is {device.device_kind!r} of platform '
        f'{device.platform!r}'
      )
    kind = device.device_kind
  return pallas.attend(
    call, pallas.Kernels(mosaic_gpu, TILES, kind, _MULTIPROCESSORS)
  )


def _default(kernel, spec, x):
  if kernel == 'forward':
    return mosaic_gpu.default_config(spec, x)
  dq, dkv = mosaic_gpu_backward.default_configs(spec, x)
  return dq if kernel == 'dq' else dkv


def _memory(kernel, spec, x, config):
  if kernel == 'forward':
    return mosaic_gpu.shared_memory(spec, x, config)
  return mosaic_gpu_backward.shared_memory(kernel, spec, x, config)


def _smaller(config):
  """The ring first, then the tiles, then the warpgroups."""
  if config.stages > 2:
    return dataclasses.replace(config, stages=config.stages - 1)
  if config.walk > 32:
    return dataclasses.replace(config, walk=max(32, config.walk // 64 * 32))
  if config.own > 64:
    return dataclasses.replace(config, own=config.own - 64)
  if config.groups > 1:
    return dataclasses.replace(config, groups=config.groups - 1)
  return None


TILES = Tiles(GpuConfig, _default, _memory, SHARED_MEMORY, _smaller)
