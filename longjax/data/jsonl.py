"""Files of one JSON object a line: .jsonl, also .xz, .gz or .zip."""

import json
from collections.abc import Iterator

from longjax.data import files


def read(path) -> Iterator[tuple[str, dict]]:
  """Yields (where it stands, for messages; the object) of each line.

  Empty lines are passed over.

  Raises:
    FileNotFoundError, ValueError: see `files.read_bytes`; ValueError also for a
      line that is no JSON object, naming the line.
  """
  for number, line in enumerate(files.read_lines(path), start=1):
    if not line.strip():
      continue
    where = f'{path} line {number}'
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{where} is not JSON: {error}') from error
    if not isinstance(record, dict):
      raise ValueError(
        f'{where} is a JSON {type(record).__name__}, not an object'
      )
    yield where, record
