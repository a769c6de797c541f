"""Compiles for GPUs and TPUs that are not there, and reads what came of it."""

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What the compiler has to know of an H200: a GpuTargetConfigProto.
_H200 = """
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
_DUMPS = ('MOSAIC_GPU_DUMP_PTXAS', 'MOSAIC_GPU_DUMP_RESOURCES')


class Kernel(NamedTuple):
  """What ptxas says of a Mosaic GPU kernel.

  registers are those of the launch, of which compute warpgroups then take
  more and the memory warpgroup less. spills: bytes stored. serialized: whether
  ptxas reports a potential loss of performance, as where it puts waits between
  products or lets no registers be moved.
  """

  name: str
  registers: int
  spills: int
  serialized: bool


class Program(NamedTuple):
  """A compiled program: bytes of memory, text of its HLO, GPU kernels.

  shared_memory: bytes of each kernel, in the order of their lowering, while
  kernels are in that of ptxas.
  """

  peak: int
  temporary: int
  text: str
  kernels: tuple[Kernel, ...] = ()
  shared_memory: tuple[int, ...] = ()


def gpu(f, *arguments) -> Program:
  """Compiles f for one H200.

  Args:
    arguments: pytrees of arrays or of anything with a shape and a dtype.
  """
  with _dumping() as log:
    program = _compile(_gpu_mesh(), f, arguments)
  text = log()
  shared = re.findall(r'smem_scratch_bytes=(\d+)', text)
  return program._replace(
    kernels=_kernels(text), shared_memory=(*map(int, shared),)
  )


def tpu(kind: str, f, *arguments) -> Program:
  """Compiles f for one TPU, kind 'v5e' or 'v6e'."""
  return _compile(_tpu_mesh(kind), f, arguments)


@functools.cache
def _gpu_mesh():
  return _mesh('cuda', 'h200', target_config=_H200, topology='1x1x1')


@functools.cache
def _tpu_mesh(kind):
  return _mesh('tpu', f'{kind}:2x2')


def _mesh(platform, name, **options):
  topology = topologies.get_topology_desc(
    platform=platform, topology_name=name, **options
  )
  return Mesh(np.array(topology.devices[:1]), ('x',))


def _compile(mesh, f, arguments):
  sharding = NamedSharding(mesh, PartitionSpec())
  shapes = jax.tree.map(
    lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=sharding),
    arguments,
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(f).lower(*shapes).compile()
  memory = compiled.memory_analysis()
  return Program(
    memory.peak_memory_in_bytes, memory.temp_size_in_bytes, compiled.as_text()
  )


@contextlib.contextmanager
def _dumping():
  """Makes the compiler print, and yields what will return all it printed."""
  saved = {name: os.environ.get(name) for name in _DUMPS}
  os.environ.update(dict.fromkeys(_DUMPS, '1'))
  text, printed = '', io.StringIO()
  sys.stdout.flush()
  sys.stderr.flush()
  # Some words come from Python; ptxas' come from C++, which knows no
  # sys.stdout.
  outputs = [os.dup(number) for number in (1, 2)]
  with tempfile.TemporaryFile('w+') as file:
    for number in (1, 2):
      os.dup2(file.fileno(), number)
    try:
      with contextlib.redirect_stdout(printed):
        yield lambda: text
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, number)
        os.close(output)
      for name, value in saved.items():
        if value is None:
          del os.environ[name]
        else:
          os.environ[name] = value
      file.seek(0)
      text = printed.getvalue() + file.read()


def _kernels(log):
  names = re.findall(r"Compiling entry function '(\w+)'", log)
  registers = re.findall(r'Used (\d+) registers', log)
  spills = re.findall(r'stack frame, (\d+) bytes spill stores', log)
  # Of several kernels, they all say so then.
  serialized = 'Potential Performance Loss' in log
  kernels = tuple(
    Kernel(name, *map(int, numbers), serialized)
    for name, *numbers in zip(names, registers, spills, strict=True)
  )
  if not kernels:
    raise AssertionError(f'the compiler said nothing of kernels:\n{log}')
  return kernels
