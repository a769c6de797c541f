"""Longformer: a bidirectional encoder with windows and global tokens."""

import functools
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.models.heads import HEADS
from longjax.nn.attention import NORMAL_INIT
from longjax.nn.embedding import check_rate, dropout, fold_in
from longjax.nn.global_attention import GlobalAttention, global_positions
from longjax.nn.post_norm import PostNormBlock
from longjax.nn.transformer import make_norm
from longjax.patterns import Pattern
from longjax.sharding import shards

CONVERT = 'python -m longjax.interop.convert'


def is_traced(x) -> bool:
  """Whether the values of x are unknown: inside `jax.jit` and the like."""
  return isinstance(x, jax.core.Tracer)


def check_sizes(least: int = 1, /, **sizes: int):
  """Refuses sizes below `least`, by name."""
  for name, value in sizes.items():
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}')


def check_like(name, value, shape):
  """Refuses what is not None and of another shape than the tokens."""
  if value is not None and np.shape(value) != tuple(shape):
    raise ValueError(
      f'{name} must have the shape of tokens, {tuple(shape)}, got '
      f'{np.shape(value)}'
    )


def outside_of(name: str, numbers, size: int):
  """Refuses numbers outside of 0 ... size - 1; traced ones become a mask."""
  outside = (numbers < 0) | (numbers >= size)
  if not is_traced(outside) and np.any(outside):
    row = int(np.argmax(np.any(outside, axis=1)))
    number = np.asarray(numbers)[np.asarray(outside)][0]
    raise ValueError(
      f'{name} has {number} in row {row}, outside of 0 ... {size - 1}'
    )
  return outside


def look_up(table: nnx.Embed, name: str, numbers):
  """The table's rows; NaN for those that `outside_of` could not see."""
  outside = outside_of(name, numbers, table.num_embeddings)
  rows = table(jnp.where(outside, 0, numbers))
  return jnp.where(outside[..., None], jnp.nan, rows)


def encoder_patterns(patterns, num_layers: int, num_heads: int) -> tuple:
  """One pattern per layer, checked.

  Raises:
    ValueError: of another count, no pattern, one that does not fit the heads,
      or one that sees only one side.
  """
  if isinstance(patterns, Pattern):
    patterns = (patterns,) * num_layers
  patterns = tuple(patterns)
  if len(patterns) != num_layers:
    raise ValueError(
      f'patterns has {len(patterns)} entries for num_layers={num_layers}: give '
      'one for all layers, or one per layer'
    )
  for layer, pattern in enumerate(patterns):
    if not isinstance(pattern, Pattern):
      raise ValueError(
        f'layer {layer}: {pattern!r} is no pattern such as '
        'longjax.SlidingWindow(256, 256)'
      )
    if pattern.causal:
      raise ValueError(
        f'layer {layer} has {pattern}, which is causal: an encoder sees both '
        'sides, as longjax.SlidingWindow(256, 256) does'
      )
    pattern.check_heads(num_heads)
  return patterns


def find_globals(mask, real, max_globals: int):
  """Global tokens of a batch, from a mask.

  Args:
    mask: int or bool [batch, length], > 0 for global tokens.
    real: bool [batch, length]; padding is never global.
    max_globals: the most that a row may have.

  Returns:
    (positions int32 [batch, globals] as of `global_positions`, or None if it
    is known that there are none; bool [batch], True for rows that have more
    than `max_globals`, which only happens where that cannot be seen before,
    inside `jax.jit`).

  Raises:
    ValueError: a row is known to have more.
  """
  if is_traced(mask) or is_traced(real):
    mask = (mask > 0) & real
    return (
      global_positions(mask, max_globals) if max_globals else None,
      shards.sum_over_sequence(mask.sum(axis=1)) > max_globals,
    )
  mask = (np.asarray(mask) > 0) & np.asarray(real)
  counts = mask.sum(axis=1)
  most = int(counts.max())
  if most > max_globals:
    raise ValueError(
      f'row {int(counts.argmax())} has {most} global tokens, but '
      f'max_globals={max_globals}'
    )
  # Few different sizes, so that little is compiled anew.
  columns = min(1 << (most - 1).bit_length(), max_globals) if most else 0
  positions = global_positions(jnp.asarray(mask), columns) if most else None
  return positions, jnp.zeros(len(mask), bool)


def begins_with_padding(real, reason: str):
  """Refuses rows that begin with padding; where they are traced, their mask.

  Rows of nothing but padding fill a batch up, and are let through.
  """
  first = shards.first_token(real)
  wrong = ~first & shards.any_in_sequence(real.any(axis=1))
  if not is_traced(wrong) and wrong.any():
    raise ValueError(
      f'row {int(wrong.argmax())} begins with padding, but {reason}: pad on '
      'the right'
    )
  return wrong


class Longformer(nnx.Module):
  """Token, position and type embeddings, post-norm blocks, a task's head.

  arXiv 2004.05150, sections 3 and 5; with `patterns=longjax.Full(causal=False)`
  and `max_globals=0` it is RoBERTa. Parameters do not depend on `patterns`.
  """

  def __init__(
    self,
    vocab_size: int,
    num_layers: int,
    features: int,
    num_heads: int,
    *,
    patterns: Pattern | Sequence[Pattern],
    max_positions: int,
    head: str | None = None,
    num_labels: int = 2,
    max_globals: int = 64,
    mlp_features: int | None = None,
    mlp: str = 'gelu',
    norm_epsilon: float = 1e-5,
    num_types: int = 1,
    pad_token: int = 1,
    separator_token: int = 2,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    head_dropout_rate: float | None = None,
    remat: bool = False,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Weights start as N(0, 0.02), biases as 0.

    Args:
      vocab_size, num_layers, features, num_heads: sizes.
      patterns: one for all layers, or one per layer, such as
        longjax.SlidingWindow(256, 256); a window's dilation may be one for
        each head.
      max_positions: the longest input. The table has pad_token + 1 rows more,
        as RoBERTa's: the first token is at pad_token + 1, padding at pad_token.
      head: None for hidden states, or one of `longjax.models.heads.HEADS`:
        'pooler', 'masked_lm', 'sequence_classification',
        'token_classification', 'question_answering', 'multiple_choice'.
      num_labels: of the classifications.
      max_globals: the most global tokens in a row; 0 for a model without
        global projections. Inside `jax.jit` this many are computed, unless the
        head's own are fewer.
      mlp_features: hidden size of the MLP; 4 * features by default.
      mlp: as of `longjax.nn.MLP`.
      norm_epsilon: of all norms.
      num_types: size of the type embedding.
      pad_token, separator_token: numbers of these tokens.
      dropout_rate: on the embeddings and on what each sublayer adds.
      attention_dropout_rate: on the attention weights.
      head_dropout_rate: in the head; dropout_rate by default.
      remat: recompute each block in the backward pass instead of storing it.
      dtype: of the activations; norms and logits are float32.
      param_dtype: of the parameters.
      implementation: passed to `longjax.attention`.
      rngs: source of the initial parameters.

    Raises:
      ValueError: patterns of another count than num_layers or that are causal,
        names that do not exist, or sizes that do not fit.
    """
    check_sizes(
      vocab_size=vocab_size,
      num_layers=num_layers,
      features=features,
      num_heads=num_heads,
      max_positions=max_positions,
      num_labels=num_labels,
      num_types=num_types,
    )
    check_sizes(0, max_globals=max_globals, pad_token=pad_token)
    if head is not None and head not in HEADS:
      raise ValueError(f'head {head!r} is not one of {(None, *HEADS)}')
    check_rate('dropout_rate', dropout_rate)
    self.vocab_size = vocab_size
    self.features = features
    self.num_heads = num_heads
    self.patterns = encoder_patterns(patterns, num_layers, num_heads)
    self.max_positions = max_positions
    self.max_globals = max_globals
    self.num_labels = num_labels
    self.num_types = num_types
    self.pad_token = pad_token
    self.separator_token = separator_token
    self.norm_epsilon = norm_epsilon
    self.dropout_rate = dropout_rate
    self.attention_dropout_rate = attention_dropout_rate
    self.head_dropout_rate = head_dropout_rate
    self.remat = remat
    self.dtype = jnp.dtype(dtype)
    kwargs = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    table = functools.partial(
      nnx.Embed, features=features, embedding_init=NORMAL_INIT, **kwargs
    )
    self.embedding = table(vocab_size)
    self.position_embedding = table(max_positions + pad_token + 1)
    self.type_embedding = table(num_types)
    self.embedding_norm = make_norm(
      'layer',
      features,
      epsilon=norm_epsilon,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.layers = nnx.List(
      PostNormBlock(
        features,
        GlobalAttention(
          features,
          num_heads,
          pattern=pattern,
          global_projections=max_globals > 0,
          dropout_rate=attention_dropout_rate,
          implementation=implementation,
          **kwargs,
        ),
        mlp_features=mlp_features,
        mlp=mlp,
        norm_epsilon=norm_epsilon,
        dropout_rate=dropout_rate,
        **kwargs,
      )
      for pattern in self.patterns
    )
    self.head_name = head
    if head_dropout_rate is None:
      head_dropout_rate = dropout_rate
    self.head = head and HEADS[head](
      features,
      num_labels,
      vocab_size=vocab_size,
      epsilon=norm_epsilon,
      dropout_rate=head_dropout_rate,
      **kwargs,
    )

  def __call__(
    self,
    tokens,
    *,
    mask=None,
    global_mask=None,
    types=None,
    dropout_key=None,
  ):
    """The head's output, or without a head `encode`'s.

    Args:
      tokens: int [batch, length]; for multiple choice [batch, choices,
        length], and so all masks.
      mask: 1 for tokens, 0 for padding, which may be anywhere; by default
        `tokens != pad_token`.
      global_mask: 1 for global tokens. By default those of the head: the first
        token for sequence classification, the question for question answering,
        the choice for multiple choice, else none.
      types: int, like tokens; 0 by default.
      dropout_key: turns dropout on.

    Returns:
      As the class in `longjax.models.heads` says; float32. Multiple choice:
      [batch, choices].

    Raises:
      ValueError: shapes that differ, more tokens than positions, a token or
        type outside of its table, more global tokens than `max_globals`, a row
        that begins with padding where the head reads its first token, no
        separator where the head needs one. Inside `jax.jit`, where all but the
        first two cannot be seen, the row is NaN.

    Warns:
      UserWarning: the head's task needs global tokens, and `global_mask` has
        none.
    """
    shape = np.shape(tokens)
    choices = self.head_name == 'multiple_choice'
    if len(shape) != 2 + choices or 0 in shape:
      raise ValueError(
        f'tokens must be [batch,{" choices," * choices} length >= 1], got '
        f'shape {shape}'
      )
    if choices:
      fold = functools.partial(jnp.reshape, shape=(-1, shape[2]))
      tokens = _fold('tokens', tokens, shape, fold)
      mask = _fold('mask', mask, shape, fold)
      global_mask = _fold('global_mask', global_mask, shape, fold)
      types = _fold('types', types, shape, fold)
    hidden = self.encode(
      tokens,
      mask=mask,
      global_mask=global_mask,
      types=types,
      dropout_key=dropout_key,
    )
    if self.head is None:
      return hidden
    out = self.head(
      hidden,
      fold_in(dropout_key, len(self.layers) + 1),
      self.embedding.embedding[...],
    )
    return out.reshape(shape[:2]) if choices else out

  def encode(
    self,
    tokens,
    *,
    mask=None,
    global_mask=None,
    types=None,
    dropout_key=None,
  ):
    """Hidden states [batch, length, features]; arguments as of a call.

    What they are at padding means nothing.
    """
    length = shards.whole_length(tokens.shape[1])
    if length > self.max_positions:
      raise ValueError(
        f'{length} tokens are more than the {self.max_positions} positions of '
        f'the model; `{CONVERT} FOLDER NEW_FOLDER --length={length}` makes a '
        'longer one'
      )
    for name, value in (
      ('mask', mask),
      ('global_mask', global_mask),
      ('types', types),
    ):
      check_like(name, value, tokens.shape)
    given = tokens != self.pad_token
    real = given if mask is None else mask > 0
    global_tokens, bad = self._globals(tokens, real, global_mask)
    if self.head is not None and self.head.reads_first:
      reason = f'{self.head_name} reads the first token'
      bad = bad | begins_with_padding(real, reason)

    # RoBERTa's positions: the tokens that are no padding are counted.
    counted = jnp.cumsum(given, axis=1)
    counted += shards.sum_before(counted[:, -1])[:, None]
    positions = counted * given + self.pad_token
    types = jnp.zeros_like(tokens) if types is None else types
    x = look_up(self.embedding, 'tokens', tokens)
    x += self.position_embedding(positions)
    x += look_up(self.type_embedding, 'types', types)
    x = self.embedding_norm(x).astype(self.dtype)
    # What was refused where it could be seen is never computed wrongly.
    x = jnp.where(bad[:, None, None], jnp.nan, x)
    x = dropout(x, self.dropout_rate, fold_in(dropout_key, len(self.layers)))
    segment_ids = jnp.where(real, 0, -1)
    for layer, block in enumerate(self.layers):
      run = functools.partial(
        block,
        segment_ids=segment_ids,
        global_tokens=global_tokens,
        dropout_key=fold_in(dropout_key, layer),
      )
      x = (jax.checkpoint(run) if self.remat else run)(x)
    return x

  def _globals(self, tokens, real, mask):
    """`find_globals` of the mask, or of what the head makes global."""
    none = jnp.zeros(len(tokens), bool)
    needed = self.head is not None and self.head.needs_globals
    if mask is not None:
      if not self.max_globals and (is_traced(mask) or np.any(mask)):
        raise ValueError(
          'global_mask is given to a model without global projections '
          '(max_globals=0)'
        )
      found, bad = find_globals(mask, real, self.max_globals)
      if needed and found is None and self.max_globals:
        warnings.warn(
          f'{self.head_name} needs global tokens ({needed}), and global_mask '
          'has none',
          stacklevel=4,
        )
      return found, bad
    if not self.max_globals or not needed:
      return None, none
    mask = self.head.globals(tokens, self.separator_token) & real
    most = self.head.most_globals or self.max_globals
    found, bad = find_globals(mask, real, min(most, self.max_globals))
    if self.head.most_globals:
      return found, bad
    # A task whose global tokens are found by separators, and no separator.
    marked, some = (
      shards.any_in_sequence(flags.any(axis=1)) for flags in (mask, real)
    )
    without = ~marked & some
    if not is_traced(without) and without.any():
      raise ValueError(
        f'row {int(without.argmax())} has no token {self.separator_token} that '
        f'separates {needed}, which is to be global: give global_mask'
      )
    return found, bad | without


def _fold(name, value, shape, fold):
  check_like(name, value, shape)
  return None if value is None else fold(value)
