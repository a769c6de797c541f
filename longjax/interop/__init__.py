"""Pretrained models of other projects, in and out; no PyTorch needed."""

from longjax.interop.led import config_of_led
from longjax.interop.llama2c import load_llama2c
from longjax.interop.longer import lengthen, to_led, to_longformer
from longjax.interop.longformer import config_of_longformer
from longjax.interop.pretrained import (
  config_of,
  load_pretrained,
  read_config,
  save_pretrained,
)
from longjax.interop.tokenizers import load_tokenizer
from longjax.interop.torchscale import config_of_longnet

__all__ = [
  'config_of',
  'config_of_led',
  'config_of_longformer',
  'config_of_longnet',
  'lengthen',
  'load_llama2c',
  'load_pretrained',
  'load_tokenizer',
  'read_config',
  'save_pretrained',
  'to_led',
  'to_longformer',
]
