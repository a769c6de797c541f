"""Optimizers: which parameter is updated how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax.training.optimizer import is_decayed, is_matrix, make_optimizer

PARAMS = {
  'embedding.embedding': jnp.ones((8, 4)),
  'layers.0.attention.query.kernel': jnp.ones((4, 4)),
  'layers.0.mlp.up.kernel': jnp.ones((4, 16)),
  'layers.0.mlp.up.bias': jnp.ones(16),
  'layers.0.norm.scale': jnp.ones(4),
  'content_bias': jnp.ones((2, 2)),
}


def updates(gradients, **kwargs):
  optimizer = make_optimizer(lambda step: 0.1, **kwargs)
  state = optimizer.init(PARAMS)
  return optimizer.update(gradients, state, PARAMS)[0]


def gradients():
  keys = jax.random.split(jax.random.key(0), len(PARAMS))
  return {
    name: jax.random.normal(key, p.shape)
    for key, (name, p) in zip(keys, PARAMS.items(), strict=True)
  }


def test_which_parameters():
  assert set(filter(is_matrix, PARAMS)) == {
    'layers.0.attention.query.kernel',
    'layers.0.mlp.up.kernel',
  }
  assert set(filter(is_decayed, PARAMS)) == {
    'embedding.embedding',
    'layers.0.attention.query.kernel',
    'layers.0.mlp.up.kernel',
  }


def test_adamw_first_step_by_hand():
  got = updates(
    gradients(), name='adamw', weight_decay=0.5, clip_norm=None, eps=0.0
  )
  for name, g in gradients().items():
    decay = 0.5 * is_decayed(name)
    want = -0.1 * (np.sign(g) + decay * PARAMS[name])
    np.testing.assert_allclose(got[name], want, rtol=1e-4)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
  g = gradients()
  got = updates(g, name='muon', weight_decay=0.0, clip_norm=None)
  adam = updates(g, name='adamw', weight_decay=0.0, clip_norm=None)
  for name, update in got.items():
    if is_matrix(name):
      # Newton-Schulz brings every singular value near one another, at
      # AdamW's size: 0.2 * sqrt(larger side) * learning rate.
      values = np.linalg.svd(update, compute_uv=False)
      scale = 0.1 * 0.2 * np.sqrt(max(update.shape))
      assert (values > 0.6 * scale).all() and (values < 1.3 * scale).all()
    else:
      np.testing.assert_allclose(update, adam[name], rtol=1e-5)


def test_clipping_scales_the_gradient_to_the_norm():
  # Adam forgets the gradient's size; its first moment does not.
  optimizer = make_optimizer(lambda step: 0.1, clip_norm=0.25)
  state = optimizer.init(PARAMS)
  _, state = optimizer.update(gradients(), state, PARAMS)
  moments = [x for x in jax.tree.leaves(state) if x.shape == (4, 16)][0]
  norm = np.sqrt(sum(float((g**2).sum()) for g in gradients().values()))
  want = 0.1 * gradients()['layers.0.mlp.up.kernel'] * 0.25 / norm
  np.testing.assert_allclose(moments, want, rtol=1e-5)


def test_unknown_optimizer():
  with pytest.raises(ValueError, match="'sgd' is not one of"):
    make_optimizer(lambda step: 0.1, name='sgd')


def test_only_some_are_trained():
  """Clipped by their own norm, in the same way as if they were alone."""
  grads = gradients()
  some = updates(grads, only='layers.0.mlp', clip_norm=1e-3)
  alone = {n: g for n, g in grads.items() if n.startswith('layers.0.mlp')}
  optimizer = make_optimizer(lambda step: 0.1, clip_norm=1e-3)
  params = {name: PARAMS[name] for name in alone}
  wanted, _ = optimizer.update(alone, optimizer.init(params), params)
  for name, update in some.items():
    expected = wanted.get(name, np.zeros_like(update))
    np.testing.assert_allclose(update, expected, err_msg=name)
  assert len(wanted) == 2
  with pytest.raises(ValueError, match="no parameter begins with 'layer.0'"):
    updates(grads, only='layer.0')


def test_no_clipping():
  grads = {name: 100 * g for name, g in gradients().items()}
  for name, update in updates(grads, clip_norm=None).items():
    assert np.abs(update).max() > 0.01
    zero = updates(grads, clip_norm=0.0)[name]
    np.testing.assert_array_equal(zero, update, err_msg=name)
