"""Whether compilers optimise: in tests they do not, unless asked to."""

import contextlib
import os

import jax

NAME = 'jax_disable_most_optimizations'


@contextlib.contextmanager
def optimised():
  """Compilers do all they can, here and in programs started from here."""
  saved, variable = jax.config.read(NAME), os.environ.get(NAME.upper())
  jax.config.update(NAME, False)
  os.environ[NAME.upper()] = '0'
  try:
    yield
  finally:
    jax.config.update(NAME, saved)
    if variable is None:
      del os.environ[NAME.upper()]
    else:
      os.environ[NAME.upper()] = variable
