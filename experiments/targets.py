"""Accelerators that are not there, to compile for: H200s or TPUs, one or many.

Needs the compilers of `make setup` (libtpu, and the CUDA plugin with ptxas) and
JAX_PLATFORMS=cpu in the environment.
"""

import functools
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What the compiler has to know of an H200: a GpuTargetConfigProto.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability {
    major: 9
    minor: 0
    feature_extension: ACCELERATED_FEATURES
  }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
# The smallest topology of each kind of TPU.
TPUS = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2', 'v5p': 'v5p:2x2x1'}
KINDS = ('h200', *TPUS)


def devices(name: str) -> list[jax.Device]:
  """The devices of a topology.

  Args:
    name: a kind for one device ('h200', 'v5e', 'v6e', 'v5p'), 'h200:8' for
      eight, a TPU's topology as 'v5p:4x4x4'.

  Raises:
    ValueError: for another kind, or a topology that does not exist.
  """
  kind, _, shape = name.partition(':')
  if kind not in KINDS:
    raise ValueError(f'device {kind!r} is not one of {KINDS}')
  if kind == 'h200':
    if not re.fullmatch('[1-9][0-9]*', shape or '1'):
      raise ValueError(f'topology {name!r} is not as h200:8')
    count = int(shape or 1)
    # Hosts of eight.
    size = f'1x{-(-count // 8)}x{min(count, 8)}'
    topology = topologies.get_topology_desc(
      platform='cuda', topology_name=kind, target_config=H200, topology=size
    )
    return topology.devices[:count]
  try:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=name if shape else TPUS[kind]
    )
  except jax.errors.JaxRuntimeError as e:
    first = str(e).splitlines()[0]
    raise ValueError(f'topology {name!r} cannot be had: {first}') from None
  return topology.devices if shape else topology.devices[:1]


@functools.cache
def mesh(kind: str) -> Mesh:
  """One device of a kind: 'h200', 'v5e', 'v6e' or 'v5p'.

  Raises:
    ValueError: for another kind.
  """
  return Mesh(np.array(devices(kind)[:1]), ('x',))


def compile_for(kind: str, f, *arguments, **options) -> jax.stages.Compiled:
  """f compiled for one device of a kind.

  Args:
    arguments: pytrees of arrays or of anything with a shape and a dtype.
    options: of `jax.jit`.
  """
  sharding = NamedSharding(mesh(kind), PartitionSpec())
  shapes = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=sharding),
    arguments,
  )
  with jax.sharding.use_abstract_mesh(mesh(kind).abstract_mesh):
    return jax.jit(f, **options).lower(*shapes).compile()
