"""longjax's Longformer and LED behind `worker.serve`.

Started by cpu_models.py.
"""

import jax
import jax.numpy as jnp
import optax
import worker

import longjax
from longjax.interop import load_pretrained
from longjax.training.optimizer import make_optimizer
from longjax.training.state import split


def setup(spec):
  """A case, compiled: 'forward' or 'training step'."""
  training = spec['mode'] == 'training step'
  model = load_pretrained(spec['folder'], remat=training)
  merge, params = split(model)
  del model
  tokens, targets = worker.make_tokens(spec)
  is_led = spec['model'] == 'led'
  labels = targets if is_led else jnp.ones(1, jnp.int32)

  def logits_of(params, tokens):
    model = merge(params)
    if not is_led:
      return model(tokens)
    start = jnp.full((len(labels), 1), model.decoder_start_token)
    return model(tokens, jnp.concatenate([start, labels[:, :-1]], axis=1))

  if not training:
    forward = jax.jit(logits_of).lower(params, tokens).compile()
    return lambda: jax.block_until_ready({'logits': forward(params, tokens)})

  # Without effect, so that every step is the same.
  optimizer = make_optimizer(lambda step: 0.0, clip_norm=None)

  def loss_of(params, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits_of(params, tokens), labels
    ).mean()

  def step(params, state, tokens):
    loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
    updates, state = optimizer.update(gradients, state, params)
    results = {'loss': loss}
    if spec.get('check'):
      names = [name for name in params if name.endswith('embedding')]
      (name,) = (n for n in names if params[n].shape[0] == spec['vocab_size'])
      results['gradient'] = gradients[name]
    return optax.apply_updates(params, updates), state, results

  state = params, jax.jit(optimizer.init)(params)
  del params
  compiled = (
    jax.jit(step, donate_argnums=(0, 1)).lower(*state, tokens).compile()
  )

  def run():
    nonlocal state
    *state, results = compiled(*state, tokens)
    return jax.block_until_ready(results)

  return run


if __name__ == '__main__':
  worker.serve(setup, {'jax': jax.__version__, 'longjax': longjax.__version__})
