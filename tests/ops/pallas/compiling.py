"""Compiles for GPUs and TPUs that are not there, and reads what came of it."""

import contextlib
import io
import os
import re
import sys
import tempfile
from typing import NamedTuple

from experiments import targets
from tests.optimising import optimised

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
    program = _compile('h200', f, arguments)
  text = log()
  shared = re.findall(r'smem_scratch_bytes=(\d+)', text)
  return program._replace(
    kernels=_kernels(text), shared_memory=(*map(int, shared),)
  )


def tpu(kind: str, f, *arguments) -> Program:
  """Compiles f for one TPU, kind 'v5e' or 'v6e'."""
  return _compile(kind, f, arguments)


def _compile(kind, f, arguments):
  with optimised():
    compiled = targets.compile_for(kind, f, *arguments)
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
