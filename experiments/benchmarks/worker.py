"""A process that holds one implementation and runs it on request.

The benchmarks measure each implementation in a process of its own (another
environment, a fresh peak of memory). Requests come as lines of JSON on standard
input, answers leave as lines of JSON on standard output:

  {"do": "setup", "name": ..., **spec}  prepares a case and warms it up
  {"do": "run", "name": ...}            -> {"seconds": ..., "cpu_seconds": ...}
  {"do": "save", "name": ..., "path"}   writes the results of a run as .npz
  {"do": "drop", "name": ...}           forgets a case
  {"do": "memory"}                      -> {"peak_bytes": ...} of the process

Only the standard library and numpy, any Python from 3.11.
"""

import json
import os
import pathlib
import re
import sys
import time

import numpy as np

PROJECTIONS = ('query', 'key', 'value')


def make_inputs(spec):
  """Returns (weights, hidden, cotangent), the same in every process.

  The cotangent is None in the mode 'forward'.

  Weights are in torch's layout: out = hidden @ weight.T + bias. All is made in
  float32: a larger intermediate array would be part of the peak memory.
  """
  rng = np.random.default_rng(spec['seed'])
  features = spec['heads'] * spec['head_dim']

  def normal(*shape, scale=1.0):
    values = rng.standard_normal(shape, np.float32)
    values *= scale
    return values

  weights = {}
  for name in PROJECTIONS:
    weights[f'{name}.weight'] = normal(features, features, scale=features**-0.5)
    weights[f'{name}.bias'] = normal(features, scale=0.1)
  hidden = normal(1, spec['length'], features)
  if spec['mode'] == 'forward':
    return weights, hidden, None
  return weights, hidden, normal(*hidden.shape)


def make_tokens(spec):
  """(tokens [1, length], targets [1, target_length]), the same everywhere.

  No special tokens, which are the first ones, but a separator at the end.
  """
  rng = np.random.default_rng(spec['seed'])
  sizes = (1, spec['length']), (1, spec['target_length'])
  tokens, targets = (rng.integers(4, spec['vocab_size'], n) for n in sizes)
  tokens[:, -1] = 2
  return tokens, targets


def peak_bytes():
  """Most memory this program ever held (what getrusage says of a process
  begins with what its parent held before the program was started)."""
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])


def serve(setup, versions):
  """Answers requests until standard input ends.

  Args:
    setup: maps a spec (the setup request) to a function that runs the case to
      its end and returns {name: array}.
    versions: {library: version}, for the record.
  """
  # Whatever libraries print must not mix with the answers.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w', buffering=1)
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

  def answer(**values):
    answers.write(json.dumps(values) + '\n')

  answer(versions=versions, peak_bytes=peak_bytes())
  cases = {}
  for line in sys.stdin:
    request = json.loads(line)
    name = request.get('name')
    if request['do'] == 'setup':
      cases[name] = setup(request)
      started = time.perf_counter()
      cases[name]()
      answer(seconds=time.perf_counter() - started)
    elif request['do'] == 'run':
      started, busy = time.perf_counter(), time.process_time()
      cases[name]()
      answer(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - busy,
      )
    elif request['do'] == 'save':
      results = {k: np.asarray(v) for k, v in cases[name]().items()}
      np.savez(request['path'], **results)
      answer()
    elif request['do'] == 'drop':
      del cases[name]
      answer()
    elif request['do'] == 'memory':
      answer(peak_bytes=peak_bytes())
    else:
      raise ValueError(f'unknown request {request}')
