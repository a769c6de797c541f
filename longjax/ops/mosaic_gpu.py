"""The Pallas kernels for NVIDIA Hopper GPUs as an implementation of attention.

Under `plgpu.force_gpu_interpret_mode` they are interpreted, anywhere.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.pallas import attend as pallas
from longjax.ops.pallas import devices, mosaic_gpu

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
    call, pallas.Kernels('mosaic_gpu', mosaic_gpu, kind, _MULTIPROCESSORS)
  )
