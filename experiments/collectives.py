"""What devices of a compiled program send each other, read off its text.

Names prove nothing, since compilers turn one collective into another; sizes do.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'reduce-scatter',
)
_BYTES = {'pred': 1, 'bf16': 2, 'f16': 2, 'f64': 8, 's64': 8, 'u64': 8}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective.

  Attributes:
    kind: as in `KINDS`.
    bytes: of its largest operand or result, on each device.
    in_loop: whether it lies in the body of a loop, whose trips are not known:
      of a step with a loop over layers, once for each layer.
  """

  kind: str
  bytes: int
  in_loop: bool


def compiled_collectives(text: str) -> Iterator[Collective]:
  """Those of an optimised HLO module."""
  text = re.sub(r'/\*.*?\*/', '', text)
  entry = False
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith('{'):
      entry = line.startswith('ENTRY')
    found = re.search(rf'= (.*?) ({"|".join(KINDS)})(-start)?\(', line)
    if found:
      shapes = re.findall(r'(\w+)\[([\d,]*)\]', found[1])
      yield Collective(
        found[2], max(_bytes(*shape) for shape in shapes), not entry
      )


def _bytes(kind, dims):
  return _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(',') if n)
