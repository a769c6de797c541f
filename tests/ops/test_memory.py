"""The xla path needs memory linear in the length, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

import longjax

pytestmark = pytest.mark.usefixtures('optimised')

HEADS, SIZE = 4, 16
CASES = {
  'window': (
    longjax.SlidingWindow(64, 64),
    dict(position=longjax.RoPE()),
    (2048, 4096, 8192),
  ),
  'LongNet': (longjax.Dilated((256, 1024), (1, 4)), {}, (4096, 8192)),
  'Lambda': (
    longjax.Lambda(256, 16),
    dict(position=longjax.RoPE()),
    (4096, 8192),
  ),
}


def temporary_bytes(pattern, length, options):
  """What XLA sets aside for the gradient, besides arguments and results."""

  def loss(q, k, v):
    out = longjax.attention(q, k, v, pattern, implementation='xla', **options)
    return (out**2).sum()

  x = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('name', CASES)
def test_memory_of_the_gradient_is_linear_in_the_length(name):
  pattern, options, lengths = CASES[name]
  sizes = [temporary_bytes(pattern, n, options) for n in lengths]
  for shorter, longer in zip(sizes[:-1], sizes[1:], strict=True):
    assert longer <= 2.2 * shorter, f'{lengths}: {sizes} bytes'
  # One head's sheet of logits alone would be more.
  assert sizes[-1] < lengths[-1] ** 2 * 4, sizes
