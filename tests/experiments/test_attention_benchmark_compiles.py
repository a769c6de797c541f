"""What the GPU benchmark will run, compiled for an H200 that is not here."""

import re

import jax
import pytest

from experiments.benchmarks import cases, jax_worker
from tests.ops.pallas import compiling

pytestmark = pytest.mark.usefixtures('optimised')

# Bytes in use at most, over those of inputs and results: nothing else of that
# size is there. Longformer adds the rows of global queries; LongNet holds its
# branches' results, and copies where a ratio does not divide its segment.
MOST = {
  'window': 1.05,
  'dilation': 1.05,
  'lambda': 1.05,
  'longformer': 1.6,
  'longnet': 2.7,
}


def compiled(case, mode):
  attend = jax_worker.of_longjax(case, 'mosaic_gpu')

  def forward(q, k, v, dout):
    del dout
    return attend(q, k, v)

  def both(q, k, v, dout):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)

  shape = case.batch, case.length, case.heads, case.size
  array = jax.ShapeDtypeStruct(shape, case.dtype)
  arguments = [array] * 4
  if mode == 'forward':
    return compiling.gpu(forward, *arguments), 4 * 2 * array.size
  return compiling.gpu(both, *arguments), 8 * 2 * array.size


CHOSEN = 'Λ 4096+10, 128k'
CASES = [
  pytest.param(
    case,
    marks=() if case.name == CHOSEN else pytest.mark.full,
    id=case.name,
  )
  for case in cases.all_cases()
  if case.family in MOST
]


@pytest.mark.parametrize('mode', cases.MODES)
@pytest.mark.parametrize('case', CASES)
def test_cases_compile_and_fit(case, mode):
  program, both_ways = compiled(case, mode)
  assert program.kernels
  for kernel in program.kernels:
    assert kernel.spills <= 16, kernel
    assert not kernel.serialized, kernel
  assert program.peak <= MOST[case.family] * both_ways
  # Half of an H200, beside three more processes that hold the same inputs.
  assert program.peak < 70e9
  # Views are addressing; only global keys are gathered.
  if not case.num_globals:
    assert not re.search(r'= \S+ (gather|scatter)\(', program.text)
