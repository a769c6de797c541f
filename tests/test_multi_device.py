"""Runs the files of tests/multi_device, each in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(p.name for p in (ROOT / 'tests/multi_device').glob('test_*.py'))


@pytest.mark.parametrize('file', FILES)
def test_on_eight_fake_devices(file, request):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'pytest',
      '-q',
      '-p',
      'no:cacheprovider',
      '-m',
      request.config.getoption('-m'),
      f'tests/multi_device/{file}',
    ],
    cwd=ROOT,
    env=os.environ | {'LONGJAX_FAKE_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
  assert ' passed' in done.stdout
