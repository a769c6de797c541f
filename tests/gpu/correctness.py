"""longjax's GPU kernels on hardware, against their definitions in float32.

  python -m experiments.benchmarks.correctness --record=FOLDER

Not part of `make test`, which has no GPU; `make gpu` runs it. Cases are in
cases.py. Kernels are compared with tests/ops/pallas/oracle.py, whole calls with
longjax's reference: outputs, log-sum-exps and every gradient, on the same
inputs, three times over with other inputs in between (results must be equal
to the bit). Cases run in several processes, since most of the time is
compiling, and since a kernel that hangs should cost one case only: this is why
it is no pytest suite. FOLDER gets correctness.json. `--rehearse` runs a few
cases in Pallas' interpreter on a CPU.
"""

import argparse
import importlib
import json
import os
import pathlib
import queue
import re
import sys
import threading
import time

from experiments.benchmarks import process

CASE_SECONDS = 100
# On a GPU; the interpreter is as steady as it is slow.
RUNS = 3


# In the worker.


class Wrong(Exception):
  """Results that differ from the definition, or from run to run."""


def bounds(dtype, soft_cap, rotated=False):
  """{name: largest error allowed}, of the largest entry."""
  import jax.numpy as jnp

  narrow = jnp.dtype(dtype) == jnp.bfloat16
  allowed = {
    'out': 4e-3 if narrow else 1e-3,
    # The hardware's tanh is good to 5e-4.
    'lse': 5e-3 if soft_cap else 1e-4,
    'gradient': 8e-3 if narrow else 2e-3,
  }
  if rotated:
    # Queries and keys are rounded once more, after the rotation.
    allowed |= {'out': 3 * allowed['out'], 'lse': 2e-3}
  return allowed


def compare(got, wanted, allowed):
  """{name: error}; raises Wrong. lse must be -inf in the same places."""
  import numpy as np

  errors, wrong = {}, []
  for name, want in wanted.items():
    have, want = (np.asarray(x, np.float64) for x in (got[name], want))
    if have.shape != want.shape:
      raise Wrong(f'{name} has shape {have.shape} instead of {want.shape}')
    if name == 'lse':
      if not np.array_equal(have == -np.inf, want == -np.inf):
        raise Wrong('lse is -inf in other places')
      have, want = (np.where(want == -np.inf, 0, x) for x in (have, want))
    largest = max(np.abs(want).max(initial=0.0), 1e-2)
    errors[name] = float(np.abs(have - want).max(initial=0.0) / largest)
    if not errors[name] <= allowed.get(name, allowed['gradient']):
      wrong.append(f'{name} by {errors[name]:.2g}')
  if wrong:
    raise Wrong(f'off: {", ".join(wrong)}; all errors: {errors}')
  return errors


def repeatedly(run, arguments, others, runs=RUNS):
  """The result of `run`, which must be the same each time."""
  import jax
  import numpy as np

  first = jax.tree.map(np.asarray, run(*arguments))
  for _ in range(runs - 1):
    jax.block_until_ready(run(*others))
    again = jax.tree.map(np.asarray, run(*arguments))
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
      if a.tobytes() != b.tobytes():
        raise Wrong('results differ from run to run')
  return first


def check_kernel(name, implementation):
  import jax
  import jax.numpy as jnp

  from longjax.ops.pallas import contract
  from tests.gpu import cases
  from tests.ops.pallas import oracle

  module = importlib.import_module(f'longjax.ops.pallas.{implementation}')
  interpret = interpreter()
  options, arguments = cases.KERNELS[name]
  spec = contract.Spec(**dict(scale=0.2) | options)
  x, other = (oracle.operands(seed, **arguments) for seed in (0, 1))
  module.check(spec, x)

  def cotangents(x, seed):
    keys = jax.random.split(jax.random.key(seed))
    g, p, r, h, _ = x.q.shape
    residues = 1 if spec.residues else r
    dout = jax.random.normal(keys[0], x.q.shape, x.q.dtype)
    return dout, jax.random.normal(keys[1], (g, residues, h, p))

  @jax.jit
  def definition(x, dout, dlse):
    return oracle.forward_and_backward(spec, x, dout, dlse)

  @jax.jit
  def kernels(x, lse, delta, dout):
    out, own_lse = module.forward(spec, x, interpret=interpret)
    gradients = module.backward(spec, x, lse, delta, dout, interpret=interpret)
    return out, own_lse, gradients

  sets = []
  for seed, y in enumerate((x, other)):
    dout, dlse = cotangents(y, seed)
    with jax.default_matmul_precision('highest'):
      out, lse, delta, gradients = definition(y, dout, dlse)
    # Rows that see nothing give no gradient: see the contract.
    saved = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    sets.append(((y, saved, delta, dout), (out, lse, gradients)))
  (given, (out, lse, gradients)), (others, _) = sets
  got_out, got_lse, got = repeatedly(
    kernels, given, others, 1 if interpret else RUNS
  )

  def named(out, lse, gradients):
    values = {'out': out, 'lse': lse} | {
      f'd{field}': y
      for field, y in gradients._asdict().items()
      if y is not None
    }
    return values

  return compare(
    named(got_out, got_lse, got),
    named(out, lse, gradients),
    bounds(x.q.dtype, spec.soft_cap),
  )


def check_call(name, implementation):
  import jax
  import jax.numpy as jnp

  import longjax
  from tests.gpu import cases
  from tests.ops.helpers import normal, qkv

  pattern, arguments, options = cases.CALLS[name]

  def both(implementation, dtype):
    def call(q, k, v):
      return longjax.attention(
        *(y.astype(dtype) for y in (q, k, v)),
        pattern,
        implementation=implementation,
        return_lse=True,
        **options,
      )

    def run(q, k, v, dout, dlse):
      (out, lse), pull = jax.vjp(call, q, k, v)
      dq, dk, dv = pull((dout.astype(out.dtype), dlse))
      return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

    return jax.jit(run)

  sets = []
  for seed in (0, 1):
    q, k, v = qkv(seed, **arguments)
    dout = normal(seed + 7, *q.shape, dtype=q.dtype)
    sets.append((q, k, v, dout, normal(seed + 9, *q.shape[:3])))
  with interpreting():
    runs = 1 if interpreter() else RUNS
    got = repeatedly(both(implementation, q.dtype), *sets, runs)
  with jax.default_matmul_precision('highest'):
    wanted = both('reference', jnp.float32)(*sets[0])
  return compare(
    got,
    wanted,
    bounds(q.dtype, options.get('logit_soft_cap'), 'position' in options),
  )


def interpreter():
  """What `interpret` is; None on a GPU."""
  import jax

  if jax.default_backend() == 'gpu':
    return None
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.InterpretGPUParams()


def interpreting():
  import contextlib

  params = interpreter()
  if params is None:
    return contextlib.nullcontext()
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.force_gpu_interpret_mode(params)


def names():
  """All cases; first those of the usual head sizes."""
  from tests.gpu import cases

  found = [f'kernel: {name}' for name in cases.KERNELS]
  found += [f'call: {name}' for name in cases.CALLS]
  return sorted(found, key=lambda name: bool(re.search('D(32|96|256)', name)))


def check(name, implementation):
  kind, _, own = name.partition(': ')
  function = {'kernel': check_kernel, 'call': check_call}[kind]
  return {'errors': function(own, implementation)}


def work():
  import jax

  device = jax.devices()[0]
  process.serve(
    {'check': check, 'names': lambda: {'names': names()}},
    device=device.device_kind,
    jax=jax.__version__,
  )


# In the parent, which holds no GPU.


def run(todo, workers, implementation, deadline, report):
  """Checks the cases; returns {name: what came of it}."""
  waiting, results = queue.SimpleQueue(), {}
  for name in todo:
    waiting.put(name)

  def one(worker):
    while time.monotonic() < deadline:
      try:
        name = waiting.get_nowait()
      except queue.Empty:
        return
      started = time.monotonic()
      try:
        result = worker(
          'check',
          within=CASE_SECONDS,
          name=name,
          implementation=implementation,
        )
      except process.Failed as failure:
        result = {'failed': str(failure)}
        if 'CUDA' in str(failure):
          worker.close()  # whatever comes after that fails too
      result['wall'] = round(time.monotonic() - started, 1)
      results[name] = result
      report(name, result)

  threads = [threading.Thread(target=one, args=(w,)) for w in workers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def parse(arguments):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--record', help='folder for correctness.json')
  add('--only', default='', help='part of the names of cases')
  add('--implementation', default='mosaic_gpu')
  add('--workers', type=int, default=6)
  add('--budget-seconds', type=float, default=1e9)
  add('--rehearse', action='store_true', help='a few cases, on a CPU')
  add('--worker', action='store_true', help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments=None):
  """Returns the exit code: 1 if a case failed or none passed."""
  args = parse(arguments)
  if args.worker:
    return work()
  environment = process.environment(args.rehearse)
  if not args.rehearse:
    # Most of the time is compiling, and how fast XLA's part is matters not.
    flags = os.environ.get('XLA_FLAGS', '')
    environment['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'
  folder = pathlib.Path(args.record) if args.record else None
  log = None
  if folder:
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / 'correctness.log', 'ab')
  count = 1 if args.rehearse else args.workers
  workers = [
    process.Process(
      sys.executable,
      'experiments.benchmarks.correctness',
      '--worker',
      environment=environment,
      log=log,
    )
    for _ in range(count)
  ]
  try:
    todo = workers[0]('names')['names']
    if args.rehearse:
      os.environ.setdefault('JAX_PLATFORMS', 'cpu')
      from tests.gpu.cases import REHEARSAL

      todo = REHEARSAL
    todo = [name for name in todo if args.only in name]

    def report(name, result):
      if 'failed' in result:
        print(f'FAILED {name}: {result["failed"][:400]}', flush=True)

    deadline = time.monotonic() + args.budget_seconds
    results = run(todo, workers, args.implementation, deadline, report)
    about = dict(workers[0].ready)
  finally:
    for worker in workers:
      worker.close()
    if log:
      log.close()
  failed = [name for name in todo if 'failed' in results.get(name, {})]
  passed = [name for name in todo if 'errors' in results.get(name, {})]
  missing = [name for name in todo if name not in results]
  if folder:
    (folder / 'correctness.json').write_text(
      json.dumps(
        about
        | {
          'rehearsal': args.rehearse,
          'passed': len(passed),
          'failed': failed,
          'not_reached': missing,
          'results': results,
        },
        indent=1,
      )
    )
  print(
    f'correctness: {len(passed)} passed, {len(failed)} failed, {len(missing)} '
    'not reached'
  )
  return 0 if passed and not failed else 1
