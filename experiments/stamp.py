"""What a figure needs beside it: command, commit, date, device, versions.

Every program that writes figures writes `stamp(...)` with them, and
`experiments.record` makes and checks records by it. Imports no JAX until a
device is asked for, so that a program may choose its cores first.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
# The starts of a run, in its work folder.
STARTS = 'starts.jsonl'

# An absolute path, of which only the last part is of interest; no URL.
_PART = r"""[^\s/'",:;=<>()]"""
_PLACE = re.compile(rf'(?<![\w.~:/<-])(?:/{_PART}+)+/(?={_PART})')
_PASSWORD = re.compile(r'(?<=://)([^\s:/@]*):[^\s/@]*(?=@)')


def stamp(command: str, device: str | None = None) -> dict:
  """What is known of this program.

  Args:
    command: how it was called, see `command`.
    device: what it computed on; None: JAX's devices.
  """
  return {
    'command': command,
    'commit': commit(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'device': device or device_of_jax(),
    'load_average': [round(x, 2) for x in os.getloadavg()],
    'versions': versions(),
  }


def command(module: str, arguments: list[str] | None = None) -> str:
  """The command line of a module, without passwords and places.

  Args:
    module: as after `python -m`.
    arguments: as a `main` gets them; None: this process's own.
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  words = ['python', '-m', module, *map(without_places, arguments)]
  return shlex.join(words)


def without_places(value):
  """A string, or JSON's lists and dictionaries of them, fit to be published.

  Of absolute paths the last part is left: where a file lay is of no interest.
  The password of a URL becomes ***.
  """
  if isinstance(value, str):
    return _PASSWORD.sub(r'\1:***', _PLACE.sub('', value))
  if isinstance(value, dict):
    return {k: without_places(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [without_places(v) for v in value]
  return value


def commit() -> str | None:
  """The commit, with '+' where tracked files differ from it.

  $COMMIT where it is set, for a machine that has the files without git; None
  where nobody knows.
  """
  if os.environ.get('COMMIT'):
    return os.environ['COMMIT']

  def git(*arguments):
    return subprocess.run(
      ('git', *arguments), cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()

  try:
    head = git('rev-parse', 'HEAD')
    changed = git('status', '--porcelain', '--untracked-files=no')
  except OSError:
    return None
  return head + ('+' if changed else '') if head else None


def _processor() -> str:
  with contextlib.suppress(OSError), open('/proc/cpuinfo') as lines:
    for line in lines:
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor() or platform.machine()


def cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu() -> str:
  """'AMD EPYC, x86_64, 2 cores'."""
  return f'{_processor()}, {platform.machine()}, {cores()} cores'


def device_of_jax() -> str:
  """'8 x NVIDIA H200', or what `cpu` says."""
  import jax

  first = jax.devices()[0]
  if first.platform == 'cpu':
    return cpu()
  return f'{jax.device_count()} x {first.device_kind}'


def versions() -> dict[str, str]:
  """Of Python and of what the figures depend on."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def write_start(workdir: str | os.PathLike, command: str) -> None:
  """Adds a line to the folder's `starts.jsonl`: a run may be started often."""
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / STARTS).open('a') as file:
    file.write(json.dumps(stamp(command)) + '\n')


def read_starts(workdir: str | os.PathLike) -> list[dict]:
  """What `write_start` wrote, oldest first; [] where there is nothing."""
  path = pathlib.Path(workdir) / STARTS
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]
