"""Golden numbers of transformers' decoders, tiny and random; see
make_goldens.py, which writes them."""

import json

import numpy as np
import torch
import transformers

LENGTH, NEW_TOKENS = 24, 16
LLAMA = dict(
  vocab_size=29,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  initializer_range=0.3,
  bos_token_id=1,
  eos_token_id=2,
)


def _rope(kind, **settings):
  return {'rope_type': kind, 'rope_theta': 100.0, **settings}


LLAMAS = {
  'llama_gqa': {},
  'llama_tied': {'tie_word_embeddings': True, 'num_key_value_heads': 4},
  'llama_biases': {
    'attention_bias': True,
    'mlp_bias': True,
    'head_dim': 6,
    'num_key_value_heads': 1,
  },
  'llama_linear': {'rope_parameters': _rope('linear', factor=4.0)},
  'llama_llama3': {
    'hidden_size': 32,
    'rope_parameters': _rope(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  },
  'llama_yarn': {
    'hidden_size': 32,
    'rope_parameters': _rope(
      'yarn', factor=4.0, original_max_position_embeddings=16
    ),
  },
}


def models():
  """{name: config and model}."""
  for name, changes in LLAMAS.items():
    config = transformers.LlamaConfig(**LLAMA | changes)
    yield name, config, transformers.LlamaForCausalLM
  config = transformers.MistralConfig(**LLAMA, sliding_window=7)
  yield 'mistral', config, transformers.MistralForCausalLM
  config = transformers.GPTJConfig(
    vocab_size=29,
    n_embd=16,
    n_layer=2,
    n_head=2,
    rotary_dim=4,
    n_positions=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
  )
  yield 'gptj', config, transformers.GPTJForCausalLM
  config = transformers.MptConfig(
    vocab_size=29,
    d_model=24,
    n_layers=2,
    n_heads=3,  # no power of two: ALiBi's slopes take two rules
    max_seq_len=64,
    initializer_range=0.3,
  )
  yield 'mpt', config, transformers.MptForCausalLM


def golden(config, kind) -> dict:
  """Weights, logits of random tokens, and a greedy continuation."""
  torch.manual_seed(0)
  config._attn_implementation = 'eager'
  model = kind(config).eval()
  with torch.no_grad():
    # Norms and biases start as 1 and 0, which would hide mistakes.
    for _, parameter in model.named_parameters():
      if parameter.ndim == 1:
        parameter += 0.2 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (2, LENGTH))
    logits = model(torch.tensor(tokens)).logits
    greedy = torch.tensor(tokens[:1, :5])
    for _ in range(NEW_TOKENS):
      # Without a cache: what the definition says.
      last = model(greedy).logits[:, -1]
      greedy = torch.cat([greedy, last.argmax(-1, keepdim=True)], 1)
  text = json.loads(config.to_json_string(use_diff=False))
  text['architectures'] = [kind.__name__]
  arrays = {
    'config': np.array(json.dumps(text, sort_keys=True)),
    'tokens': tokens.astype(np.int32),
    'logits': logits.numpy(),
    'greedy': greedy.numpy().astype(np.int32)[0],
  }
  tied = config.tie_word_embeddings
  for name, value in model.state_dict().items():
    if not (tied and name == 'lm_head.weight'):
      arrays[f'weights/{name}'] = value.numpy()
  return arrays
