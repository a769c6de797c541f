"""The Pallas kernels for TPUs as an implementation of attention.

Under `pltpu.force_tpu_interpret_mode` they are interpreted, anywhere.
"""

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from longjax.ops.call import Call
from longjax.ops.pallas import attend as pallas
from longjax.ops.pallas import devices, mosaic_tpu


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
  return pallas.attend(call, pallas.Kernels('mosaic_tpu', mosaic_tpu, kind))
