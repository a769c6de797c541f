"""Transformer blocks: pre-norm, attention and a two-layer perceptron."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT, Attention
from longjax.nn.embedding import check_rate, dropout, fold_in
from longjax.nn.memory import in_pieces


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


def sub_norm_inits(num_layers: int) -> tuple:
  """MAGNETO's initializers for a stack of layers (arXiv 2210.06423, figure 2).

  Xavier's normal distribution, N(0, 2 / (inputs + outputs)), and the same times
  sqrt(ln(2 M)) for M layers, of an encoder or a decoder by itself.

  Returns:
    (that of queries and keys, that of values, outputs and the MLP).
  """
  return tuple(
    nnx.initializers.variance_scaling(gain_squared, 'fan_avg', 'normal')
    for gain_squared in (1.0, math.log(2 * num_layers))
  )


def per_layer(name, value, num_layers) -> tuple:
  """One value for all layers, or one per layer, as a tuple."""
  if not isinstance(value, Sequence) or isinstance(value, str):
    return (value,) * num_layers
  if len(value) != num_layers:
    raise ValueError(
      f'{name} has {len(value)} entries for num_layers={num_layers}: give one '
      'for all layers, or one per layer'
    )
  return tuple(value)


class MLP(nnx.Module):
  """down(norm(dropout(activation(up(x))))), gated for 'swiglu' and 'geglu'.

  The norm is there if given; the activation before it is float32, whatever the
  dtype of the rest.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    mlp: str = 'gelu',
    use_bias: bool = False,
    inner_norm: nnx.Module | None = None,
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
    self.inner_norm = inner_norm
    self.down = linear(hidden, features, output_init or kernel_init)

  def __call__(self, x, dropout_key=None):
    """[..., features] -> [..., features]; dropout after the activation."""
    activation, _ = MLPS[self.mlp]
    hidden, gate = self.up(x), None if self.gate is None else self.gate(x)
    dtype = hidden.dtype
    if self.inner_norm is not None:
      hidden, gate = (
        None if y is None else y.astype(jnp.float32) for y in (hidden, gate)
      )
    if gate is None:
      hidden = activation(hidden)
    else:
      hidden = activation(gate) * hidden
    hidden = dropout(hidden, self.dropout_rate, dropout_key)
    if self.inner_norm is not None:
      hidden = self.inner_norm(hidden).astype(dtype)
    return self.down(hidden)


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), dropout on both sums.

  With `parallel`, x + attention(norm(x)) + mlp(norm(x)) with one norm for both
  (GPT-J). With `sub_norm`, another norm inside of each, before its output
  projection (MAGNETO, arXiv 2210.06423).
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
    sub_norm: bool = False,
    parallel: bool = False,
    mlp: str = 'gelu',
    mlp_piece: int | None = None,
    qk_norm: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    value_init=None,
    output_init=None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Args are those of `Attention`, `MLP` and `make_norm`, besides:

    mlp_features: 4 * features by default.
    mlp_piece: positions of the MLP at a time, which the backward pass computes
      again; None for all, kept.
    value_init: initializer of the value projection and of the MLP's first one,
      if another.
    """
    self.dtype = jnp.dtype(dtype)
    self.dropout_rate = dropout_rate
    if mlp_piece is not None and mlp_piece < 1:
      raise ValueError(f'mlp_piece must be at least 1, got {mlp_piece}')
    self.mlp_piece = mlp_piece
    mlp_features = 4 * features if mlp_features is None else mlp_features

    def make_own_norm(width=features):
      return make_norm(
        norm,
        width,
        epsilon=norm_epsilon,
        use_bias=norm_bias,
        scale_std=norm_scale_std,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.attention_norm = make_own_norm()
    self.mlp_norm = None if parallel else make_own_norm()
    # Sizes that do not divide are refused by Attention.
    heads_width = num_heads * (head_dim or features // num_heads)
    shared = dict(
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
      inner_norm=make_own_norm(heads_width) if sub_norm else None,
      dropout_rate=attention_dropout_rate,
      kernel_init=kernel_init,
      value_init=value_init,
      implementation=implementation,
      **shared,
    )
    self.mlp = MLP(
      features,
      mlp_features,
      mlp=mlp,
      use_bias=mlp_bias,
      inner_norm=make_own_norm(mlp_features) if sub_norm else None,
      dropout_rate=dropout_rate,
      kernel_init=value_init or kernel_init,
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

    def add_mlp(x, normed):
      if self.mlp_norm is not None:
        normed = self.mlp_norm(x).astype(self.dtype)
      hidden = self.mlp(normed, fold_in(dropout_key, 2))
      return x + dropout(hidden, self.dropout_rate, dropout_key, 3)

    x = in_pieces(add_mlp, self.mlp_piece, x, normed)
    return x if cache is None else (x, cache)
