"""Models with numbers drawn by numpy: initializers take long to compile."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def filled(cls, *args, **keywords):
  """cls(*args, **keywords) with matrices of N(0, 1 / inputs) and norms and
  biases that do something; the same numbers for the same shapes."""
  graphdef, abstract = nnx.split(
    nnx.eval_shape(lambda: cls(*args, **keywords, rngs=nnx.Rngs(0)))
  )
  rng = np.random.default_rng(0)
  flat = []
  for path, leaf in nnx.to_flat_state(abstract):
    value = rng.normal(size=leaf.shape)
    if path[-1] == 'kernel':
      value = value / leaf.shape[0] ** 0.5
    elif path[-1] in ('scale', 'bias'):
      value = 0.3 * value + (path[-1] == 'scale')
    flat.append((path, leaf.replace(jnp.asarray(value, leaf.dtype))))
  return nnx.merge(graphdef, nnx.from_flat_state(flat))
