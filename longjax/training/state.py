"""Parameters as a flat dictionary, and the training step over it.

Parameters are {'layers.0.attention.query.kernel': array, ...}: optimizers
choose by name, checkpoints say names, and the module around them is rebuilt
whenever a stage changes the patterns.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from longjax.sharding import shards


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
  sum_over_parts: Callable | None = None,
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
    sum_over_parts: of several devices, see `longjax.training.devices.Devices`.

  Returns:
    (state, batch, step) -> (state, {'loss', 'gradient_norm'}), with state
    {'params', 'opt_state'} and maybe 'ema'; the norm is before clipping.
  """

  def sums(params, batch, key, whole):
    """((weighted loss, weight), gradients of that) of a part of the batch."""

    def weighted_loss(params, batch, key):
      loss, weight = loss_fn(merge(whole(params)), batch, key)
      if weight is None:
        return loss, jnp.float32(1)
      weight = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
      return loss * weight, weight

    gradient = jax.value_and_grad(weighted_loss, has_aux=True)
    if micro_batches == 1:
      return gradient(params, batch, key)
    # Row r goes to part r % micro_batches, so that each device keeps its own.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0),
      batch,
    )

    def accumulate(total, part_and_number):
      part, number = part_and_number
      new = gradient(params, part, jax.random.fold_in(key, number))
      return jax.tree.map(jnp.add, total, shards.here(new)), None

    zeros = jax.tree.map(
      lambda x: jnp.zeros(jnp.shape(x), jnp.float32), ((0.0, 0.0), params)
    )
    numbered = parts, jnp.arange(micro_batches)
    return jax.lax.scan(accumulate, shards.here(zeros), numbered)[0]

  if sum_over_parts is None:
    total = functools.partial(sums, whole=lambda params: params)
  else:
    total = sum_over_parts(sums)

  def train_step(state, batch, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    params = state['params']
    (loss, weight), gradients = total(params, batch, key)
    weight = jnp.where(weight > 0, weight, 1)
    loss, gradients = jax.tree.map(
      lambda x, old: (x / weight).astype(old.dtype),
      (loss, gradients),
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
