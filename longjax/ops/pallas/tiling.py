"""Which tiles a kernel is called with.

Those of a table of measured times, if the package has one for the device and
it has an entry for this kind of call; else the backend's own choice. Tiles that
would not fit into the memory of a core are made smaller. Nothing is measured
while a program runs: `experiments/benchmarks/tune.py` writes the tables.

A table is `tiles/<device kind>.json`:

  {"device": "NVIDIA H200", "tiles": [
     {"kernel": "forward", "head_size": 128, "prefix_q": false,
      "featured": false, "residues": false, "config": {"walk": 128, ...}}]}

An entry may name a "dtype"; other fields (when, what else was tried) are for
people.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from longjax.ops.pallas.contract import Operands, Spec

# Prefix keys have the tiles of 'dkv'.
KERNELS = ('forward', 'dq', 'dkv')

_FOLDER = pathlib.Path(__file__).parent / 'tiles'


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a backend says of its tiles.

  Attributes:
    config: the class of tiles, a dataclass.
    default: (kernel, spec, operands) -> tiles, for each of KERNELS.
    memory: (kernel, spec, operands, tiles) -> bytes.
    capacity: bytes of memory that there are.
    smaller: tiles -> smaller ones, or None if there are none.
  """

  config: type
  default: Callable[[str, Spec, Operands], Any]
  memory: Callable[[str, Spec, Operands, Any], int]
  capacity: int
  smaller: Callable[[Any], Any]


def config_for(
  tiles: Tiles, device_kind: str | None, kernel: str, spec: Spec, x: Operands
) -> Any:
  """Tiles for a call of one kernel.

  Args:
    device_kind: as JAX names it; None for no device in particular.

  Raises:
    NotImplementedError: the smallest tiles do not fit.
  """
  measured = {} if device_kind is None else table(tiles.config, device_kind)
  key = _key(kernel, spec, x)
  config = measured.get((*key, str(x.q.dtype)), measured.get((*key, None)))
  if config is None:
    config = tiles.default(kernel, spec, x)
  while (needed := tiles.memory(kernel, spec, x, config)) > tiles.capacity:
    smaller = tiles.smaller(config)
    if smaller is None:
      raise NotImplementedError(
        f'the smallest tiles of {kernel}, {config}, need {needed} bytes and '
        f'there are {tiles.capacity}'
      )
    config = smaller
  return config


def _key(kernel, spec, x):
  return (
    kernel,
    x.q.shape[-1],
    x.prefix is not None and x.prefix.q is not None,
    x.q_ids is not None or spec.dropout_rate > 0,
    spec.residues is not None,
  )


_FIELDS = ('kernel', 'head_size', 'prefix_q', 'featured', 'residues')


def path_of(device_kind: str) -> pathlib.Path:
  """Where the table of a kind of device is, if there is one."""
  name = re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')
  return _FOLDER / f'{name}.json'


@functools.cache
def table(config: type, device_kind: str) -> dict[tuple, Any]:
  """Measured tiles by kind of call; empty if nobody has measured.

  Raises:
    ValueError: the file is not such a table.
  """
  path = path_of(device_kind)
  if not path.is_file():
    return {}
  return parse(config, path.read_text(), str(path))


def parse(config: type, text: str, source: str) -> dict[tuple, Any]:
  """The table in a JSON text; see the module's docstring."""
  entries = {}
  for entry in json.loads(text)['tiles']:
    missing = [name for name in (*_FIELDS, 'config') if name not in entry]
    if missing:
      raise ValueError(f'{source}: an entry lacks {missing}: {entry}')
    key = (*(entry[name] for name in _FIELDS), entry.get('dtype'))
    if key in entries:
      raise ValueError(f'{source}: two entries for {key}')
    try:
      entries[key] = config(**entry['config'])
    except (TypeError, ValueError) as error:
      raise ValueError(f'{source}: {entry["config"]}: {error}') from error
  return entries
