"""Where a kernel that is being traced will run."""

import re

import jax
from jax._src import config as jax_config

# Of compute capability 9.0. An abstract device has nothing but its name.
_HOPPER = re.compile(r'\bG?H(20|100|200|800)\b')


def interpreted(params_type: type) -> bool:
  """Whether kernels are interpreted on the CPU, as such parameters tell.

  Args:
    params_type: `plgpu.InterpretGPUParams` or `pltpu.InterpretParams`, as given
      to `force_gpu_interpret_mode` or `force_tpu_interpret_mode`.
  """
  # One context serves both, and has no public reader.
  params = jax_config.pallas_tpu_interpret_mode_context_manager.value
  return isinstance(params, params_type)


def device():
  """The device that is compiled for: one without hardware, if there is one."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract
  default = jax.config.jax_default_device
  if default is None or isinstance(default, str):
    return jax.devices(default)[0]
  return default


def is_hopper(device) -> bool:
  if device.platform not in ('gpu', 'cuda'):
    return False
  capability = getattr(device, 'compute_capability', None)
  if capability is not None:
    return str(capability) == '9.0'
  return _HOPPER.search(device.device_kind) is not None
