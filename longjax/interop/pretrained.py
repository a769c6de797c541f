"""Pretrained decoders from folders in Hugging Face's format, and back."""

import importlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.interop import weights
from longjax.interop.families import FAMILIES, UnsupportedConfig
from longjax.models import DecoderLM
from longjax.patterns import Full, Pattern
from longjax.positions import ALiBi, RoPE

CONFIG = 'config.json'
DTYPES = ('float32', 'bfloat16', 'float16')
MAX_FILE_BYTES = 5 * 2**30

# Modules that know the models that are no decoders, by model_type.
OTHERS = {
  'bart': 'longjax.interop.led',
  'gigapath': 'longjax.interop.torchscale',
  'led': 'longjax.interop.led',
  'longformer': 'longjax.interop.longformer',
  'longnet_decoder': 'longjax.interop.torchscale',
  'longnet_encoder': 'longjax.interop.torchscale',
  'roberta': 'longjax.interop.longformer',
}

Sharding = jax.sharding.Sharding | Callable[[tuple, tuple], object] | None


def read_config(folder: str | os.PathLike) -> dict:
  """The folder's config.json.

  Raises:
    FileNotFoundError, ValueError: no folder, no config, or no JSON in it.
  """
  folder = pathlib.Path(folder)
  path = folder / CONFIG
  if folder.is_file():
    raise ValueError(
      f'{folder} is a file: a folder with {CONFIG} is needed (llama2.c .bin '
      'files are read by load_llama2c)'
    )
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder} is no folder')
  if not path.exists():
    raise FileNotFoundError(
      f'{folder} has no {CONFIG}: a folder as written by save_pretrained is '
      'needed'
    )
  return weights.read_json(path)


def _other(config):
  """The module of a model that is no decoder; None for decoders."""
  model_type = config.get('model_type')
  if model_type is None and 'attention_window' in config:
    model_type = 'roberta'  # as Longformer's first release has it
  name = OTHERS.get(model_type)
  return None if name is None else importlib.import_module(name)


def _family(config):
  model_type = config.get('model_type')
  if model_type not in FAMILIES:
    raise UnsupportedConfig(
      f'model_type {model_type!r} is not one of {sorted([*FAMILIES, *OTHERS])}'
    )
  return FAMILIES[model_type]


def model_dtype(dtype, config):
  """The dtype asked for, or the config's; ValueError if none of `DTYPES`."""
  if dtype is None:
    dtype = config.get('dtype', config.get('torch_dtype')) or 'float32'
  name = jnp.dtype(dtype).name if not isinstance(dtype, str) else dtype
  if name not in DTYPES:
    raise ValueError(f'dtype {name!r} is not one of {DTYPES}')
  return jnp.dtype(name)


def load_pretrained(
  folder: str | os.PathLike,
  *,
  patterns: Pattern | Sequence[Pattern] | None = None,
  dtype=None,
  sharding: Sharding = None,
  **overrides,
) -> nnx.Module:
  """A model with the weights of a folder in Hugging Face's format.

  The folder holds config.json and safetensors, in one file or several with an
  index. LLaMA (1, 2, 3), Mistral, GPT-J and MPT are known, which become a
  `DecoderLM`, and what `longjax.interop.longformer` reads. Files are mapped
  into memory, and each tensor goes to its device as it is read.

  LM-Infinite is one argument, no weight changes:
  `load_pretrained(folder, patterns=longjax.Lambda(4096, 10))`.

  Args:
    folder: where the files are.
    patterns: one for all layers, or one for each; None for what the model was
      trained with.
    dtype: of parameters and activations; None for the config's.
    sharding: of every parameter, or a function of (path, shape) that returns
      one for each; None for the default device.
    **overrides: further keywords of the model (implementation, remat, ...).

  Raises:
    FileNotFoundError: config, weights, or one of several files is missing.
    UnsupportedConfig: an architecture, or a setting of it, that longjax does
      not have; names those it has.
    ValueError: damaged files; tensors missing, unexpected, of another shape or
      a dtype that is not supported (quantized ones), each named.
  """
  config = read_config(folder)
  if (other := _other(config)) is not None:
    return other.load(
      folder,
      config,
      patterns=patterns,
      dtype=model_dtype(dtype, config),
      sharding=sharding,
      **overrides,
    )
  family = _family(config)
  keywords, pattern = family.read(config)
  dtype = model_dtype(dtype, config)
  keywords |= {'dtype': dtype, 'param_dtype': dtype} | overrides
  keywords['patterns'] = pattern if patterns is None else patterns
  with weights.Tensors(folder) as tensors:

    def read(path, shape):
      return read_tensor(tensors, family.tensor(path), shape)

    graphdef, abstract = abstract_model(keywords)
    parameters = nnx.to_flat_state(abstract)
    check_tensors(tensors, family, parameters)
    return fill(graphdef, abstract, read, dtype, sharding)


def abstract_model(keywords, model=DecoderLM):
  """(graphdef, state of shapes) of a model; nothing is computed."""
  return nnx.split(nnx.eval_shape(lambda: model(**keywords, rngs=nnx.Rngs(0))))


def fill(graphdef, abstract, read, dtype, sharding=None) -> nnx.Module:
  """The module whose parameter at `path` is read(path, shape)."""
  flat = []
  for path, leaf in nnx.to_flat_state(abstract):
    shape = leaf.shape
    place = sharding(path, shape) if callable(sharding) else sharding
    value = np.asarray(read(path, shape)).astype(dtype)
    flat.append((path, leaf.replace(jax.device_put(value, place))))
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _stored_shape(tensor, shape):
  rows, *rest = shape[::-1] if tensor.transposed else shape
  return (rows * tensor.parts, *rest)


def check_tensors(tensors, family, parameters):
  """Compares all names, shapes and dtypes before anything is read."""
  missing, wrong, narrow, known = [], [], [], set()
  for path, leaf in parameters:
    tensor = family.tensor(path)
    known.add(tensor.name)
    if tensor.name not in tensors:
      missing.append(tensor.name)
      continue
    shape, wanted = (
      tensors.shape(tensor.name),
      _stored_shape(tensor, leaf.shape),
    )
    if shape != wanted:
      wrong.append(f'{tensor.name} is {shape}, the config says {wanted}')
    if (dtype := tensors.dtype(tensor.name)) not in weights.DTYPES:
      narrow.append(f'{tensor.name} is {dtype}')
  # A tied read-out may be stored all the same.
  known.add(f'{family.modules["output"]}.weight')
  unexpected = [
    name for name in tensors if name not in known and not family.ignores(name)
  ]
  problems = [
    f'{what}: {_listed(sorted(names))}'
    for what, names in (
      ('missing', missing),
      ('unexpected', unexpected),
      ('wrong shape', wrong),
      (f'dtype not one of {weights.DTYPES}', narrow),
    )
    if names
  ]
  if problems:
    raise ValueError(f'weights do not fit the config; {"; ".join(problems)}')


def _listed(names, most=8):
  more = len(names) - most
  return ', '.join(names[:most]) + (f' and {more} more' if more > 0 else '')


def read_tensor(tensors, tensor, shape):
  """A parameter of this shape, from where it is stored."""
  if tensor.parts == 1:
    value = tensors.read(tensor.name)
  else:
    rows = _stored_shape(tensor, shape)[0] // tensor.parts
    first = tensor.part * rows
    value = tensors.read(tensor.name, first, first + rows)
  return value.T if tensor.transposed else value


# --- Writing -----------------------------------------------------------------


def config_of(
  keywords: dict, pattern: Pattern | None = None, *, max_length: int
) -> dict:
  """config.json of a DecoderLM made with `keywords` of `models.llama`.

  Args:
    keywords: as returned by `models.llama`, `gptj` or `mpt`.
    pattern: Full, or a causal window (then it is a Mistral).
    max_length: the length the model was trained at.
  """
  pattern = pattern or Full()
  position = keywords['position']
  if keywords.get('parallel'):
    family = FAMILIES['gptj']
  elif isinstance(position, ALiBi):
    family = FAMILIES['mpt']
  elif isinstance(position, RoPE) and position.interleaved:
    raise UnsupportedConfig(
      "Hugging Face's LLaMA has no interleaved RoPE: reorder q and k "
      '(`load_llama2c(..., interleaved=False)`) first'
    )
  elif pattern.reach()[0] != math.inf:
    family = FAMILIES['mistral']
  else:
    family = FAMILIES['llama']
  return {
    'model_type': family.model_type,
    'architectures': [family.architecture],
    **family.write(keywords, pattern, max_length),
  }


def save_pretrained(
  model: nnx.Module,
  folder: str | os.PathLike,
  config: dict,
  *,
  max_file_bytes: int = MAX_FILE_BYTES,
):
  """Writes config.json and safetensors that transformers can load.

  Args:
    model: a model that fits `config`.
    folder: made if it is not there; must not hold weights already.
    config: as of `read_config` (of the folder it was loaded from) or
      `config_of`.
    max_file_bytes: weights go into several files, with an index, beyond this.

  Raises:
    ValueError: the model's parameters do not fit the config.
    FileExistsError: the folder holds weights.
  """
  if (other := _other(config)) is not None:
    family, abstract = other.wanted(config, model)
  else:
    family = _family(config)
    keywords, pattern = family.read(config)
    _, abstract = abstract_model(keywords | {'patterns': pattern})
  folder = pathlib.Path(folder)
  wanted = {p: leaf.shape for p, leaf in nnx.to_flat_state(abstract)}
  state = {
    path: leaf[...]
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  shapes = {path: value.shape for path, value in state.items()}
  if shapes != wanted:
    differing = sorted(
      '.'.join(map(str, path))
      for path in shapes.keys() | wanted.keys()
      if shapes.get(path) != wanted.get(path)
    )
    raise ValueError(
      f'the model does not fit the config in {", ".join(differing)}'
    )
  for name in (weights.SINGLE, weights.INDEX):
    if (folder / name).exists():
      raise FileExistsError(f'{folder / name} exists already')
  paths = {}
  for path in state:
    tensor = family.tensor(path)
    paths.setdefault(tensor.name, {})[tensor.part] = path
  dtype = next(iter(state.values())).dtype

  def gather(name):
    parts = []
    for _, path in sorted(paths[name].items()):
      value = np.asarray(state[path])
      parts.append(value.T if family.tensor(path).transposed else value)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]

  folder.mkdir(parents=True, exist_ok=True)
  sizes = {
    name: sum(state[path].nbytes for path in parts.values())
    for name, parts in paths.items()
  }
  sizes |= {copy: sizes[name] for copy, name in family.copies.items()}
  weights.write(
    folder,
    sizes,
    lambda name: gather(family.copies.get(name, name)),
    max_file_bytes,
  )
  named = {'dtype': dtype.name}
  if 'torch_dtype' in config:  # as it was called
    named['torch_dtype'] = dtype.name
  text = json.dumps(config | named, indent=2)
  (folder / CONFIG).write_text(text + '\n')
