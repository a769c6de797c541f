"""Which room may import which: imports go one way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'longjax'

# A room may import itself and rooms of lower levels. The rooms of the last
# level may import each other; those of the first may not.
LEVELS = [
  {'patterns', 'positions', 'data'},
  {'ops'},
  {'sharding'},
  {'nn'},
  {'models'},
  {'training', 'evaluation', 'generation', 'interop'},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LAST = len(LEVELS) - 1

# Packages that only some rooms may name, wherever in a file.
ONLY_IN = {
  # Config objects never travel below training.
  'ml_collections': {'training'},
  'jax': set(LEVEL) - {'data'},
  'flax': {'nn', 'models', 'training', 'evaluation', 'generation', 'interop'},
  'optax': {'training'},
  'orbax': {'training'},
  'tensorflow_datasets': {'data'},
  'grain': {'data'},
  'safetensors': {'interop'},
  'sentencepiece': {'interop'},
  'pooch': {'data'},
  'tiktoken': {'data'},
  'tiktoken_ext': {'data'},
}
# Packages that a bare machine lacks: imported where used, not with a module.
LAZY = {
  'grain',
  'matplotlib',
  'pooch',
  'requests',
  'rouge_score',
  'sacrebleu',
  'safetensors',
  'sentencepiece',
  'tensorboardX',
  'tensorflow_datasets',
  'tiktoken',
  'tiktoken_ext',
  'tokenizers',
  'tqdm',
}
# ... but for this module, which is itself imported where used.
EAGER = {'longjax/data/builders.py'}

OUTSIDE = {'configs', 'experiments', 'tests', 'tools'}


def _imports(tree: ast.Module, package: str):
  """Yields (dotted name, line, whether at module level) of every import.

  `from a import b` yields a.b: b may be a module.
  """
  top = {id(node) for node in tree.body}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno, id(node) in top
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parents = package.split('.')
        parents = parents[: len(parents) - node.level + 1]
        base = '.'.join([*parents, *filter(None, [base])])
      for alias in node.names:
        yield f'{base}.{alias.name}', node.lineno, id(node) in top


def violations(source: str, path: str) -> list[str]:
  """What is wrong with the imports of a file at `path`, from ROOT."""
  *folders, _ = pathlib.PurePosixPath(path).parts
  room = folders[1] if len(folders) > 1 else None
  found = []
  for name, line, top in _imports(ast.parse(source), '.'.join(folders)):
    root, *rest = name.split('.')

    def refuse(reason, name=name, line=line):
      found.append(f'{path}:{line} imports {name}: {reason}')

    if root in OUTSIDE:
      refuse(f'longjax knows nothing of {root}/')
    if root == 'longjax' and room is not None:
      other = rest[0] if rest else None
      if other not in LEVEL:
        refuse('name the room, not the package')
      elif other != room and not (
        LEVEL[other] < LEVEL[room] or LEVEL[other] == LEVEL[room] == LAST
      ):
        refuse(f'{room} may not import {other}')
      elif room == 'data' and other != room:
        refuse('data stands alone')
      if rest[:2] == ['ops', 'pallas'] and room != 'ops':
        refuse('only ops imports the kernels')
    if room not in ONLY_IN.get(root, {room}):
      refuse(f'{room} does not use {root}')
    if root == 'flax' and folders[:3] == ['longjax', 'ops', 'pallas']:
      refuse('kernels know nothing of layers')
    if root in LAZY and top and path not in EAGER:
      refuse(f'{root} is imported where it is used')
  return found


FILES = sorted(p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES)
def test_imports_go_one_way(path):
  assert violations((ROOT / path).read_text(), path) == []


def test_every_folder_has_a_level():
  folders = {p.parent.relative_to(PACKAGE).parts for p in PACKAGE.rglob('*.py')}
  assert {parts[0] for parts in folders if parts} <= set(LEVEL)


@pytest.mark.parametrize(
  ('path', 'line', 'reason'),
  [
    ('longjax/ops/a.py', 'from longjax.nn import attention', 'may not import'),
    ('longjax/ops/a.py', 'from ..nn import attention', 'may not import nn'),
    ('longjax/ops/a.py', 'from longjax import nn', 'may not import nn'),
    ('longjax/ops/a.py', 'import longjax', 'name the room'),
    ('longjax/nn/a.py', 'from longjax import attention', 'name the room'),
    ('longjax/nn/a.py', 'def f():\n  import longjax.models', 'may not import'),
    ('longjax/patterns/a.py', 'import longjax.positions', 'may not import'),
    ('longjax/nn/a.py', 'from longjax.ops import pallas', 'the kernels'),
    ('longjax/nn/a.py', 'from longjax.ops.pallas import x', 'the kernels'),
    ('longjax/data/a.py', 'import jax.numpy as jnp', 'does not use jax'),
    ('longjax/data/a.py', 'import grain', 'imported where it is used'),
    ('longjax/models/a.py', 'import ml_collections', 'does not use'),
    ('longjax/ops/pallas/a.py', 'import flax', 'ops does not use flax'),
    ('longjax/training/a.py', 'import configs.demo', 'knows nothing'),
    ('longjax/__init__.py', 'from experiments import main', 'knows nothing'),
    ('longjax/training/a.py', 'import tqdm', 'imported where it is used'),
  ],
)
def test_a_wrong_import_is_found(path, line, reason):
  found = violations(line, path)
  assert found, line
  assert any(reason in text for text in found), found


@pytest.mark.parametrize(
  ('path', 'line'),
  [
    ('longjax/nn/a.py', 'from longjax.ops import attention'),
    ('longjax/nn/a.py', 'from . import cache'),
    ('longjax/ops/a.py', 'from longjax.ops.pallas import mosaic_gpu'),
    ('longjax/training/a.py', 'from longjax import data, models'),
    ('longjax/training/a.py', 'import longjax.evaluation.bits'),
    ('longjax/data/a.py', 'def f():\n  import grain'),
    ('longjax/data/builders.py', 'import tensorflow_datasets as tfds'),
  ],
)
def test_a_right_import_is_left_alone(path, line):
  assert violations(line, path) == []
