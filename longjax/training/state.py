"""Parameters as a flat dictionary, and the training step over it.

Parameters are {'layers.0.attention.query.kernel': array, ...}: optimizers
choose by name, checkpoints say names, and the module around them is rebuilt
whenever a stage changes the patterns.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util


def split(model: nnx.Module) -> tuple[Callable, dict]:
  """A module as (merge, parameters): merge(parameters) is the module again.

  Args:
    model: a module, or an abstract one from `nnx.eval_shape`.

  Returns:
    merge, and {dotted name: array}.

  Raises:
    TypeError: for a module with state that is no parameter.
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  if jax.tree.leaves(rest):
    raise TypeError(f'the module has state besides its parameters: {rest}')
  paths = {
    '.'.join(map(str, path)): path for path, _ in nnx.to_flat_state(params)
  }
  flat = traverse_util.flatten_dict(nnx.to_pure_dict(params))

  def merge(parameters: Mapping) -> nnx.Module:
    nested = traverse_util.unflatten_dict(
      {paths[name]: array for name, array in parameters.items()}
    )
    return nnx.merge(graphdef, nested)

  return merge, {name: flat[path] for name, path in paths.items()}


def merge_for(make_model: Callable[[nnx.Rngs], nnx.Module]) -> Callable:
  """`merge` of a module that is not worth initialising."""
  return split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]


def make_train_step(
  loss_fn: Callable,
  merge: Callable,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  micro_batches: int = 1,
  ema_decay: float = 0.0,
) -> Callable:
  """The update, a pure function to be jitted.

  Args:
    loss_fn: (model, batch, dropout key) -> (mean loss, its weight); a weight of
      None is the same for all parts.
    merge: parameters -> model, see `split`.
    optimizer: of the flat parameters.
    seed: of dropout; the key of a step is made from it and the step's number,
      so there is no random state to keep.
    micro_batches: parts of the batch, one after the other; the weighted mean of
      their gradients is taken.
    ema_decay: of state['ema'], when above 0.

  Returns:
    (state, batch, step) -> (state, {'loss', 'gradient_norm'}), with state
    {'params', 'opt_state'} and maybe 'ema'; the norm is before clipping.
  """

  def gradient(params, batch, key):
    """((loss, weight), gradients)"""
    return jax.value_and_grad(
      lambda p: loss_fn(merge(p), batch, key), has_aux=True
    )(params)

  def train_step(state, batch, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    params = state['params']
    if micro_batches == 1:
      (loss, _), gradients = gradient(params, batch, key)
    else:
      # Row r goes to part r % micro_batches, so that each device keeps its own.
      parts = jax.tree.map(
        lambda x: jnp.moveaxis(
          x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0
        ),
        batch,
      )

      def accumulate(total, part_and_number):
        part, number = part_and_number
        (loss, weight), gradients = gradient(
          params, part, jax.random.fold_in(key, number)
        )
        new = loss, gradients
        if weight is not None:
          new = jax.tree.map(lambda x: jnp.float32(weight) * x, new)
        return jax.tree.map(jnp.add, total, new), weight

      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.float32(0), params)
      )
      total, weights = jax.lax.scan(
        accumulate, zeros, (parts, jnp.arange(micro_batches))
      )
      whole = micro_batches
      if weights is not None:
        whole = weights.sum().astype(jnp.float32)
        whole = jnp.where(whole > 0, whole, 1)
      loss, gradients = jax.tree.map(
        lambda x, old: (x / whole).astype(old.dtype),
        total,
        (jnp.float32(0), params),
      )
    updates, opt_state = optimizer.update(gradients, state['opt_state'], params)
    params = optax.apply_updates(params, updates)
    new = {'params': params, 'opt_state': opt_state}
    if ema_decay:
      new['ema'] = jax.tree.map(
        lambda mean, x: ema_decay * mean + (1 - ema_decay) * x,
        state['ema'],
        params,
      )
    return new, {'loss': loss, 'gradient_norm': optax.tree.norm(gradients)}

  return train_step
