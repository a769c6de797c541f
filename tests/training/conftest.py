"""What the tests of whole runs share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

CACHE = {
  'jax_compilation_cache_dir': None,
  'jax_persistent_cache_min_compile_time_secs': 0.0,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}


@pytest.fixture(scope='module')
def compile_once(tmp_path_factory):
  """The runs here compile the same few programs again and again."""
  before = {name: getattr(jax.config, name) for name in CACHE}
  for name, value in CACHE.items():
    jax.config.update(name, value)
  jax.config.update(
    'jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache'))
  )
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
