"""An encoder whose layers each have a pattern of their own."""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from longjax.models.decoder import INIT_STD
from longjax.nn.attention import TRANSFORMER_XL
from longjax.nn.embedding import check_rate, dropout, fold_in
from longjax.nn.memory import check_remat, checkpointed
from longjax.nn.transformer import (
  Block,
  make_norm,
  per_layer,
  sub_norm_inits,
)
from longjax.patterns import Pattern


class Encoder(nnx.Module):
  """Pre-norm blocks over tokens, or over embeddings that the caller brings.

  Parameters do not depend on `patterns`.
  """

  def __init__(
    self,
    num_layers: int,
    features: int,
    num_heads: int,
    *,
    patterns: Pattern | Sequence[Pattern],
    vocab_size: int | None = None,
    position=None,
    norm: str = 'layer',
    norm_epsilon: float | None = None,
    sub_norm: bool = False,
    final_norm: bool = True,
    scale_embedding: bool = False,
    dropout_rate: float = 0.0,
    remat: bool | str = False,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **block,
  ):
    """Args, besides those of `DecoderLM` of the same name:

    patterns: one for all layers, or one per layer; any pattern.
    vocab_size: for tokens; None for embeddings [batch, length, features].
    position: None, 'rope', 'xpos', 'alibi', a scheme, or one of these per
      layer. xPos overflows where keys lie far ahead, and is refused there.
    **block: further keywords of `longjax.nn.Block`.

    Raises:
      ValueError: for patterns or positions of another count than num_layers,
        names that do not exist, or sizes that do not fit.
    """
    for name, value in (
      ('num_layers', num_layers),
      ('features', features),
      ('num_heads', num_heads),
      ('vocab_size', 1 if vocab_size is None else vocab_size),
    ):
      if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    check_rate('dropout_rate', dropout_rate)
    check_remat(remat)
    self.patterns = per_layer('patterns', patterns, num_layers)
    for layer, pattern in enumerate(self.patterns):
      if not isinstance(pattern, Pattern):
        raise ValueError(
          f'layer {layer}: {pattern!r} is no pattern such as '
          'longjax.Full(causal=False)'
        )
    positions = per_layer('position', position, num_layers)
    if TRANSFORMER_XL in positions:
      raise ValueError(f'position {TRANSFORMER_XL!r} is for DecoderLM only')
    self.vocab_size = vocab_size
    self.features = features
    self.scale_embedding = scale_embedding
    self.dropout_rate = dropout_rate
    self.remat = remat
    self.dtype = jnp.dtype(dtype)

    table_init = kernel_init = value_init = nnx.initializers.normal(INIT_STD)
    if sub_norm:
      table_init = nnx.initializers.normal(features**-0.5)
      kernel_init, value_init = sub_norm_inits(num_layers)

    def make_table():
      return nnx.Embed(
        vocab_size,
        features,
        embedding_init=table_init,
        dtype=self.dtype,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.embedding = None if vocab_size is None else make_table()
    self.layers = nnx.List(
      Block(
        features,
        num_heads,
        pattern=layer_pattern,
        position=layer_position,
        norm=norm,
        norm_epsilon=norm_epsilon,
        sub_norm=sub_norm,
        dropout_rate=dropout_rate,
        kernel_init=kernel_init,
        value_init=value_init,
        output_init=value_init,
        dtype=self.dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        **block,
      )
      for layer_pattern, layer_position in zip(
        self.patterns, positions, strict=True
      )
    )

    def make_final_norm():
      return make_norm(
        norm, features, epsilon=norm_epsilon, param_dtype=param_dtype, rngs=rngs
      )

    self.final_norm = make_final_norm() if final_norm else None

  def __call__(
    self,
    x,
    *,
    segment_ids=None,
    positions=0,
    dropout_key=None,
    return_states: bool = False,
  ):
    """Hidden states of a text or of a sequence of embeddings.

    Args:
      x: int [batch, length] tokens, or [batch, length, features] embeddings.
      segment_ids: int [batch, length]. Those of equal id see each other, those
        of negative id are padding; hidden states of padding mean nothing.
      positions: of the first token, an int or int [batch].
      dropout_key: turns dropout on.
      return_states: also return the states before the first block and after
        each, without the final norm.

    Returns:
      [batch, length, features]; with `return_states` (that, a list of
      num_layers + 1 such arrays).

    Raises:
      ValueError: x of another kind or shape.
    """
    x = self._embed(x, segment_ids)
    x = dropout(x, self.dropout_rate, fold_in(dropout_key, len(self.layers)))
    states = [x]
    for layer, block in enumerate(self.layers):
      run = functools.partial(
        block,
        segment_ids=segment_ids,
        positions=positions,
        dropout_key=fold_in(dropout_key, layer),
      )
      x = checkpointed(run, self.remat)(x)
      states.append(x)
    if self.final_norm is not None:
      x = self.final_norm(x).astype(self.dtype)
    return (x, states) if return_states else x

  def _embed(self, x, segment_ids):
    if self.embedding is None:
      if x.ndim != 3 or not x.shape[1] or x.shape[2] != self.features:
        raise ValueError(
          f'embeddings must have shape [batch, length >= 1, {self.features}], '
          f'got {x.shape}'
        )
      x = x.astype(self.dtype)
    else:
      if (
        x.ndim != 2
        or not x.shape[1]
        or not jnp.issubdtype(x.dtype, jnp.integer)
      ):
        raise ValueError(
          'tokens must be whole numbers of shape [batch, length >= 1], got '
          f'{x.dtype} {x.shape}'
        )
      if segment_ids is not None:
        # Padding may be any number, also one outside of the vocabulary.
        x = jnp.where(segment_ids >= 0, x, 0)
      x = self.embedding(x)
    return x * math.sqrt(self.features) if self.scale_embedding else x
