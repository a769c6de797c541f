"""The batch spread over the devices; everything else on each of them."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class DataMesh:
  """All devices of all processes in one row, each with a part of the batch.

  Attributes:
    num_devices: how many devices there are.
    replicated: the sharding of what every device has whole.
  """

  def __init__(self):
    mesh = jax.sharding.Mesh(
      np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,)
    )
    self.num_devices = mesh.size
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self._by_row = NamedSharding(mesh, PartitionSpec('data'))

  def check_divides(self, name: str, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless devices (times parts) divide a batch size."""
    if batch_size % (self.num_devices * parts):
      times = f' times {parts} micro_batches' if parts > 1 else ''
      raise ValueError(
        f'{name} {batch_size} does not divide over {self.num_devices} '
        f'devices{times}: make it a multiple of {self.num_devices * parts}'
      )

  def shard(self, batch):
    """A global batch of which every process gives its own rows, in order."""
    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(self._by_row, rows),
      batch,
    )

  def shard_same(self, rows):
    """A batch that every process holds whole."""
    return jax.make_array_from_callback(
      rows.shape, self._by_row, lambda index: rows[index]
    )

  def copy(self, array):
    """An array that every process holds, whole on every device."""
    return jax.make_array_from_callback(
      array.shape, self.replicated, lambda index: array[index]
    )
