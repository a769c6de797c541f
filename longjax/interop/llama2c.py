"""Models in the format of llama2.c's first export ("version 0")."""

import os
import pathlib

import numpy as np

from longjax.interop.pretrained import (
  Sharding,
  abstract_model,
  fill,
  model_dtype,
)
from longjax.models import DecoderLM
from longjax.models.llama import llama
from longjax.patterns import Full

_HEADER = (
  'features',
  'mlp_features',
  'num_layers',
  'num_heads',
  'num_kv_heads',
  'vocab_size',
  'max_length',
)
# The magic number that later versions begin with.
_LATER = 0x616B3432
# No sensible model has more of anything: larger numbers are another format.
_LARGEST = 10**7


def load_llama2c(
  path: str | os.PathLike,
  *,
  patterns=None,
  dtype='float32',
  sharding: Sharding = None,
  interleaved: bool = True,
  **overrides,
) -> DecoderLM:
  """A LLaMA from a llama2.c .bin file.

  Args:
    path: seven int32 (width, hidden width, layers, heads, kv heads, vocabulary,
      trained length), then float32 tensors. A negative vocabulary means a
      read-out of its own.
    patterns: one for all layers or one for each; None for full attention.
    dtype: of parameters and activations.
    sharding: as of `load_pretrained`.
    interleaved: rotate pairs (2i, 2i + 1) as llama2.c does; False reorders the
      query and key projections for pairs (i, i + half), which is the same
      model, as Hugging Face's LLaMA has it.
    **overrides: further keywords of `DecoderLM`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another format, a file of the wrong size, or another dtype.
  """
  dtype = model_dtype(dtype, {})
  keywords, stored = read_llama2c(path)
  keywords.pop('max_length')
  keywords = llama(**keywords, interleaved=interleaved)
  heads = keywords['num_heads']
  size = keywords['features'] // heads
  graphdef, abstract = abstract_model(
    keywords
    | {'dtype': dtype, 'param_dtype': dtype, 'patterns': patterns or Full()}
    | overrides
  )

  def read(path, shape):
    *module, field = path
    if module and module[0] == 'layers':
      value = stored['.'.join(module[2:])][module[1]]
    else:
      value = stored['.'.join(module) or field]
    if not interleaved and module[-1:] in (['query'], ['key']):
      value = value.reshape(-1, size // 2, 2, value.shape[-1])
      value = value.swapaxes(1, 2).reshape(-1, value.shape[-1])
    return value.T if field == 'kernel' else value.reshape(shape)

  return fill(graphdef, abstract, read, dtype, sharding)


def read_llama2c(path: str | os.PathLike) -> tuple[dict, dict]:
  """(keywords of `models.llama` and max_length, tensors by our names).

  Tensors are mapped into memory, with their layers stacked.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is no file')
  words = np.fromfile(path, '<i4', len(_HEADER))
  if len(words) < len(_HEADER):
    raise ValueError(f'{path} has {path.stat().st_size} bytes: no header')
  if words[0] == _LATER:
    raise ValueError(
      f'{path} is a later version of the format; export it with --version 0'
    )
  header = dict(zip(_HEADER, map(int, words), strict=True))
  tied = header['vocab_size'] > 0
  header['vocab_size'] = abs(header['vocab_size'])
  if not all(0 < value < _LARGEST for value in header.values()) or (
    header['features'] % header['num_heads']
    or header['num_heads'] % header['num_kv_heads']
  ):
    raise ValueError(f'{path} is no llama2.c model: its header says {header}')
  layers, width = header['num_layers'], header['features']
  hidden, vocabulary = header['mlp_features'], header['vocab_size']
  size = width // header['num_heads']
  kv_width = size * header['num_kv_heads']
  shapes = {
    'embedding': (vocabulary, width),
    'attention_norm': (layers, width),
    'attention.query': (layers, width, width),
    'attention.key': (layers, kv_width, width),
    'attention.value': (layers, kv_width, width),
    'attention.output': (layers, width, width),
    'mlp_norm': (layers, width),
    'mlp.gate': (layers, hidden, width),
    'mlp.down': (layers, width, hidden),
    'mlp.up': (layers, hidden, width),
    'final_norm': (width,),
    # Cosines and sines of the rotation, which are computed here.
    'angles': (2, header['max_length'], size // 2),
  }
  if not tied:
    shapes['output'] = (vocabulary, width)
  count = sum(map(np.prod, shapes.values()))
  wanted, found = 4 * (len(_HEADER) + int(count)), path.stat().st_size
  if found != wanted:
    raise ValueError(
      f'{path} has {found} bytes, its header says {wanted}: cut short, or '
      'another format'
    )
  values = np.memmap(path, '<f4', 'r', 4 * len(_HEADER))
  tensors, start = {}, 0
  for name, shape in shapes.items():
    end = start + int(np.prod(shape))
    tensors[name] = values[start:end].reshape(shape)
    start = end
  return header | {'tie_embedding': tied}, tensors
