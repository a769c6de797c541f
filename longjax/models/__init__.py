"""Models: stacks of `longjax.nn` layers."""

from longjax.models.char_lm import char_lm_large, char_lm_small
from longjax.models.decoder import DecoderLM
from longjax.models.encoder import Encoder
from longjax.models.led import LED
from longjax.models.llama import gptj, llama, mpt
from longjax.models.longformer import Longformer
from longjax.models.longnet import SlideEncoder, longnet

__all__ = [
  'LED',
  'DecoderLM',
  'Encoder',
  'Longformer',
  'SlideEncoder',
  'char_lm_large',
  'char_lm_small',
  'gptj',
  'llama',
  'longnet',
  'mpt',
]
