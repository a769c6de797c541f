"""Packages that a part of longjax.data needs and a bare install lacks."""

import importlib
import types


def require(module: str, purpose: str, extra: str = 'data') -> types.ModuleType:
  """Imports `module`, or says which extra of longjax brings it.

  Raises:
    ModuleNotFoundError: `module` (and not something it imports) is missing.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name != module.partition('.')[0]:
      raise
    raise ModuleNotFoundError(
      f'{purpose} needs {error.name}, which is not installed:'
      f" pip install 'longjax[{extra}]'",
      name=error.name,
    ) from error
