"""Whole calls of attention, compiled for devices that are not there.

Beside the kernels nothing is to be left that moves q, k or v more often than
their layout asks, and nothing of length x length.
"""

import jax
import jax.numpy as jnp
import pytest

import longjax
from tests.ops.pallas import compiling

LENGTH, HEADS, SIZE = 131_072, 8, 128
ARRAY = LENGTH * HEADS * SIZE * 2  # bytes of q, k, v or out
PAPER = longjax.Dilated(
  (2048, 4096, 8192, 16384, 32768, 65536), (1, 2, 4, 6, 12, 16)
)
# Forward and backward: kernels, and how many arrays of the size of q a layer
# holds at once at most, arguments and results among them: on GPU and on TPU.
PATTERNS = {
  'window': (longjax.SlidingWindow(512), 3, 10, 20),
  'dilation': (longjax.SlidingWindow(512, dilation=4), 3, 10, 20),
  'Lambda': (longjax.Lambda(4096, 10), 4, 12, 23),
  'LongNet': (PAPER, 18, 21, 49),
}


def inputs():
  x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, SIZE), jnp.bfloat16)
  return x, x, x


def layer(implementation, pattern):
  def both(*x):
    def forward(*x):
      return longjax.attention(
        *x, pattern, position=longjax.RoPE(), implementation=implementation
      )

    out, pull = jax.vjp(forward, *x)
    return out, pull(out)

  return both


@pytest.mark.parametrize('name', PATTERNS)
def test_a_layer_of_131072_tokens_on_gpu(name):
  pattern, kernels, ceiling, _ = PATTERNS[name]
  program = compiling.gpu(layer('mosaic_gpu', pattern), *inputs())
  arrays = program.peak / ARRAY
  assert arrays <= ceiling, f'{arrays:.1f} arrays'
  assert len(program.kernels) <= kernels


# Two minutes of the TPU's compiler for so many kernels.
_LONG = pytest.param('LongNet', marks=pytest.mark.full)


@pytest.mark.parametrize('name', ['window', 'dilation', 'Lambda', _LONG])
def test_a_layer_of_131072_tokens_on_tpu(name):
  pattern, _, _, ceiling = PATTERNS[name]
  program = compiling.tpu('v5e', layer('mosaic_tpu', pattern), *inputs())
  arrays = program.peak / ARRAY
  assert arrays <= ceiling, f'{arrays:.1f} arrays'
