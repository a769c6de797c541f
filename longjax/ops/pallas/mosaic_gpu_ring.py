"""Shared memory, registers, and the ring that brings tiles to the kernels."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longjax.ops.pallas.mosaic_gpu_common import REGISTERS, GpuConfig


def smem(shape: tuple[int, ...], dtype, *others: int) -> Any:
  """Tiles [..., rows, columns] in shared memory, as TMA and wgmma know them.

  The widest swizzle whose width divides the columns: 64 of them, 32 or 16.

  Args:
    *others: columns of the tiles that these are multiplied with, or their own
      rows if the product sums over them: all have to have the same swizzle.
  """
  columns = math.gcd(shape[-1], *others)
  for swizzle in (128, 64, 32):
    width = swizzle // jnp.dtype(dtype).itemsize
    if columns % width == 0:
      return plgpu.SMEM(
        shape,
        dtype,
        transforms=(
          plgpu.TilingTransform((8, width)),
          plgpu.SwizzleTransform(swizzle),
        ),
      )
  raise ValueError(f'{columns} columns are no multiple of {width}')


def shared_memory(scratch, reductions: bool = True) -> int:
  """Bytes that a program with these scratch types asks for.

  Args:
    reductions: whether it reduces along rows or columns.
  """
  sizes = [
    math.prod(y.shape) * jnp.dtype(y.dtype).itemsize
    for y in scratch
    if not isinstance(y, plgpu.Barrier)
  ]
  # Every buffer starts at a multiple of 1024; reductions need 2048 more.
  return sum(-(-size // 1024) * 1024 for size in sizes) + 2048 * reductions


def left_operand(x, buffer=None):
  """Values as the left operand of wgmma: as they are, or through a buffer."""
  if buffer is None:
    return x
  buffer[...] = x
  # Ordinary writes are visible to wgmma only after a fence.
  plgpu.commit_smem()
  return buffer


def take_registers(config: GpuConfig) -> None:
  """Called first by each compute warpgroup."""
  if REGISTERS[config.groups]:
    _, many = REGISTERS[config.groups]
    plgpu.set_max_registers(many, action='increase')


def produce(
  config: GpuConfig,
  count,
  load: Callable[[Any, Any, Any], None],
  full,
  empty,
) -> None:
  """The memory warpgroup's part: keeps the ring full.

  Args:
    count: tiles to bring.
    load: given (j, slot, barrier), starts the copies of tile j to the slot.
    full, empty: barriers of the slots.
  """
  if REGISTERS[config.groups]:
    few, _ = REGISTERS[config.groups]
    plgpu.set_max_registers(few, action='decrease')

  def step(j, _):
    slot = lax.rem(j, config.stages)

    @pl.when(j >= config.stages)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    load(j, slot, full.at[slot])

  def drain(j, _):
    plgpu.barrier_wait(empty.at[lax.rem(j, config.stages)])

  lax.fori_loop(0, count, step, None)
  # Every phase of a barrier has to be observed.
  lax.fori_loop(jnp.maximum(count - config.stages, 0), count, drain, None)
