"""Markov models of bytes: what counting alone predicts.

A baseline for language models. Order k predicts a symbol from the k before
it, by Witten-Bell's interpolation (Bell, Cleary & Witten 1990):

  P_k(s | c) = (N(c s) + T(c) P_{k-1}(s | c')) / (N(c) + T(c))

with N the counts in the training text, T(c) the number of different symbols
seen after the context c, c' the context without its first symbol, and P_{-1}
uniform. A context never seen leaves P_{k-1}.
"""

import numpy as np

# The counts of order k are a dense table of vocab_size^(k + 1) numbers.
_MAX_TABLE = 2**26
# Positions counted at a time, which bounds the memory of their 64-bit keys.
_CHUNK = 2**24


def bits_per_character(
  train: np.ndarray, test: np.ndarray, order: int, *, vocab_size: int = 256
) -> float:
  """Mean -log2 P_order over every symbol of `test`.

  The first symbols of `test`, which have fewer than `order` before them, are
  predicted by the lower orders.

  Args:
    train: integer tokens [N] to count in.
    test: integer tokens [M] to predict.
    order: how many symbols of context, 0 or more.
    vocab_size: number of symbols; 256 for bytes.

  Raises:
    ValueError: a text is empty or has a token outside the vocabulary; the
      order is negative or too high for a table of counts.
  """
  if order < 0:
    raise ValueError(f'order={order} must not be negative')
  if vocab_size ** (order + 1) > _MAX_TABLE:
    raise ValueError(
      f'order={order} over {vocab_size} symbols wants a table of'
      f' {vocab_size}^{order + 1} counts; at most {_MAX_TABLE:,} are allowed'
    )
  for name, tokens in {'train': train, 'test': test}.items():
    if not len(tokens):
      raise ValueError(f'{name} is empty')
    if tokens.min() < 0 or tokens.max() >= vocab_size:
      raise ValueError(
        f'{name} has tokens from {tokens.min()} to {tokens.max()}, outside'
        f' [0, {vocab_size})'
      )

  probability = np.full(len(test), 1 / vocab_size)
  for k in range(min(order, len(test) - 1) + 1):
    counts = _counts(train, k, vocab_size).reshape(-1, vocab_size)
    seen = counts.sum(axis=1)
    different = np.count_nonzero(counts, axis=1)
    context, symbol = np.divmod(_keys(test, k, vocab_size), vocab_size)
    n, t = seen[context], different[context]
    known = n > 0
    mixed = counts[context, symbol] + t * probability[k:]
    probability[k:][known] = mixed[known] / (n + t)[known]
  return float(-np.log2(probability).mean())


def _keys(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
  """Each run of order + 1 tokens as one number, int64 [len - order]."""
  length = len(tokens) - order
  keys = np.zeros(length, np.int64)
  for k in range(order + 1):
    keys = keys * vocab_size + tokens[k : k + length]
  return keys


def _counts(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
  """How often each run of order + 1 tokens occurs, [vocab_size^(order+1)]."""
  size = vocab_size ** (order + 1)
  total = np.zeros(size, np.int32)
  for start in range(0, max(len(tokens) - order, 0), _CHUNK):
    keys = _keys(tokens[start : start + _CHUNK + order], order, vocab_size)
    total += np.bincount(keys, minlength=size).astype(np.int32)
  return total
