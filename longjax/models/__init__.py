"""Models: stacks of `longjax.nn` layers."""

from longjax.models.decoder import DecoderLM, char_lm_large, char_lm_small
from longjax.models.llama import gptj, llama, mpt

__all__ = [
  'DecoderLM',
  'char_lm_large',
  'char_lm_small',
  'gptj',
  'llama',
  'mpt',
]
