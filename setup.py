"""What longjax is installed with; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '(.+)'", (ROOT / 'longjax' / '__init__.py').read_text()
)[1]

# The ahead-of-time compilers for TPU and NVIDIA GPU, which need neither.
LINUX = 'sys_platform == "linux" and platform_machine == "x86_64"'

DATA = [
  'grain>=0.2.12',
  'importlib_resources',  # which tensorflow-datasets uses and does not name
  'pooch>=1.8',
  'tensorflow-datasets>=4.9.9',
  'tiktoken>=0.8',
  'tokenizers>=0.20',
]

INTEROP = [
  'safetensors>=0.5',
  'sentencepiece>=0.2',
  'tiktoken>=0.8',
  'tokenizers>=0.20',
]

# Studies of many trials: samplers, pruning and storages that machines share.
# From SQLAlchemy 2.1 on postgresql://... means psycopg, which PostgreSQL needs.
SWEEPS = ['optuna>=5.0', 'psycopg[binary]>=3.2', 'sqlalchemy>=2.1']

EVALUATION = ['rouge-score>=0.1.2', 'sacrebleu>=2.4']

# What tools/notebooks.py runs notebooks with, and tests too; to look at them
# take any Jupyter.
NOTEBOOKS = ['ipykernel>=6.29', 'jupytext>=1.16', 'nbclient>=0.10', 'nbformat']

setup(
  name='longjax',
  version=VERSION,
  description='Long-context attention for JAX',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  packages=find_packages(include=['longjax', 'longjax.*']),
  # Tables of measured tiles, one for each kind of device.
  package_data={'longjax.ops.pallas': ['tiles/*.json']},
  python_requires='>=3.12',
  # Attention and models import jax, flax, numpy and jaxtyping only, and
  # training on a local text file optax, orbax, absl and ml_collections
  # besides; the rest is imported where it is used.
  install_requires=[
    'absl-py',
    'flax>=0.12,<0.13',
    'jax>=0.11.2,<0.13',
    'jaxtyping>=0.3',
    'matplotlib>=3.9',
    'ml-collections>=1.1',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'tensorboardX>=2.6',
    'tqdm',
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'data': DATA,
    # The downloads of tensorflow-datasets' own catalogue use TensorFlow.
    'tfds': [*DATA, 'tensorflow-cpu>=2.20'],
    # Pretrained models' weights and tokenizers, and what is measured of them.
    'interop': [*INTEROP, *EVALUATION],
    'notebooks': NOTEBOOKS,
    'sweeps': SWEEPS,
    'test': [
      *INTEROP,
      *EVALUATION,
      *NOTEBOOKS,
      *SWEEPS,
      'beartype',
      'build',
      'flatbuffers',
      'hypothesis',
      'pytest>=8',
      'pytest-xdist',
      'ruff',
      'setuptools>=77',
      f'jax[cuda13-local,tpu]; {LINUX}',
      f'nvidia-cuda-nvcc>=13; {LINUX}',
      f'nvidia-nvvm>=13; {LINUX}',
    ],
  },
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
