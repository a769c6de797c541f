"""What is installed, and that importing it costs little."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import longjax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _python(program, **environment):
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', program],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
  )


# A bare GPU machine has none of these; flax brings absl, optax and orbax.
OPTIONAL = [
  'beartype',
  'grain',
  'matplotlib',
  'ml_collections',
  'pooch',
  'rouge_score',
  'sacrebleu',
  'safetensors',
  'sentencepiece',
  'tensorboardX',
  'tensorflow',
  'tensorflow_datasets',
  'tokenizers',
  'tqdm',
]


def test_import_alone_loads_nothing():
  done = _python("""
import sys
import longjax
assert longjax.__version__
assert not {'jax', 'flax', 'numpy'} & set(sys.modules)
""")
  assert done.returncode == 0, done.stderr


def test_every_public_name_without_optional_packages_or_a_backend():
  done = _python(f"""
import sys
for name in {OPTIONAL}:
  sys.modules[name] = None  # importing it now raises ModuleNotFoundError
import longjax
for name in longjax.__all__:
  if name != 'training':  # which reads configs
    getattr(longjax, name)
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
import jax.numpy as jnp
x = jnp.ones([1, 8, 2, 4])
print(longjax.attention(x, x, x, longjax.SlidingWindow(2)).shape)
assert xla_bridge._backends  # so the check above could have failed
""")
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '(1, 8, 2, 4)'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The wheel, built from a copy so that no old build/ gets into it."""
  source = tmp_path_factory.mktemp('source')
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('longjax', 'configs', 'experiments', 'tests'):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation']
  subprocess.run(
    [*command, '--outdir', source / 'dist', source],
    check=True,
    capture_output=True,
  )
  (path,) = (source / 'dist').glob('*.whl')
  return path


def test_the_wheel_holds_longjax_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  info = f'longjax-{longjax.__version__}.dist-info'
  assert {name.split('/')[0] for name in names} == {'longjax', info}
  assert {name for name in names if name.startswith('longjax/')} == {
    path.relative_to(ROOT).as_posix()
    for kind in ('*.py', 'ops/pallas/tiles/*.json')
    for path in (ROOT / 'longjax').rglob(kind)
  }
  assert f'{info}/licenses/LICENSE' in names


def test_the_wheel_works_alone(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path)
  done = _python(
    'import longjax; longjax.DecoderLM; print(longjax.__file__)',
    PYTHONPATH=str(tmp_path),
    PYTHONSAFEPATH='1',
  )
  assert done.returncode == 0, done.stderr
  assert pathlib.Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_what_the_metadata_says(wheel):
  with zipfile.ZipFile(wheel) as archive:
    info = f'longjax-{longjax.__version__}.dist-info/METADATA'
    text = archive.read(info).decode()
  assert 'Requires-Python: >=3.12\n' in text
  assert 'Apache-2.0' in text
  for extra in ('cuda', 'tpu', 'data', 'tfds', 'notebooks', 'test'):
    assert f'Provides-Extra: {extra}\n' in text
