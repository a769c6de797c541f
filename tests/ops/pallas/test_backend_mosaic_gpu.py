"""The GPU kernels as an implementation of attention, interpreted."""

import contextlib

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ops.attention_tests import (
  REFUSED_BY_KERNELS,
  AttentionTests,
  interpreted_against_the_definition,
)
from tests.ops.pallas import interpreting


class TestMosaicGpu(AttentionTests):
  name = 'mosaic_gpu'
  size = 64
  dtype = jnp.bfloat16
  bounds = dict(out=6e-3, lse=1e-4, gradient=1e-2)
  refused = REFUSED_BY_KERNELS | {
    'head size 24': 'head size 24',
    'float32': 'not float32',
  }
  test_against_the_definition = interpreted_against_the_definition()

  @contextlib.contextmanager
  def running(self):
    with (
      interpreting.interpreter(),
      plgpu.force_gpu_interpret_mode(interpreting.INTERPRET),
    ):
      yield
