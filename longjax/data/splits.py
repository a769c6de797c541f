"""Training, validation and test bytes, and the two rules that part them."""

from collections.abc import Sequence
from typing import NamedTuple

from longjax.data import files

NAMES = ('train', 'validation', 'test')

# Of every twenty documents one is validation and one is test.
PERIOD = 20


class Splits(NamedTuple):
  """Raw bytes of each split, and a sentence saying what they are."""

  train: bytes
  validation: bytes
  test: bytes
  description: str


def by_bytes(data: bytes, held_out: int, description: str) -> Splits:
  """The last `held_out` bytes are test, as many before them validation."""
  edges = (len(data) - 2 * held_out, len(data) - held_out)
  return Splits(
    data[: edges[0]], data[edges[0] : edges[1]], data[edges[1] :], description
  )


def proportional(data: bytes, description: str) -> Splits:
  """90% training, then 5% validation, then 5% test, contiguous.

  Raises:
    ValueError: fewer than 20 bytes, so that a split would be empty.
  """
  held_out = len(data) // 20
  if not held_out:
    raise ValueError(
      f'{len(data)} bytes are too few for a 90/5/5 split; at least 20 are'
      f' wanted ({description})'
    )
  return by_bytes(
    data, held_out, f'{description}, proportional 90/5/5 split by position'
  )


def by_document(
  documents: Sequence[bytes], name: str, min_bytes: int = 0
) -> Splits:
  """Whole documents: of every 20 the 10th is validation, the 20th test.

  With fewer than 20 documents there is nothing to choose among: they are put
  one after another and split by position.

  Args:
    documents: in their order.
    name: what they are, '... of ...'; their number is put before it.
    min_bytes: shorter ones are left out, before anything else.

  Raises:
    ValueError: for negative `min_bytes`, or more than any document has.
  """
  if min_bytes < 0:
    raise ValueError(f'min_bytes must not be negative, got {min_bytes}')
  longest = max(map(len, documents))
  if min_bytes > longest:
    raise ValueError(
      f'no document has {min_bytes} bytes: the longest of the {len(documents)} '
      f'{name} has {longest}'
    )
  documents = [text for text in documents if len(text) >= min_bytes]
  description = f'{len(documents)} {name}' + (
    f' of {min_bytes:,} bytes or more' if min_bytes else ''
  )
  if len(documents) < PERIOD:
    return proportional(files.join(documents), description)
  parts = {name: [] for name in NAMES}
  for index, text in enumerate(documents):
    place = index % PERIOD
    name = {PERIOD // 2 - 1: 'validation', PERIOD - 1: 'test'}.get(place)
    parts[name or 'train'].append(text)
  counts = '/'.join(str(len(part)) for part in parts.values())
  return Splits(
    *(files.join(part) for part in parts.values()),
    description=f'{description}, split by document ({counts})',
  )
