"""Which implementation runs: an ordered list per platform, with reasons.

A backend is a function of a `Call` that returns (out, lse) or raises
NotImplementedError with the reason why it cannot. A reason is logged once.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence

import jax

from longjax.ops.call import Call

_MODULES = {
  'cudnn': 'longjax.ops.cudnn',
  'mosaic_gpu': 'longjax.ops.mosaic_gpu',
  'mosaic_tpu': 'longjax.ops.mosaic_tpu',
  'reference': 'longjax.ops.reference',
  'xla': 'longjax.ops.xla',
}
# What implementation=None tries, first to last.
ORDER = {
  'cpu': ('xla',),
  'gpu': ('mosaic_gpu', 'cudnn', 'xla'),
  'tpu': ('mosaic_tpu', 'xla'),
}


@functools.cache
def backend(name: str) -> Callable:
  """The function of the backend called `name`; ValueError if there is none."""
  if name not in _MODULES:
    raise ValueError(
      f'implementation {name!r} is not one of {sorted(_MODULES)}'
    )
  return importlib.import_module(_MODULES[name]).attend


@functools.cache
def _log_once(name: str, reason: str):
  logging.getLogger('longjax').info('not using %s: %s', name, reason)


def run(call: Call, implementation: str | Sequence[str] | None):
  """Runs the named backend, or the first of several that does not refuse.

  Raises:
    NotImplementedError: every backend tried refuses; the message holds each
      one's reason.
  """
  if isinstance(implementation, str):
    return backend(implementation)(call)
  if implementation is None:
    implementation = ORDER.get(jax.default_backend(), ('xla',))
  backends = [(name, backend(name)) for name in implementation]
  reasons = []
  for name, attend in backends:
    try:
      return attend(call)
    except NotImplementedError as refusal:
      _log_once(name, str(refusal))
      reasons.append(f'{name}: {refusal}')
  raise NotImplementedError('; '.join(reasons) or 'no implementation named')
