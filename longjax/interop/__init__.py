"""Pretrained models of other projects, in and out; no PyTorch needed."""

from longjax.interop.llama2c import load_llama2c
from longjax.interop.pretrained import (
  config_of,
  load_pretrained,
  read_config,
  save_pretrained,
)
from longjax.interop.tokenizers import load_tokenizer

__all__ = [
  'config_of',
  'load_llama2c',
  'load_pretrained',
  'load_tokenizer',
  'read_config',
  'save_pretrained',
]
