"""Flat parameters and the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longjax.training.state import make_train_step, merge_for, split


class Regression(nnx.Module):
  """Two layers; `scale` stands for what a stage changes."""

  def __init__(self, scale, rngs):
    self.scale = scale
    self.layers = nnx.List(nnx.Linear(3, 3, rngs=rngs) for _ in range(2))

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.scale * x


def loss_fn(model, batch, key):
  noise = jax.random.normal(key, ())
  return jnp.mean((model(batch['x']) - batch['y']) ** 2) + 0 * noise, None


@pytest.fixture
def parts():
  merge, params = split(Regression(1.0, nnx.Rngs(0)))
  x, y = jax.random.normal(jax.random.key(1), (2, 8, 3))
  return merge, params, {'x': x, 'y': y}


def run(merge, params, batch, steps=2, **kwargs):
  optimizer = optax.sgd(0.1)
  state = {'params': params, 'opt_state': optimizer.init(params)}
  if kwargs.get('ema_decay'):
    state['ema'] = params
  step_fn = jax.jit(
    make_train_step(loss_fn, merge, optimizer, seed=0, **kwargs)
  )
  for step in range(steps):
    state, outputs = step_fn(state, batch, np.int32(step))
  return state, outputs


def test_split_names_parameters_and_merge_restores(parts):
  merge, params, batch = parts
  assert set(params) == {
    f'layers.{i}.{name}' for i in (0, 1) for name in ('kernel', 'bias')
  }
  model = Regression(1.0, nnx.Rngs(0))
  np.testing.assert_array_equal(merge(params)(batch['x']), model(batch['x']))


def test_parameters_fit_the_module_of_another_stage(parts):
  merge, params, batch = parts
  other = merge_for(lambda rngs: Regression(2.0, rngs))
  np.testing.assert_array_equal(
    other(params)(batch['x']), 2 * merge(params)(batch['x'])
  )


def test_a_step_is_gradient_descent(parts):
  merge, params, batch = parts
  loss, gradients = jax.value_and_grad(
    lambda p: jnp.mean((merge(p)(batch['x']) - batch['y']) ** 2)
  )(params)
  state, outputs = run(merge, params, batch, steps=1)
  assert float(outputs['loss']) == pytest.approx(float(loss))
  norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
  assert float(outputs['gradient_norm']) == pytest.approx(norm)
  for name in params:
    np.testing.assert_allclose(
      state['params'][name], params[name] - 0.1 * gradients[name], atol=1e-6
    )


@pytest.mark.parametrize('micro_batches', [2, 8])
def test_micro_batches_change_nothing_but_memory(parts, micro_batches):
  whole, outputs = run(*parts)
  cut, cut_outputs = run(*parts, micro_batches=micro_batches)
  for name, value in whole['params'].items():
    np.testing.assert_allclose(cut['params'][name], value, atol=1e-6)
  for name, value in outputs.items():
    np.testing.assert_allclose(cut_outputs[name], value, rtol=1e-5)


def test_parts_weigh_what_they_hold(parts):
  """A mean over the rows that count; parts have one of them, or none."""
  merge, params, batch = parts
  batch = batch | {'counts': jnp.array([1, 0, 0, 1, 1, 0, 0, 0])}

  def masked(model, batch, key):
    errors = ((model(batch['x']) - batch['y']) ** 2).mean(axis=1)
    weight = batch['counts'].sum()
    return (errors * batch['counts']).sum() / jnp.maximum(weight, 1), weight

  def step(micro_batches):
    optimizer = optax.sgd(0.1)
    state = {'params': params, 'opt_state': optimizer.init(params)}
    train_step = make_train_step(
      masked, merge, optimizer, seed=0, micro_batches=micro_batches
    )
    return jax.jit(train_step)(state, batch, np.int32(0))

  whole, outputs = step(1)
  cut, cut_outputs = step(4)
  for name, value in whole['params'].items():
    np.testing.assert_allclose(cut['params'][name], value, atol=1e-6)
  for name, value in outputs.items():
    np.testing.assert_allclose(cut_outputs[name], value, rtol=1e-5)


def test_moving_average_by_hand(parts):
  merge, params, batch = parts
  first, _ = run(merge, params, batch, steps=1)
  second, _ = run(merge, params, batch, steps=2, ema_decay=0.9)
  for name, start in params.items():
    mean = 0.9 * start + 0.1 * first['params'][name]
    mean = 0.9 * mean + 0.1 * second['params'][name]
    np.testing.assert_allclose(second['ema'][name], mean, atol=1e-6)


def test_other_state_is_refused():
  class Counter(nnx.Module):
    def __init__(self):
      self.count = nnx.BatchStat(jnp.zeros(()))

  with pytest.raises(TypeError, match='besides its parameters'):
    split(Counter())
