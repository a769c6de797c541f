"""Transformer blocks of BERT's and BART's line: a norm after each sum."""

import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT
from longjax.nn.embedding import check_rate, dropout, fold_in
from longjax.nn.transformer import MLP, make_norm


class PostNormBlock(nnx.Module):
  """x = norm(x + attention(x)), then x = norm(x + mlp(x)).

  Between them, with `cross_attention`, x = norm(x + cross_attention(x)).
  Dropout is on every sum's second term; all projections have biases.
  """

  def __init__(
    self,
    features: int,
    attention: nnx.Module,
    *,
    cross_attention: nnx.Module | None = None,
    mlp_features: int | None = None,
    mlp: str = 'gelu',
    norm_epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    activation_dropout_rate: float = 0.0,
    kernel_init=NORMAL_INIT,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_rate('dropout_rate', dropout_rate)
    self.dtype = jnp.dtype(dtype)
    self.dropout_rate = dropout_rate

    def norm():
      return make_norm(
        'layer',
        features,
        epsilon=norm_epsilon,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.attention = attention
    self.attention_norm = norm()
    self.cross_attention = cross_attention
    self.cross_norm = None if cross_attention is None else norm()
    self.mlp = MLP(
      features,
      4 * features if mlp_features is None else mlp_features,
      mlp=mlp,
      use_bias=True,
      dropout_rate=activation_dropout_rate,
      kernel_init=kernel_init,
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.mlp_norm = norm()

  def __call__(
    self, x, *, dropout_key=None, cache=None, states=None, **attention_kwargs
  ):
    """x [batch, length, features].

    Args:
      x: inputs.
      dropout_key: turns dropout on.
      cache: of `attention`.
      states: what `cross_attention` is called with besides x.
      **attention_kwargs: further keywords of `attention`.

    Returns:
      The same shape; with a cache (that, new cache).
    """

    def add(x, y, norm, site):
      y = dropout(y, self.dropout_rate, dropout_key, site)
      return norm(x + y).astype(self.dtype)

    if cache is not None:
      attention_kwargs['cache'] = cache
    mixed = self.attention(
      x, dropout_key=fold_in(dropout_key, 0), **attention_kwargs
    )
    if cache is not None:
      mixed, cache = mixed
    x = add(x, mixed, self.attention_norm, 1)
    if self.cross_attention is not None:
      mixed = self.cross_attention(x, states, fold_in(dropout_key, 2))
      x = add(x, mixed, self.cross_norm, 3)
    x = add(x, self.mlp(x, fold_in(dropout_key, 4)), self.mlp_norm, 5)
    return x if cache is None else (x, cache)
