"""Set-up shared by every test: the environment JAX starts in, and data."""

import contextlib
import gc
import importlib.util
import itertools
import os
import pathlib

import pytest

# Before the first `import jax` of the process. Tests run on the CPU unless the
# caller says otherwise; the TPU names let libtpu compile ahead of time without
# looking for a machine, and allow a second process to do so at once.
for _name, _value in {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TF_CPP_MIN_LOG_LEVEL': '2',
  # Threads of XLA's pool on the CPU, else one for each core. The interpreter of
  # GPU kernels holds one for each warpgroup that waits at a barrier: with two
  # cores, the third that would release them never runs.
  'NPROC': '8',
  # Most of a test's time is compiling, and most of that is optimising what runs
  # once; a test that wants it asks for the fixture `optimised`.
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  # Figures are drawn to files; never look for a display.
  'MPLBACKEND': 'Agg',
}.items():
  os.environ.setdefault(_name, _value)

# A machine with an accelerator may lack hypothesis: there the tests that use
# it skip themselves (pytest.importorskip), and the rest still runs.
if importlib.util.find_spec('hypothesis'):
  import hypothesis

  hypothesis.settings.register_profile(
    'repeatable',
    derandomize=True,
    # The first example of a shape compiles; its time says nothing.
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
  )
  hypothesis.settings.load_profile('repeatable')

# What tracing leaves in caches is much, and all of it stays: looking through it
# for garbage every 700 new objects takes up to a tenth of a test's time.
gc.set_threshold(100_000, 20, 20)

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Linux maps at most 65,530 pieces of memory into a process (vm.max_map_count).
# Each compiled program takes several, and XLA crashes where there are no more.
MOST_MAPS = 25_000
_tests = itertools.count(1)


# Minutes each; begun last, one of them would be waited for.
LONGEST = (
  'test_multi_device.py',
  'test_notebooks.py',
  'test_mosaic_gpu.py',
  'test_main.py',
  'test_mosaic_tpu.py',
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
  """Once in a while, if there is much of it."""
  yield
  if next(_tests) % 10:
    return
  maps = 0
  with contextlib.suppress(OSError), open('/proc/self/maps') as lines:
    maps = sum(1 for _ in lines)
  if maps > MOST_MAPS:
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised():
  """Compilers do all they can: for tests that read what they made."""
  from tests import optimising

  with optimising.optimised():
    yield


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of real data beside the repository; skips where absent."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip('no folder ../shared/data beside the repository')
  return folder
