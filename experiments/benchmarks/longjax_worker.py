"""longjax's attention, and JAX's full attention, behind `worker.serve`.

Started by cpu_attention.py.
"""

import jax
import worker

import longjax


def setup(spec):
  """Prepares a case, compiled and with its inputs in place.

  Spec: `attention` is 'window' (longjax, `side` keys on each side) or 'full'
  (jax.nn.dot_product_attention); `projections` says whether q, k and v are
  projected from the hidden states, as in Hugging Face's layer, or given;
  `mode` is 'forward' or 'forward+backward'.
  """
  heads, head_dim = spec['heads'], spec['head_dim']
  weights, hidden, cotangent = jax.device_put(worker.make_inputs(spec))

  def layer(weights, hidden):
    if spec['projections']:
      q, k, v = (
        hidden @ weights[f'{name}.weight'].T + weights[f'{name}.bias']
        for name in worker.PROJECTIONS
      )
    else:
      # The same three times: nothing but attention is timed.
      q = k = v = hidden
    q, k, v = (x.reshape(*x.shape[:2], heads, head_dim) for x in (q, k, v))
    if spec['attention'] == 'full':
      output = jax.nn.dot_product_attention(q, k, v)
    else:
      pattern = longjax.SlidingWindow(spec['side'], spec['side'])
      output = longjax.attention(q, k, v, pattern, implementation='xla')
    return output.reshape(hidden.shape)

  @jax.jit
  def forward(weights, hidden, cotangent):
    return {'output': layer(weights, hidden)}

  @jax.jit
  def forward_and_backward(weights, hidden, cotangent):
    output, vjp = jax.vjp(layer, weights, hidden)
    d_weights, d_hidden = vjp(cotangent)
    return {'output': output, 'd_hidden': d_hidden} | {
      f'd_{name}': value for name, value in d_weights.items()
    }

  run = forward if spec['mode'] == 'forward' else forward_and_backward
  arguments = (weights, hidden, cotangent)
  compiled = run.lower(*arguments).compile()
  return lambda: jax.block_until_ready(compiled(*arguments))


if __name__ == '__main__':
  worker.serve(setup, {'jax': jax.__version__, 'longjax': longjax.__version__})
