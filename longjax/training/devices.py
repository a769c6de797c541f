"""Where a run's arrays lie: batches split over a mesh, parameters whole or not.

The mesh has the axes 'data' (rows of the batch) and 'seq' (positions of the
sequence). Every device computes the loss of its part of the batch, and sums of
losses and gradients make the mean (`sum_over_parts`), so that a step on many
devices is the step of one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longjax.sharding import make_mesh, map_shards, varying
from longjax.sharding.mesh import DATA, MODEL, SEQ, check_length
from longjax.training.settings import Settings

_PARTS = (DATA, SEQ)
# Arrays of fewer numbers than this stay whole on every device.
_SMALL = 2**14


class Place(NamedTuple):
  """Which part of every batch a process loads.

  Attributes:
    row, rows: the batch's rows are dealt to so many; this process is that one.
    part, parts: its sequences are cut into so many parts; this one it has.
  """

  row: int = 0
  rows: int = 1
  part: int = 0
  parts: int = 1


def make_devices(settings: Settings) -> 'Devices':
  """The mesh that a run's settings ask for."""
  mesh = settings.mesh
  return Devices(
    {DATA: mesh.data, SEQ: mesh.seq}, split_parameters=mesh.split_parameters
  )


class Devices:
  """All devices of all processes in a mesh.

  Attributes:
    num_devices: how many devices there are.
    mesh: the mesh.
    replicated: the sharding of what every device has whole.
  """

  def __init__(
    self,
    sizes: Mapping[str, int] | None = None,
    *,
    split_parameters: bool = False,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Args:

    sizes: devices along 'data' and 'seq', as of `make_mesh`; by default all
      along 'data'.
    split_parameters: parameters and the optimizer's state are split over all
      devices where they are not small, and parameters are put together for
      each step.
    devices: all there are by default.

    Raises:
      ValueError: sizes that do not make the devices there are.
    """
    self.mesh = make_mesh(sizes or {DATA: -1}, devices)
    if self.mesh.shape[MODEL] > 1:
      raise ValueError(
        f'mesh axis {MODEL!r} is {self.mesh.shape[MODEL]}: training splits '
        f'batches and sequences only, over {DATA!r} and {SEQ!r}'
      )
    self.num_devices = self.mesh.size
    self.replicated = self._on(P())
    self._split_parameters = split_parameters

  @property
  def place(self) -> Place:
    """What this process loads."""
    return _place(self.mesh)

  def _on(self, spec: P) -> NamedSharding:
    return NamedSharding(self.mesh, spec)

  def check_divides(self, name: str, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless devices (times parts) divide a batch size."""
    devices = self.mesh.shape[DATA]
    if batch_size % (devices * parts):
      times = f' times {parts} micro_batches' if parts > 1 else ''
      raise ValueError(
        f'{name} {batch_size} does not divide over {devices} '
        f'devices{times}: make it a multiple of {devices * parts}'
      )

  def describe(self) -> str:
    """A line for whoever watches the run."""
    line = f'{self.num_devices} device(s): {jax.devices()[0].device_kind}'
    if self.mesh.shape[SEQ] > 1:
      shape = ' x '.join(f'{axis} {self.mesh.shape[axis]}' for axis in _PARTS)
      line += f', {shape}'
    return line

  def check_sequences(self, task) -> None:
    """Raises ValueError where a task's sequences cannot be split."""
    devices = self.mesh.shape[SEQ]
    if devices == 1:
      return
    if not task.sequences:
      raise ValueError(
        f'mesh axis {SEQ!r} is {devices}, but {task.settings.task} splits no '
        f'sequences over devices: use {DATA!r}'
      )
    for name, length in task.lengths().items():
      self.share_of_sequence(name, length)

  def share_of_sequence(self, name: str, length: int) -> int:
    """How many positions of a sequence each device has.

    Raises:
      ValueError: where that is no whole number, naming the nearest lengths.
    """
    try:
      return check_length(length, self.mesh.shape[SEQ])
    except ValueError as e:
      raise ValueError(f'{name}: {e}') from None

  def shard(self, batch, sequences: Sequence[str] = ()):
    """A global batch of which every process gives its own part.

    Args:
      batch: a pytree of arrays [rows, ...].
      sequences: those of a dictionary whose second axis is split, too.
    """
    return jax.tree.map(
      lambda rows, where: jax.make_array_from_process_local_data(where, rows),
      batch,
      self.batch_shardings(batch, sequences),
    )

  def shard_same(self, rows, *axes: str):
    """A batch that every process holds whole, split along 'data' and others."""
    return jax.make_array_from_callback(
      rows.shape, self._on(P(DATA, *axes)), lambda index: rows[index]
    )

  def copy(self, array, like: jax.Array | None = None):
    """An array that every process holds, laid out as another, or whole."""
    return jax.make_array_from_callback(
      array.shape,
      self.replicated if like is None else like.sharding,
      lambda index: array[index],
    )

  def batch_shardings(self, batch, sequences: Sequence[str] = ()):
    """How the arrays of a batch lie; arguments as of `shard`."""
    return jax.tree.map(self._on, self._specs(batch, sequences))

  def _specs(self, batch, sequences):
    if sequences:
      return {
        name: P(DATA, SEQ) if name in sequences else P(DATA) for name in batch
      }
    return jax.tree.map(lambda _: P(DATA), batch)

  def shardings(self, state):
    """How the arrays of a training state lie: whole, or split by shape."""
    return jax.tree.map(lambda x: self._on(self._parameter(x.shape)), state)

  def _parameter(self, shape) -> P:
    if not self._split_parameters or math.prod(shape) < _SMALL:
      return P()
    # The longest axis that the devices divide.
    axes = [i for i, n in enumerate(shape) if not n % self.num_devices]
    if not axes:
      return P()
    axis = max(axes, key=lambda i: shape[i])
    return P(*[None] * axis, _PARTS)

  def sum_over_parts(
    self, f: Callable, sequences: Sequence[str] = ()
  ) -> Callable:
    """A function of parameters and a batch, summed over the batch's parts.

    Args:
      f: (parameters, batch, key, whole) -> (pytree of sums over the batch, sums
        of gradients like the parameters), where whole(parameters) are those of
        the model, to be called inside of what is differentiated.
      sequences: as for `shard`.

    Returns:
      (parameters, batch, key) -> what f returns for all of the batch.
    """
    if self.num_devices == 1:
      return lambda *arguments: f(*arguments, lambda params: params)

    def run(params, batch, key):
      specs = jax.tree.map(lambda x: self._parameter(x.shape), params)

      def gather(x, spec):
        if not spec:
          return x
        return jax.lax.all_gather(x, _PARTS, axis=len(spec) - 1, tiled=True)

      def add(x, spec):
        return x if spec else jax.lax.psum(varying(x, _PARTS), _PARTS)

      def local(params, batch, key):
        # As these differ between devices, so do their cotangents: they are
        # summed once, at the end, in the parameters' own dtype.
        params = varying(params, _PARTS)
        sums, gradients = f(
          params, batch, key, lambda p: jax.tree.map(gather, p, specs)
        )
        sums = jax.tree.map(lambda x: add(x, P()), sums)
        return sums, jax.tree.map(add, gradients, specs)

      return map_shards(
        local,
        self.mesh,
        (specs, self._specs(batch, sequences), P()),
        (P(), specs),
      )(params, batch, key)

    return run

  def apply(self, f: Callable, *, sequences: bool) -> Callable:
    """f(parameters, *rows) of rows from `shard_same`, compiled.

    Args:
      f: a function of a model's parameters and arrays [batch, ...].
      sequences: of arrays [batch, length] to an array [batch, length], all of
        which are split along both.

    Returns:
      The function; what it returns is whole on every device.
    """
    if sequences and self.num_devices > 1:
      rows = P(DATA, SEQ)

      def on_shards(params, *arrays):
        specs = (P(), *[rows] * len(arrays))
        return map_shards(f, self.mesh, specs, rows)(params, *arrays)

      run, axes = on_shards, (SEQ,)
    else:
      run, axes = f, ()
    run = jax.jit(run, out_shardings=self.replicated)

    def call(params, *rows):
      rows = jax.tree.map(lambda x: self.shard_same(x, *axes), rows)
      return run(params, *rows)

    return call


def _place(mesh) -> Place:
  """See `Place`; the mesh is [data, seq, model].

  Raises:
    ValueError: where this process' devices make no rectangle of the mesh, or
      one that does not repeat.
  """
  process = jax.process_index()
  mine = np.vectorize(lambda device: device.process_index == process)(
    mesh.devices[:, :, 0]
  )
  sides = []
  for axis in (0, 1):
    here = np.flatnonzero(mine.any(axis=1 - axis))
    first, size, whole = here[0], len(here), mine.shape[axis]
    if here[-1] - first != size - 1 or first % size or whole % size:
      raise ValueError(
        f'the devices of process {process} are not neighbours in the mesh '
        f'{DATA} {mine.shape[0]} x {SEQ} {mine.shape[1]}'
      )
    sides += [int(first // size), int(whole // size)]
  return Place(*sides)
