"""Hugging Face's LongformerSelfAttention behind `worker.serve`.

Runs in the environment that `make goldens` builds; started by
cpu_attention.py.
"""

import os

import torch
import transformers
import worker
from transformers.models.longformer import modeling_longformer

# The parent chose the cores.
torch.set_num_threads(len(os.sched_getaffinity(0)))


def setup(spec):
  """Prepares the layer: 'forward', or 'forward+backward'."""
  length, heads, head_dim = spec['length'], spec['heads'], spec['head_dim']
  if length % (2 * spec['side']):
    raise ValueError(
      f'length {length} is no multiple of the window {2 * spec["side"]}'
    )
  weights, hidden, cotangent = worker.make_inputs(spec)
  config = transformers.LongformerConfig(
    hidden_size=heads * head_dim,
    num_attention_heads=heads,
    attention_window=[2 * spec['side']],
    num_hidden_layers=1,
    attention_probs_dropout_prob=0.0,
  )
  layer = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
  # The global projections are unused without global tokens.
  layer.load_state_dict(
    {name: torch.from_numpy(value) for name, value in weights.items()},
    strict=False,
  )
  layer.eval()
  hidden = torch.from_numpy(hidden)
  mask = torch.zeros(1, length)
  arguments = {
    'attention_mask': mask,
    'is_index_masked': mask < 0,
    'is_index_global_attn': mask > 0,
    'is_global_attn': False,
  }

  def forward():
    with torch.no_grad():
      return {'output': layer(hidden, **arguments)[0]}

  def forward_and_backward():
    layer.zero_grad(set_to_none=True)
    x = hidden.detach().requires_grad_()
    output = layer(x, **arguments)[0]
    output.backward(torch.from_numpy(cotangent))
    gradients = {
      f'd_{name}': parameter.grad
      for name, parameter in layer.named_parameters()
      if parameter.grad is not None
    }
    return {'output': output.detach(), 'd_hidden': x.grad, **gradients}

  return forward if spec['mode'] == 'forward' else forward_and_backward


if __name__ == '__main__':
  worker.serve(
    setup,
    {'torch': torch.__version__, 'transformers': transformers.__version__},
  )
