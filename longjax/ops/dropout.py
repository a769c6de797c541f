"""Which attention entries are dropped: a hash that every backend shares.

An entry is named by (key, batch row, query head, query position, key
position), so the same entries fall in every branch, block size and backend, in
the forward and the backward pass, and no mask is ever stored.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

_GOLDEN = np.uint32(0x9E3779B9)


def seed_of(key) -> UInt32[Array, '2']:
  """Two words from a JAX random key (typed or raw)."""
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  words = key.reshape(-1).astype(jnp.uint32)
  return jnp.stack([words[0], words[-1]])


def _mix(x):
  """MurmurHash3's 32-bit finalizer: every input bit moves every output bit."""
  x = x ^ (x >> 16)
  x = x * np.uint32(0x85EBCA6B)
  x = x ^ (x >> 13)
  x = x * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _u32(x):
  return jnp.asarray(x).astype(jnp.uint32)


def query_words(
  seed: UInt32[Array, '2'],
  row: Int[Array, '...'],
  head: Int[Array, '...'],
  q_position: Int[Array, '...'],
) -> UInt32[Array, '...']:
  """What the query's side adds to an entry's hash; broadcasts."""
  word = _mix(seed[0] ^ _mix(_u32(row) + _GOLDEN))
  word = _mix(word ^ _mix(_u32(head) + _GOLDEN))
  return _mix(word ^ _u32(q_position))


def key_words(
  seed: UInt32[Array, '2'], k_position: Int[Array, '...']
) -> UInt32[Array, '...']:
  """What the key's side adds to an entry's hash."""
  return _mix(seed[1] ^ (_u32(k_position) * _GOLDEN))


def keep(
  rate: float, query: UInt32[Array, '...'], key: UInt32[Array, '...']
) -> Bool[Array, '...']:
  """Which entries are kept, from the words of both sides."""
  bits = _mix(query + key)
  return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def keep_mask(
  seed: UInt32[Array, '2'],
  rate: float,
  row: Int[Array, '...'],
  head: Int[Array, '...'],
  q_position: Int[Array, '...'],
  k_position: Int[Array, '...'],
) -> Bool[Array, '...']:
  """Which entries are kept, each with probability 1 - rate; broadcasts."""
  query = query_words(seed, row, head, q_position)
  return keep(rate, query, key_words(seed, k_position))
