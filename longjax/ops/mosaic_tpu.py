"""The Pallas kernels for TPUs as an implementation of attention.

Under `pltpu.force_tpu_interpret_mode` they are interpreted, anywhere.
"""

import dataclasses

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.pallas import attend as pallas
from longjax.ops.pallas import devices, mosaic_tpu
from longjax.ops.pallas import mosaic_tpu_common as common
from longjax.ops.pallas.mosaic_tpu_common import VMEM_BYTES, TpuConfig
from longjax.ops.pallas.tiling import Tiles


def attend(
  call: Call,
) -> tuple[Float[Array, 'B T H D'], Float[Array, 'B T H']]:
  """(out in q's dtype, lse) of a checked call.

  Raises:
    NotImplementedError: on other devices, and what the kernels cannot do.
  """
  kind = None
  if not devices.interpreted(pltpu.InterpretParams):
    device = devices.device()
    if device.platform != 'tpu':
      raise NotImplementedError(
        f'the kernels are for TPUs, and the device is {device.device_kind!r} '
        f'of platform {device.platform!r}'
      )
    kind = device.device_kind
  return pallas.attend(call, pallas.Kernels(mosaic_tpu, TILES, kind))


def _default(kernel, spec, x):
  return common.default_config(spec, x, backward=kernel != 'forward')


def _memory(kernel, spec, x, config):
  return common.vmem(spec, x, config, backward=kernel != 'forward')


def _smaller(config):
  name = 'block_k' if config.block_k >= config.block_q else 'block_q'
  half = getattr(config, name) // 256 * 128
  return dataclasses.replace(config, **{name: half}) if half else None


TILES = Tiles(TpuConfig, _default, _memory, VMEM_BYTES, _smaller)
