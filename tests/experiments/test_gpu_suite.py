"""The hardware suite's own judgement, and a rehearsal in the interpreter."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from longjax.ops.pallas import contract
from tests.gpu import cases, correctness


def test_names_lead_to_cases():
  names = correctness.names()
  assert len(set(names)) == len(names) == len(cases.KERNELS) + len(cases.CALLS)
  assert set(cases.REHEARSAL) < set(names)
  for options, arguments in cases.KERNELS.values():
    contract.Spec(**dict(scale=1.0) | options)
    # Heads of one group may not be missing from `residues`.
    if 'residues' in options:
      assert len(options['residues']) == arguments['heads']
      assert max(options['residues']) < arguments['residues']
  features = ('ids', 'prefix', 'prefix_q', 'dropout', 'residues', 'sequences')
  for size in cases.SIZES:
    seen = {
      feature
      for name, (_, arguments) in cases.KERNELS.items()
      for feature in features
      if name.startswith(f'D{size} ') and feature in arguments
    }
    assert seen == set(features), size


def test_comparison_rejects_what_is_wrong():
  allowed = correctness.bounds(jnp.bfloat16, None)
  right = {
    'out': np.array([1.0, -2.0]),
    'lse': np.array([0.5, -np.inf]),
    'dq': np.array([3.0, 0.0]),
  }
  close = right | {'dq': np.array([3.02, 0.0])}
  assert correctness.compare(close, right, allowed)['dq'] < 8e-3
  for name, value in (
    ('out', [1.0, np.nan]),
    ('out', [1.0, -2.1]),
    ('out', [1.0]),
    ('lse', [0.5, 0.0]),
    ('lse', [0.6, -np.inf]),
    ('dq', [3.05, 0.0]),
  ):
    with pytest.raises(correctness.Wrong, match=name):
      correctness.compare(right | {name: np.array(value)}, right, allowed)


def test_results_must_not_change_from_run_to_run():
  count = iter(range(9))

  def steady(x):
    return x + 1

  def moving(x):
    return x + next(count)

  one, other = (np.zeros(2),), (np.ones(2),)
  assert (correctness.repeatedly(steady, one, other) == 1).all()
  with pytest.raises(correctness.Wrong, match='from run to run'):
    correctness.repeatedly(moving, one, other)


def test_rehearsal(tmp_path, capsys):
  arguments = ['--rehearse', f'--record={tmp_path}']
  assert correctness.main(arguments) == 0, capsys.readouterr().out
  record = json.loads((tmp_path / 'correctness.json').read_text())
  assert record['passed'] == len(cases.REHEARSAL) and not record['failed']
  for result in record['results'].values():
    assert {'out', 'lse', 'dq', 'dk', 'dv'} <= result['errors'].keys()
  # No case in time is no success.
  assert correctness.main([*arguments, '--budget-seconds=0']) == 1
  assert '0 passed, 0 failed, 2 not reached' in capsys.readouterr().out
