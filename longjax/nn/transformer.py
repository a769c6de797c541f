"""Transformer blocks: pre-norm, attention and a two-layer perceptron."""

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT, Attention
from longjax.nn.embedding import check_rate, dropout, fold_in


def _gelu(x):
  return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x):
  return jax.nn.gelu(x, approximate=True)


def _squared_relu(x):
  return jnp.square(jax.nn.relu(x))


# Activation, and whether a second projection gates it.
MLPS = {
  'gelu': (_gelu, False),
  'gelu_tanh': (_gelu_tanh, False),
  'relu2': (_squared_relu, False),
  'swiglu': (jax.nn.silu, True),
  'geglu': (_gelu, True),
}
# Whether it subtracts the mean (and has a bias, unless told), and its epsilon.
NORMS = {'layer': 1e-5, 'rms': 1e-6}


def make_norm(
  norm: str,
  features: int,
  *,
  epsilon: float | None = None,
  use_bias: bool = True,
  scale_std: float = 0.0,
  param_dtype=jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Module:
  """A norm over features, computed and returned in float32.

  Args:
    norm: 'layer' (scale and bias) or 'rms' (scale).
    features: size of the last axis.
    epsilon: added to the variance; 1e-5 for 'layer' and 1e-6 for 'rms' if None.
    use_bias: of 'layer'.
    scale_std: the scale starts as N(1, scale_std); Transformer-XL has 0.02.
    param_dtype: of scale and bias.
    rngs: source of randomness.

  Raises:
    ValueError: for another name.
  """
  if norm not in NORMS:
    raise ValueError(f'norm {norm!r} is not one of {tuple(NORMS)}')

  def scale_init(key, shape, dtype):
    return 1 + scale_std * jax.random.normal(key, shape, dtype)

  kwargs = dict(
    epsilon=NORMS[norm] if epsilon is None else epsilon,
    scale_init=scale_init,
    dtype=jnp.float32,
    param_dtype=param_dtype,
    rngs=rngs,
  )
  if norm == 'rms':
    return nnx.RMSNorm(features, **kwargs)
  # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
  return nnx.LayerNorm(
    features, use_bias=use_bias, use_fast_variance=False, **kwargs
  )


class MLP(nnx.Module):
  """down(dropout(activation(up(x)))), gated for 'swiglu' and 'geglu'."""

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    mlp: str = 'gelu',
    use_bias: bool = False,
    dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    output_init=None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if mlp not in MLPS:
      raise ValueError(f'mlp {mlp!r} is not one of {tuple(MLPS)}')
    check_rate('dropout_rate', dropout_rate)
    self.mlp = mlp
    self.dropout_rate = dropout_rate

    def linear(inputs, outputs, init):
      return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        kernel_init=init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.up = linear(features, hidden, kernel_init)
    self.gate = linear(features, hidden, kernel_init) if MLPS[mlp][1] else None
    self.down = linear(hidden, features, output_init or kernel_init)

  def __call__(self, x, dropout_key=None):
    """[..., features] -> [..., features]; dropout after the activation."""
    activation, _ = MLPS[self.mlp]
    if self.gate is None:
      hidden = activation(self.up(x))
    else:
      hidden = activation(self.gate(x)) * self.up(x)
    return self.down(dropout(hidden, self.dropout_rate, dropout_key))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), dropout on both sums.

  With `parallel`, x + attention(norm(x)) + mlp(norm(x)) with one norm for both
  (GPT-J).
  """

  def __init__(
    self,
    features: int,
    num_heads: int,
    *,
    pattern,
    position=None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_features: int | None = None,
    norm: str = 'layer',
    norm_epsilon: float | None = None,
    norm_bias: bool = True,
    norm_scale_std: float = 0.0,
    parallel: bool = False,
    mlp: str = 'gelu',
    qk_norm: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    output_init=None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    self.dtype = jnp.dtype(dtype)
    self.dropout_rate = dropout_rate

    def make_own_norm():
      return make_norm(
        norm,
        features,
        epsilon=norm_epsilon,
        use_bias=norm_bias,
        scale_std=norm_scale_std,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.attention_norm = make_own_norm()
    self.mlp_norm = None if parallel else make_own_norm()
    shared = dict(
      kernel_init=kernel_init,
      output_init=output_init,
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.attention = Attention(
      features,
      num_heads,
      pattern=pattern,
      position=position,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      use_bias=attention_bias,
      qk_norm=qk_norm,
      dropout_rate=attention_dropout_rate,
      implementation=implementation,
      **shared,
    )
    self.mlp = MLP(
      features,
      4 * features if mlp_features is None else mlp_features,
      mlp=mlp,
      use_bias=mlp_bias,
      dropout_rate=dropout_rate,
      **shared,
    )

  def __call__(self, x, *, dropout_key=None, cache=None, **attention_kwargs):
    """x [batch, length, features]; keywords as of `Attention`.

    Returns:
      The same shape; with a cache (that, new cache).
    """
    normed = self.attention_norm(x).astype(self.dtype)
    mixed = self.attention(
      normed,
      dropout_key=fold_in(dropout_key, 0),
      cache=cache,
      **attention_kwargs,
    )
    if cache is not None:
      mixed, cache = mixed
    x = x + dropout(mixed, self.dropout_rate, dropout_key, 1)
    if self.mlp_norm is not None:
      normed = self.mlp_norm(x).astype(self.dtype)
    hidden = self.mlp(normed, fold_in(dropout_key, 2))
    x = x + dropout(hidden, self.dropout_rate, dropout_key, 3)
    return x if cache is None else (x, cache)
