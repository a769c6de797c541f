"""The weights of an attention, to be looked at."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from longjax.ops.attention import attention
from longjax.patterns import Pattern


def attention_weights(
  q: Float[Array, 'B T H D'],
  k: Float[Array, 'B S K D'],
  pattern: Pattern,
  **options,
) -> Float[Array, 'B H T S']:
  """How much each query attends to each key: c_ij exp(s_ij) / its sum over j.

  By the definition, dense: time grows with the length's third power, memory
  with its square. For pictures of some hundreds of tokens.

  Args:
    q, k, pattern: as of `longjax.attention`.
    **options: its others, but for `implementation` and `return_lse`.

  Returns:
    float32 [batch, heads, length, kv length]. A row sums to 1, or is 0 where a
    query sees no key.

  Raises:
    ValueError: as `longjax.attention`.
  """
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  batch, num_keys, kv_heads, _ = k.shape
  # Of the values 1 0 0 ..., 0 1 0 ... the output is the weights.
  units = jnp.broadcast_to(
    jnp.eye(num_keys)[None, :, None, :], (batch, num_keys, kv_heads, num_keys)
  )
  out = attention(q, k, units, pattern, implementation='reference', **options)
  return out.swapaxes(1, 2)
