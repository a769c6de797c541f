"""Writes the golden files of this folder with PyTorch and transformers.

Run by `make goldens` in an environment of its own; the tests that read the
files need neither library. The cases are seeded, so the same versions write
the same numbers, and a file whose numbers have not changed is left alone.

  .venv-goldens/bin/python tests/goldens/make_goldens.py
"""

import json
import pathlib
import platform

import led
import longformer
import numpy as np
import pretrained
import torch
import transformers
from transformers.models.longformer import modeling_longformer

FOLDER = pathlib.Path(__file__).resolve().parent

HIDDEN = 16
HEADS = 2
PROJECTIONS = (
  'query',
  'key',
  'value',
  'query_global',
  'key_global',
  'value_global',
)

# For each case: keys seen on each side, then one row per sequence: which
# tokens are padding, which are global. Padding wins over global.
NONE = ()
CASES = {
  'window_only': (4, 40, [(NONE, NONE), (NONE, NONE)]),
  'ragged_globals': (
    4,
    40,
    # Neighbours of each other, inside other windows, at the very end, none.
    [(NONE, (0,)), (NONE, (3, 5, 6, 39)), (NONE, NONE)],
  ),
  'right_padding': (
    8,
    37,
    [(NONE, (0, 36)), (range(21, 37), (0, 20)), (range(9, 37), NONE)],
  ),
  'left_padding': (4, 32, [(range(13), (13, 31)), (range(2), (2, 3, 20))]),
  'middle_padding': (
    3,
    29,
    [
      ((5, 6, 7, 8, 9, 10, 11, 18), (4, 18, 22)),
      ((0, 3, 12, 13, 28), (1, 14)),
    ],
  ),
  'window_over_length': (16, 11, [(NONE, NONE), ((9, 10), (2, 8))]),
  # transformers fails on one key on each side (attention_window 2).
  'smallest_window': (2, 23, [(NONE, (10, 11, 12)), ((22,), (21,))]),
  'all_global': (2, 10, [(NONE, range(10)), ((0, 9), range(10))]),
  'one_token': (2, 1, [(NONE, NONE), (NONE, (0,))]),
}


def make_layer(side, weights):
  config = transformers.LongformerConfig(
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    attention_window=[2 * side],  # Hugging Face counts both sides.
    num_hidden_layers=1,
    attention_probs_dropout_prob=0.0,
  )
  layer = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
  layer.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
  return layer.eval()


def run_layer(layer, hidden, mask, global_mask, side):
  """Returns the layer's output on a sequence of any length.

  The layer takes multiples of its window only: as LongformerModel does, pad
  on the right with masked tokens, and cut the output.
  """
  length = hidden.shape[1]
  extra = -length % (2 * side)
  hidden = torch.nn.functional.pad(hidden, (0, 0, 0, extra))
  merged = torch.tensor(mask * (global_mask + 1))
  merged = torch.nn.functional.pad(merged, (0, extra))
  largest = torch.finfo(hidden.dtype).max
  additive = torch.zeros(merged.shape, dtype=hidden.dtype)
  additive[merged == 0] = -largest
  additive[merged == 2] = largest
  (output,) = layer(
    hidden,
    attention_mask=additive,
    is_index_masked=merged == 0,
    is_index_global_attn=merged == 2,
    is_global_attn=bool((merged == 2).any()),
  )
  return output[:, :length]


def longformer_self_attention():
  """Outputs and gradients of transformers' LongformerSelfAttention."""
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)

  weights = {}
  for name in PROJECTIONS:
    weights[f'{name}.weight'] = normal(HIDDEN, HIDDEN, scale=0.35)
    weights[f'{name}.bias'] = normal(HIDDEN, scale=0.35)
  arrays = {f'weights/{name}': value for name, value in weights.items()}

  for case, (side, length, rows) in CASES.items():
    mask = np.ones((len(rows), length), np.int8)
    global_mask = np.zeros_like(mask)
    for row, (padding, global_tokens) in enumerate(rows):
      mask[row, list(padding)] = 0
      global_mask[row, list(global_tokens)] = 1
    layer = make_layer(side, weights)
    hidden = torch.tensor(normal(len(rows), length, HIDDEN), requires_grad=True)
    cotangent = normal(len(rows), length, HIDDEN)
    output = run_layer(layer, hidden, mask, global_mask, side)
    output.backward(torch.tensor(cotangent))
    arrays |= {
      f'{case}/side': np.int64(side),
      f'{case}/mask': mask,
      f'{case}/global_mask': global_mask,
      f'{case}/hidden': hidden.detach().numpy(),
      f'{case}/output': output.detach().numpy(),
      f'{case}/cotangent': cotangent,
      f'{case}/d_hidden': hidden.grad.numpy(),
    }
    for name, parameter in layer.named_parameters():
      # Without a global token the global projections take no part.
      if parameter.grad is not None:
        arrays[f'{case}/d_{name}'] = parameter.grad.numpy()
  arrays['heads'] = np.int64(HEADS)
  return arrays


def write(path, arrays):
  arrays['versions'] = np.array(
    json.dumps(
      {
        'python': platform.python_version(),
        'numpy': np.__version__,
        'torch': torch.__version__,
        'transformers': transformers.__version__,
      }
    )
  )
  if path.exists():
    with np.load(path) as old:
      if old.keys() == arrays.keys() and all(
        np.array_equal(old[name], arrays[name]) for name in old
      ):
        print(f'{path.name}: unchanged')
        return
  np.savez_compressed(path, **arrays)
  print(f'{path.name}: {path.stat().st_size} bytes, {arrays["versions"]}')


def main():
  torch.set_num_threads(1)  # The order of sums, hence every digit, is fixed.
  write(FOLDER / 'longformer_self_attention.npz', longformer_self_attention())
  for name, config, kind in pretrained.models():
    write(FOLDER / f'pretrained_{name}.npz', pretrained.golden(config, kind))
  for name, arrays in (*longformer.files(), *led.files()):
    write(FOLDER / f'{name}.npz', arrays)


if __name__ == '__main__':
  main()
