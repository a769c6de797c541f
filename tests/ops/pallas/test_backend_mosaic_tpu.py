"""The TPU kernels as an implementation of attention, interpreted."""

import contextlib

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tests.ops.attention_tests import AttentionTests

INTERPRET = pltpu.InterpretParams(detect_races=True)


class TestMosaicTpu(AttentionTests):
  name = 'mosaic_tpu'
  size = 64
  dtype = jnp.bfloat16
  bounds = dict(out=6e-3, lse=1e-4, gradient=1e-2)
  refused = {
    'ALiBi': 'ALiBi changes logits',
    'xPos': 'XPos changes logits',
    'Transformer-XL': 'TransformerXL changes logits',
    'positions one by one': 'keys in any order',
    'start keys of documents': 'segment_ids with Lambda',
    'LongNet in documents': 'segment_ids with Dilated',
    'LongNet from a position': 'known only for a plain 0',
    'dilation by row': 'positions of each batch row',
    'another value size': 'value size 40',
    'float16': 'float16',
  }

  @contextlib.contextmanager
  def running(self):
    try:
      with pltpu.force_tpu_interpret_mode(INTERPRET):
        yield
    finally:
      # An exception in one test must not be another's.
      pltpu.reset_tpu_interpret_mode_state()
