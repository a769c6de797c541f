"""The README's Python runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS = re.findall(
  r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S
)


def test_there_are_blocks():
  assert BLOCKS


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_block_runs(number):
  exec(compile(BLOCKS[number], f'README.md block {number}', 'exec'), {})
