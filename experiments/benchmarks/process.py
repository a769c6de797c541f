"""A worker process that may fail, hang or die without taking the run along.

GPU kernels can do all three. Requests and answers are lines of JSON, as in
worker.py; what goes wrong inside a request is an answer, {"error": ...}.
"""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment(rehearse):
  """Of workers that use the GPU or, in a rehearsal, Pallas' interpreter."""
  if not rehearse:
    return {
      'JAX_PLATFORMS': 'cuda,cpu',
      # Several processes share the device.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
  return {
    'JAX_PLATFORMS': 'cpu',
    'CUDA_VISIBLE_DEVICES': '',
    # Threads of XLA's pool, else one for each core: waiting warpgroups would
    # use them all up, and the one they wait for would never run.
    'NPROC': '8',
  }


class Failed(Exception):
  """A request that was not answered as hoped; the text is the reason."""


class Hangs(Failed):
  """There was no answer in time."""


class Process:
  """Runs `python -m module *arguments` when first asked, and again after its
  death; each process is asked by one thread at a time."""

  def __init__(self, python, module, *arguments, environment=None, log=None):
    self._command = [str(python), '-m', module, *arguments]
    self._environment = {
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'PYTHONUNBUFFERED': '1',
      **(environment or {}),
    }
    self._log = log
    self._process = None
    self._buffer = b''
    self._lock = threading.Lock()
    self.ready = {}

  def __call__(self, do, *, within=120, **request):
    """The answer, a dict; Failed if there is none within that many seconds."""
    with self._lock:
      if self._process is None:
        self._start()
      try:
        line = json.dumps({'do': do} | request) + '\n'
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
      except BrokenPipeError:
        pass  # it died; reading says how
      answer = self._read(within, do)
    if 'error' in answer:
      raise Failed(answer['error'])
    return answer

  def _start(self):
    # Of a session of its own, so that what it starts ends with it.
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      cwd=ROOT,
      env=self._environment,
      start_new_session=True,
    )
    self._buffer = b''
    self.ready = self._read(180, 'start')

  def _read(self, within, do):
    out = self._process.stdout
    # Small timeouts, so that a worker's death is seen even if a child of its
    # holds the pipe open.
    waited = 0.0
    while b'\n' not in self._buffer:
      if select.select([out], [], [], 0.5)[0]:
        data = os.read(out.fileno(), 1 << 16)
        if not data:
          code = self.close()
          raise Failed(f'{do}: the process ended with exit code {code}')
        self._buffer += data
        continue
      waited += 0.5
      if waited >= within:
        self.close()
        raise Hangs(f'{do}: no answer within {within:.0f} s, ended')
    line, self._buffer = self._buffer.split(b'\n', 1)
    return json.loads(line)

  def close(self):
    """Ends the process, if it runs; the next request starts another."""
    if self._process is None:
      return None
    process, self._process = self._process, None
    process.stdin.close()
    try:
      process.wait(2)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    process.stdout.close()
    return process.returncode


def serve(commands, **ready):
  """Answers requests until standard input ends.

  Args:
    commands: {name: function of the request's other values -> dict}.
    **ready: said first.
  """
  # Whatever libraries print must not mix with the answers.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w', buffering=1)
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  answers.write(json.dumps(ready) + '\n')
  for line in sys.stdin:
    request = json.loads(line)
    do = request.pop('do')
    try:
      answer = commands[do](**request) or {}
    except Exception as error:
      traceback.print_exc()
      # The first lines hold the reason; compilers append pages.
      reason = f'{type(error).__name__}: {error}'.strip()
      # Folders are of this machine only.
      reason = re.sub(r'(/[\w.+-]+)+/', '', reason)
      answer = {'error': reason[:600]}
    answers.write(json.dumps(answer) + '\n')
