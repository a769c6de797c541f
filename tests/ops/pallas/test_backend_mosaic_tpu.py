"""The TPU kernels as an implementation of attention, interpreted."""

import contextlib

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tests.ops.attention_tests import (
  REFUSED_BY_KERNELS,
  AttentionTests,
  interpreted_against_the_definition,
)

INTERPRET = pltpu.InterpretParams(detect_races=True)


class TestMosaicTpu(AttentionTests):
  name = 'mosaic_tpu'
  size = 64
  dtype = jnp.bfloat16
  bounds = dict(out=6e-3, lse=1e-4, gradient=1e-2)
  refused = REFUSED_BY_KERNELS | {
    'float16': 'float16',
  }
  test_against_the_definition = interpreted_against_the_definition()

  @contextlib.contextmanager
  def running(self):
    try:
      with pltpu.force_tpu_interpret_mode(INTERPRET):
        yield
    finally:
      # An exception in one test must not be another's.
      pltpu.reset_tpu_interpret_mode_state()
