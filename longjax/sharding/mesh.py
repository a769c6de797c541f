"""Meshes by name: the axes `data`, `seq` and `model`."""

import math
from collections.abc import Mapping, Sequence

import jax

DATA, SEQ, MODEL = 'data', 'seq', 'model'
AXES = (DATA, SEQ, MODEL)


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh of all three axes; those that `sizes` leaves out have size 1.

  Args:
    sizes: devices along 'data' (the batch), 'seq' (the sequence) and 'model'
      (heads and features); -1 for one of them takes the devices left.
    devices: all of them by default.

  Raises:
    ValueError: for an unknown axis, a size below 1, or a product that is not
      the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise ValueError(f'mesh axis {unknown[0]!r} is not one of {AXES}')
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  for axis, size in sizes.items():
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not whole or (size < 1 and size != -1):
      raise ValueError(
        f'mesh axis {axis!r} must be a whole number >= 1, or -1 for the '
        f'devices left, got {size!r}'
      )
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f'only one mesh axis can be -1, got {free}')
  shown = ' x '.join(f'{axis} {size}' for axis, size in sizes.items())
  for axis in free:
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes[axis] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'mesh {shown} does not make the {len(devices)} devices there are'
    )
  # What is sharded how is said at shard_map and jit; arrays carry no types.
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=kinds, devices=devices
  )


def check_length(length: int, shards: int) -> int:
  """Length of a shard.

  Raises:
    ValueError: where `shards` does not divide, naming the nearest that do.
  """
  if length % shards:
    below = length // shards * shards
    nearest = [n for n in (below, below + shards) if n]
    raise ValueError(
      f'a sequence of {length} tokens cannot be split over {shards} devices; '
      f'the nearest lengths that can: {" and ".join(map(str, nearest))}'
    )
  return length // shards
