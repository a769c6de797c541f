"""Decoding with a cache that holds many tokens, behind `worker.serve`.

Started by decoding.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import longjax
from experiments.benchmarks import worker
from longjax.interop import load_llama2c, load_pretrained
from longjax.models import llama

CHUNK = 512  # tokens of a prompt that are read at a time


def pattern_of(spec):
  if spec['window'] is None:
    return longjax.Full()
  return longjax.Lambda(spec['window'], spec['start'])


def load(spec, **options):
  """The model of a spec; the same weights whatever its pattern."""
  options['patterns'] = pattern_of(spec)
  if spec['model'] is None:
    keywords = llama(**spec['sizes'])
    model = longjax.DecoderLM(
      **keywords, **options, rngs=nnx.Rngs(spec['seed'])
    )
    # Of a fresh model attention hardly matters.
    return jax.tree.map(lambda x: 3 * x, model)
  read = load_llama2c if spec['model'].endswith('.bin') else load_pretrained
  return read(spec['model'], dtype='float32', **options)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(graphdef, state, cache, token, count):
  """`count` greedy tokens: (cache, tokens [batch, count], their logits)."""
  model = nnx.merge(graphdef, state)

  def step(carry, _):
    cache, token = carry
    logits, cache = model(token[:, None], cache=cache)
    token = jnp.argmax(logits[:, 0], axis=-1)
    return (cache, token), (token, logits[:, 0])

  (cache, _), out = jax.lax.scan(step, (cache, token), None, length=count)
  return cache, *(x.swapaxes(0, 1) for x in out)


@functools.partial(jax.jit, donate_argnums=0)
def fill(layer, length):
  """A layer's cache as after `length` tokens, with keys made up.

  What a step costs depends on no value.
  """
  slots = layer.positions.shape[1]
  ring = slots - layer.start
  slot = jnp.arange(slots)
  # The newest position that a slot has held.
  newest = slot + (length - 1 - slot) // ring * ring
  newest = jnp.where(slot < layer.start, slot, newest)
  held = jnp.where(newest < length, newest, -1)

  def made_up(y, phase):
    values = jnp.sin(0.7 * jnp.arange(y.size) + phase)
    return values.reshape(y.shape).astype(y.dtype)

  return dataclasses.replace(
    layer,
    keys=made_up(layer.keys, 0.0),
    values=made_up(layer.values, 1.0),
    positions=jnp.broadcast_to(held, layer.positions.shape),
  )


def cache_after(model, length, more):
  """A cache that holds `length` tokens, with room for `more`."""
  cache = model.init_cache(1, max_length=length + more)
  layers = tuple(fill(layer, length) for layer in cache.layers)
  return dataclasses.replace(
    cache, layers=layers, lengths=jnp.full(1, length, jnp.int32)
  )


def setup(spec):
  """Prepares a case: `tokens` greedy tokens after `length`.

  Spec: `model` is a path, or None for `sizes` of `models.llama` and `seed`;
  `window` and `start` are LM-Infinite's, None for a cache of every key. With
  `check` the prompt is really read, and the logits leave beside those of one
  pass over everything with the dense definition.
  """
  model = load(spec)
  graphdef, state = nnx.split(model)
  length, count = spec['length'], spec['tokens']
  if spec['check']:
    return lambda: check(spec, model)
  held = {'cache': cache_after(model, length, count)}
  size = sum(x.nbytes for x in jax.tree.leaves(held['cache']))
  token = jnp.zeros(1, jnp.int32)

  def run():
    # The same tokens again and again: lengths are put back.
    cache = dataclasses.replace(
      held['cache'], lengths=jnp.full(1, length, jnp.int32)
    )
    held['cache'], tokens, _ = decode(graphdef, state, cache, token, count)
    tokens.block_until_ready()
    return {'cache_bytes': np.int64(size)}

  return run


def check(spec, model):
  """Logits of decoding after a prompt, and what they should be."""
  graphdef, state = nnx.split(model)
  length, count = spec['length'], spec['tokens']
  rng = np.random.default_rng(spec['seed'])
  prompt = rng.integers(0, model.vocab_size, (1, length))
  read = jax.jit(lambda tokens, cache: model(tokens, cache=cache)[1])
  cache = model.init_cache(1, max_length=length + count)
  for first in range(0, length - 1, CHUNK):
    cache = read(prompt[:, first : min(first + CHUNK, length - 1)], cache)
  last = jnp.asarray(prompt[:, -1])
  _, tokens, logits = decode(graphdef, state, cache, last, count)
  whole = np.concatenate([prompt, tokens[:, :-1]], axis=1)
  dense = load(spec, implementation='reference')
  wanted = jax.jit(lambda tokens: dense(tokens))(whole)[:, length - 1 :]
  return {'logits': logits, 'wanted': wanted}


if __name__ == '__main__':
  worker.serve(setup, {'jax': jax.__version__, 'longjax': longjax.__version__})
