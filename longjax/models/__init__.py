"""Models: stacks of `longjax.nn` layers."""

from longjax.models.decoder import DecoderLM, char_lm_large, char_lm_small
from longjax.models.encoder import Encoder
from longjax.models.llama import gptj, llama, mpt
from longjax.models.longnet import SlideEncoder, longnet

__all__ = [
  'DecoderLM',
  'Encoder',
  'SlideEncoder',
  'char_lm_large',
  'char_lm_small',
  'gptj',
  'llama',
  'longnet',
  'mpt',
]
