"""A trace of a few steps, by JAX's profiler."""

import types

import jax
import jax.numpy as jnp

from longjax.training.profile import FIRST, STEPS, Profile


def test_a_few_steps_are_traced_once(tmp_path):
  calls, said = [], []
  meter = types.SimpleNamespace(
    settle=lambda: calls.append('settle'), start=lambda: calls.append('start')
  )
  step = jax.jit(lambda x: jnp.tanh(x @ x))
  x = jnp.ones((8, 8))
  folder = tmp_path / 'profile'
  profile = Profile(folder, meter, said.append)
  for _ in range(FIRST + STEPS + 3):
    x = step(x).block_until_ready()
    profile.stepped()
  profile.close()
  assert calls == ['settle', 'start'] * 2
  assert said == [
    f'a trace of {STEPS} steps is in {folder}: see it with '
    f'xprof --logdir {folder}'
  ]
  [trace] = folder.rglob('*.xplane.pb')
  assert trace.stat().st_size > 100


def test_a_run_that_ends_early_ends_its_trace(tmp_path):
  said = []
  meter = types.SimpleNamespace(settle=lambda: None, start=lambda: None)
  profile = Profile(tmp_path, meter, said.append)
  for _ in range(FIRST + 1):
    profile.stepped()
  profile.close()
  profile.close()
  assert len(said) == 1 and said[0].startswith('a trace of 1 steps')
  assert len([*tmp_path.rglob('*.xplane.pb')]) == 1


def test_no_trace_unless_asked_for(tmp_path):
  profile = Profile(None, None, None)
  for _ in range(FIRST + STEPS):
    profile.stepped()
  profile.close()
