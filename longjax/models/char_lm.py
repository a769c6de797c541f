"""Longformer's character language models, as keywords of `DecoderLM`."""

from longjax.models.decoder import INIT_STD


def char_lm_small(**overrides) -> dict:
  """Keywords of Longformer's small character LM: 41,055,232 parameters.

  Longformer's appendix B gives 12 layers, 8 heads, width 512, pre-norm, GELU,
  dropout 0.2 and Transformer-XL positions; the rest is Transformer-XL's
  character model: MLP of 2048 with biases, no biases in attention, no norm
  after the last block, tied embedding of 204 symbols scaled by sqrt(512).

  `patterns` and `rngs` are left to the caller:
  `DecoderLM(**char_lm_small(patterns=...), rngs=nnx.Rngs(0))`.
  """
  return {
    'vocab_size': 204,
    'num_layers': 12,
    'features': 512,
    'num_heads': 8,
    'mlp_features': 2048,
    'position': 'transformer_xl',
    'norm': 'layer',
    'norm_scale_std': INIT_STD,
    'final_norm': False,
    'mlp': 'gelu',
    'mlp_bias': True,
    'attention_bias': False,
    'tie_embedding': True,
    'scale_embedding': True,
    'dropout_rate': 0.2,
    **overrides,
  }


def char_lm_large(**overrides) -> dict:
  """Keywords of the large one: 30 layers, dropout 0.4, 102,479,872."""
  return char_lm_small(**{'num_layers': 30, 'dropout_rate': 0.4, **overrides})
