"""What an encoder's hidden states are read out with, task by task.

Each head says which tokens its task makes global when nobody says otherwise
(arXiv 2004.05150, section 5 and appendix D), as bool [batch, length] or None,
and whether it reads the first token of each row.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.nn.attention import NORMAL_INIT
from longjax.nn.embedding import dropout
from longjax.nn.transformer import make_norm
from longjax.sharding import shards


def _linear(inputs, outputs, kwargs):
  return nnx.Linear(
    inputs,
    outputs,
    kernel_init=NORMAL_INIT,
    dtype=kwargs['dtype'],
    param_dtype=kwargs['param_dtype'],
    rngs=kwargs['rngs'],
  )


def before_separator(tokens, separator: int):
  """The tokens before the first separator; of a row without one, none."""
  found, last = _count(tokens == separator)
  return (found == 0) & (last > 0)


def after_separators(tokens, separator: int):
  """The tokens after the first separator and the one that follows it."""
  found, _ = _count(tokens == separator)
  # Two places on: of <s> a </s></s> b </s>, b </s>.
  return shards.rows_before(found > 0, 2)[:, : tokens.shape[1]]


def _count(flags):
  """(True ones up to each [batch, length], all of them [batch, 1])."""
  found = jnp.cumsum(flags, axis=1)
  found += shards.sum_before(found[:, -1])[:, None]
  return found, shards.sum_over_sequence(flags.sum(axis=1, keepdims=True))


class Head(nnx.Module):
  """The base of all heads; makes no token global."""

  reads_first = False
  # What the task's global tokens are, for messages; None if it needs none.
  needs_globals: str | None = None
  # The most that `globals` marks in a row, where that is known.
  most_globals: int | None = None

  @staticmethod
  def globals(tokens, separator: int):
    """The tokens made global, bool [batch, length], or None."""
    del tokens, separator
    return None


class Pooler(Head):
  """tanh(dense(first token)): [batch, features]."""

  reads_first = True

  def __init__(self, features, num_labels, **kwargs):
    del num_labels
    self.dense = _linear(features, features, kwargs)

  def __call__(self, hidden, dropout_key=None, table=None):
    return jnp.tanh(self.dense(shards.first_token(hidden)))


class MaskedLM(Head):
  """Logits over the vocabulary at every token, through the embedding table.

  norm(gelu(dense(x))) @ table^T + bias, float32 [batch, length, vocab_size].
  """

  def __init__(self, features, num_labels, *, vocab_size, epsilon, **kwargs):
    del num_labels
    self.dtype = jnp.dtype(kwargs['dtype'])
    self.dense = _linear(features, features, kwargs)
    self.norm = make_norm(
      'layer',
      features,
      epsilon=epsilon,
      param_dtype=kwargs['param_dtype'],
      rngs=kwargs['rngs'],
    )
    self.bias = nnx.Param(jnp.zeros(vocab_size, kwargs['param_dtype']))

  def __call__(self, hidden, dropout_key=None, table=None):
    """hidden [..., features]: only the masked tokens, if that is enough."""
    x = jax.nn.gelu(self.dense(hidden), approximate=False)
    x = self.norm(x).astype(self.dtype)
    logits = jnp.einsum(
      '...f,vf->...v',
      x,
      table.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits + self.bias[...].astype(jnp.float32)


class SequenceClassification(Head):
  """Logits [batch, num_labels] from the first token, which is global."""

  reads_first = True
  needs_globals = 'the first token'
  most_globals = 1

  def __init__(self, features, num_labels, *, dropout_rate, **kwargs):
    self.dropout_rate = dropout_rate
    self.dense = _linear(features, features, kwargs)
    self.output = _linear(features, num_labels, kwargs)

  @staticmethod
  def globals(tokens, separator):
    del separator
    numbers = shards.first_position(tokens.shape[1])
    numbers = numbers + jnp.arange(tokens.shape[1])
    return jnp.broadcast_to(numbers == 0, tokens.shape)

  def __call__(self, hidden, dropout_key=None, table=None):
    drop = functools.partial(dropout, rate=self.dropout_rate, key=dropout_key)
    x = jnp.tanh(self.dense(drop(shards.first_token(hidden), site=0)))
    return self.output(drop(x, site=1)).astype(jnp.float32)


class TokenClassification(Head):
  """Logits [batch, length, num_labels]."""

  def __init__(self, features, num_labels, *, dropout_rate, **kwargs):
    self.dropout_rate = dropout_rate
    self.output = _linear(features, num_labels, kwargs)

  def __call__(self, hidden, dropout_key=None, table=None):
    x = dropout(hidden, self.dropout_rate, dropout_key)
    return self.output(x).astype(jnp.float32)


class QuestionAnswering(Head):
  """(start, end) logits, each [batch, length]; the question is global.

  Rows are <s> question </s></s> document </s>: global is what comes before the
  first separator.
  """

  needs_globals = 'the question'
  globals = staticmethod(before_separator)

  def __init__(self, features, num_labels, **kwargs):
    del num_labels
    self.output = _linear(features, 2, kwargs)

  def __call__(self, hidden, dropout_key=None, table=None):
    logits = self.output(hidden).astype(jnp.float32)
    return logits[..., 0], logits[..., 1]


class MultipleChoice(Head):
  """A score for each row, [batch]; the choice is global.

  Rows are <s> question </s></s> choice </s>: global is what comes after both
  separators. The model folds choices into rows and back.
  """

  reads_first = True
  needs_globals = 'the choice'
  globals = staticmethod(after_separators)

  def __init__(self, features, num_labels, *, dropout_rate, **kwargs):
    del num_labels
    self.dropout_rate = dropout_rate
    self.pooler = Pooler(features, None, **kwargs)
    self.output = _linear(features, 1, kwargs)

  def __call__(self, hidden, dropout_key=None, table=None):
    x = dropout(self.pooler(hidden), self.dropout_rate, dropout_key)
    return self.output(x)[:, 0].astype(jnp.float32)


HEADS = {
  'pooler': Pooler,
  'masked_lm': MaskedLM,
  'sequence_classification': SequenceClassification,
  'token_classification': TokenClassification,
  'question_answering': QuestionAnswering,
  'multiple_choice': MultipleChoice,
}
