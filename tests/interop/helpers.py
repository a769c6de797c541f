"""Folders in Hugging Face's format, from the golden files."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from tests.ops.helpers import QUICK

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'


def golden(name):
  with np.load(GOLDENS / f'pretrained_{name}.npz') as file:
    return dict(file)


def write_folder(folder, arrays, *, stored_as=np.float32, **changes):
  """The golden model as transformers' save_pretrained would write it."""
  config = json.loads(str(arrays['config'])) | changes
  (folder / 'config.json').write_text(json.dumps(config))
  weights = {
    name.removeprefix('weights/'): value.astype(stored_as)
    for name, value in arrays.items()
    if name.startswith('weights/')
  }
  save_file(weights, folder / 'model.safetensors')
  return weights


def parameters(model):
  return {
    path: np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def compiled(function, *arguments):
  """The function compiled for such arguments, in little time."""
  return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK)


def logits(model, tokens, segment_ids=None):
  """Of one compiled pass, as a numpy array."""
  tokens = np.asarray(tokens, np.int32)
  if segment_ids is None:
    segment_ids = np.zeros_like(tokens)

  def run(tokens, segment_ids):
    return model(tokens, segment_ids=segment_ids)

  return np.asarray(compiled(run, tokens, segment_ids)(tokens, segment_ids))
