"""Published pretrained decoders as keywords of `DecoderLM`.

One decoder serves them all: they differ in norm, MLP, position scheme, biases
and whether attention and MLP stand side by side. Each function returns the
keywords; `patterns` (vanilla: `Full()`, LM-Infinite: `Lambda(...)`) and `rngs`
are left to the caller.
"""

from longjax.positions import ALiBi, RoPE, RoPEScaling


def llama(
  *,
  vocab_size: int,
  num_layers: int,
  features: int,
  num_heads: int,
  mlp_features: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  rope_base: float = 10000.0,
  rope_scaling: RoPEScaling | None = None,
  interleaved: bool = False,
  norm_epsilon: float = 1e-5,
  tie_embedding: bool = False,
  attention_bias: bool = False,
  mlp_bias: bool = False,
) -> dict:
  """LLaMA (arXiv 2302.13971), Llama 2 and 3, Mistral, llama2.c.

  RMSNorm, SwiGLU, RoPE on whole heads; grouped queries where num_kv_heads is
  smaller than num_heads.

  Args, besides sizes:
    rope_base, rope_scaling, interleaved: of `longjax.RoPE`.
    norm_epsilon, tie_embedding, attention_bias, mlp_bias: of `DecoderLM`.
  """
  return {
    'vocab_size': vocab_size,
    'num_layers': num_layers,
    'features': features,
    'num_heads': num_heads,
    'num_kv_heads': num_kv_heads,
    'head_dim': head_dim,
    'mlp_features': mlp_features,
    'position': RoPE(
      base=rope_base, interleaved=interleaved, scaling=rope_scaling
    ),
    'norm': 'rms',
    'norm_epsilon': norm_epsilon,
    'mlp': 'swiglu',
    'tie_embedding': tie_embedding,
    'attention_bias': attention_bias,
    'mlp_bias': mlp_bias,
  }


def gptj(
  *,
  vocab_size: int,
  num_layers: int,
  features: int,
  num_heads: int,
  rotary_dim: int,
  mlp_features: int | None = None,
  mlp: str = 'gelu_tanh',
  norm_epsilon: float = 1e-5,
  tie_embedding: bool = False,
) -> dict:
  """GPT-J: attention and MLP side by side under one LayerNorm, RoPE with
  interleaved pairs on the first `rotary_dim` features of a head, biases in the
  MLP and the read-out only."""
  return {
    'vocab_size': vocab_size,
    'num_layers': num_layers,
    'features': features,
    'num_heads': num_heads,
    'mlp_features': mlp_features,
    'position': RoPE(
      fraction=rotary_dim / (features // num_heads), interleaved=True
    ),
    'norm': 'layer',
    'norm_epsilon': norm_epsilon,
    'parallel': True,
    'mlp': mlp,
    'mlp_bias': True,
    'output_bias': True,
    'tie_embedding': tie_embedding,
  }


def mpt(
  *,
  vocab_size: int,
  num_layers: int,
  features: int,
  num_heads: int,
  mlp_features: int | None = None,
  norm_epsilon: float = 1e-5,
) -> dict:
  """MPT: ALiBi, LayerNorm and projections without biases, tied read-out."""
  return {
    'vocab_size': vocab_size,
    'num_layers': num_layers,
    'features': features,
    'num_heads': num_heads,
    'mlp_features': mlp_features,
    'position': ALiBi(),
    'norm': 'layer',
    'norm_bias': False,
    'norm_epsilon': norm_epsilon,
    'mlp': 'gelu',
    'tie_embedding': True,
  }
