"""Loss by position in texts longer than a model was trained on.

LM-Infinite's figures 3 to 5: negative log-likelihood of each token given all
that its model lets it see, averaged over documents position by position.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.evaluation.bits import windows
from longjax.nn.cache import Cache


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What streaming one chunk of tokens gave.

  Attributes:
    first: the number, among the tokens given, of the first one scored.
    losses: float32 [batch, n], nats of tokens first, ..., first + n - 1, each
      given those before it.
    seconds: that the chunk took; the first one compiles.
    cache: of the model after it, from which another `stream` may go on; gone
      once the next chunk is asked for. None if there was none.
  """

  first: int
  losses: np.ndarray
  seconds: float
  cache: Cache | None


def _nll(logits, tokens):
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef, state, cache, tokens, targets, real):
  model = nnx.merge(graphdef, state)
  logits, cache = model(tokens, segment_ids=jnp.where(real, 0, -1), cache=cache)
  return _nll(logits, targets), cache


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, state, tokens, targets):
  return _nll(nnx.merge(graphdef, state)(tokens), targets)


def stream(
  model: nnx.Module,
  tokens: np.ndarray,
  *,
  chunk: int = 512,
  cache: Cache | None = None,
) -> Iterator[Chunk]:
  """Reads texts of any length chunk by chunk through a cache.

  With a pattern that looks back a bounded way (a window, `Lambda`), time and
  memory per chunk do not grow; with any other the cache holds the whole text.

  Args:
    model: a `DecoderLM`.
    tokens: int [batch, length], length >= 2.
    chunk: tokens read at a time. No result depends on it. One that holds the
      whole text is read without a cache: a model that sees everything has half
      the work, as it skips the blocks of keys to come; the logits of all tokens
      are in memory at once.
    cache: of what the model has read before these tokens; used up. None: they
      begin their texts.

  Yields:
    A `Chunk` after each, the last one shorter.

  Raises:
    ValueError: tokens of another shape, or outside of the vocabulary.
  """
  tokens = _check_tokens(tokens, model.vocab_size)
  if chunk < 1:
    raise ValueError(f'chunk must be at least 1, got {chunk}')
  batch, length = tokens.shape
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  graphdef, state = nnx.split(model)
  if cache is None and chunk >= length - 1:
    started = time.perf_counter()
    losses = np.asarray(_whole(graphdef, state, inputs, targets))
    yield Chunk(1, losses, time.perf_counter() - started, None)
    return
  chunk = min(chunk, length - 1)
  if cache is None:
    cache = model.init_cache(batch, max_length=length - 1)
  for first in range(0, length - 1, chunk):
    started = time.perf_counter()
    count = min(chunk, length - 1 - first)
    piece = np.zeros((2, batch, chunk), np.int32)
    piece[0, :, :count] = inputs[:, first : first + count]
    piece[1, :, :count] = targets[:, first : first + count]
    real = np.broadcast_to(np.arange(chunk) < count, (batch, chunk))
    losses, cache = _step(graphdef, state, cache, *piece, real)
    losses = np.asarray(losses)[:, :count]
    yield Chunk(first + 1, losses, time.perf_counter() - started, cache)


def streamed_losses(
  model: nnx.Module,
  tokens: np.ndarray,
  *,
  chunk: int = 512,
  progress: Callable | None = None,
) -> np.ndarray:
  """Nats of every token but the first: float32 [batch, length - 1].

  Args:
    model, tokens, chunk: of `stream`.
    progress: wraps the iterator of chunks, as tqdm does.
  """
  chunks = stream(model, tokens, chunk=chunk)
  chunks = progress(chunks) if progress else chunks
  return np.concatenate([c.losses for c in chunks], axis=1)


def truncated_losses(
  model: nnx.Module, tokens: np.ndarray, *, length: int, stride: int
) -> np.ndarray:
  """The same with context cut off: the baseline that truncates its input.

  Every token is scored by a fresh model that has read the `length` - `stride`
  to `length` tokens before it, and nothing else.

  Raises:
    ValueError: see `stream`; or a stride outside of 1 ... length.
  """
  tokens = _check_tokens(tokens, model.vocab_size)
  if not 1 <= stride <= length:
    raise ValueError(
      f'stride must lie in 1 ... {length} (the length), got {stride}'
    )
  batch, total = tokens.shape
  graphdef, state = nnx.split(model)

  losses = np.zeros((batch, total - 1), np.float32)
  for start, first, end in windows(total, length, stride):
    count = end - 1 - start
    piece = np.zeros((2, batch, length), np.int32)
    piece[0, :, :count] = tokens[:, start : end - 1]
    piece[1, :, :count] = tokens[:, start + 1 : end]
    scored = np.asarray(_whole(graphdef, state, *piece))
    losses[:, first - 1 : end - 1] = scored[:, first - 1 - start : count]
  return losses


def _check_tokens(tokens, vocab_size):
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
    raise ValueError(
      f'tokens must have shape [batch >= 1, length >= 2], got {tokens.shape}'
    )
  outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if outside.size:
    raise ValueError(
      f'token {outside[0]} is outside of the vocabulary 0 ... {vocab_size - 1}'
    )
  return tokens


@dataclasses.dataclass(frozen=True)
class LossByPosition:
  """Mean nats per token between edges, over documents.

  Attributes:
    edges: positions e_0 < ... < e_n; bin i holds tokens e_i ... e_{i+1} - 1.
    mean: [n].
    low, high: [n], 95% confidence of the mean by resampling documents; nan for
      a single one.
    documents: how many.
  """

  edges: tuple[int, ...]
  mean: tuple[float, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]
  documents: int


def loss_by_position(
  losses: np.ndarray, edges: Sequence[int], *, seed: int = 0
) -> LossByPosition:
  """Averages `losses` [documents, length - 1], of tokens 1, 2, ....

  Raises:
    ValueError: edges that do not grow, or lie outside of the tokens scored.
  """
  edges = tuple(int(edge) for edge in edges)
  last = losses.shape[1] + 1
  if (
    len(edges) < 2
    or any(a >= b for a, b in zip(edges, edges[1:], strict=False))
    or edges[0] < 1
    or edges[-1] > last
  ):
    raise ValueError(
      f'edges must grow from 1 or more to {last} at most, got {edges}'
    )
  means = np.stack(
    [
      losses[:, a - 1 : b - 1].mean(axis=1, dtype=np.float64)
      for a, b in zip(edges, edges[1:], strict=False)
    ],
    axis=1,
  )
  documents = len(means)
  low = high = np.full(means.shape[1], np.nan)
  if documents > 1:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, documents, (1000, documents))
    low, high = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975], axis=0)
  return LossByPosition(
    edges,
    *(tuple(map(float, y)) for y in (means.mean(axis=0), low, high)),
    documents,
  )


def perplexity_at(
  losses: np.ndarray, milestones: Sequence[int], window: int
) -> dict[int, float]:
  """Perplexity around milestones, as of LM-Infinite's table 1.

  Args:
    losses: float [documents, length - 1], nats of every token but the first.
    milestones: positions, 2 ... length.
    window: how many tokens before each milestone are averaged over, and over
      all documents (fewer where the text has just begun).

  Returns:
    {milestone: exp of their mean nats}.

  Raises:
    ValueError: a milestone outside of the texts.
  """
  length = losses.shape[1] + 1
  for milestone in milestones:
    if not 2 <= milestone <= length:
      raise ValueError(
        f'milestone {milestone} lies outside of 2 ... {length}, the texts'
      )
  ends = {milestone: milestone - 1 for milestone in milestones}
  return {
    milestone: float(
      np.exp(losses[:, max(0, end - window) : end].mean(dtype=np.float64))
    )
    for milestone, end in ends.items()
  }


def draw(
  results: Mapping[str, LossByPosition],
  path: str | os.PathLike,
  *,
  trained_length: int | None = None,
  title: str = '',
  limit: float | None = None,
):
  """Writes a picture of loss against position, a line for each result.

  Args:
    results: by label.
    path: of the .png.
    trained_length: marked by a vertical line.
    title: above the axes.
    limit: largest loss shown; what explodes leaves the picture.
  """
  from matplotlib import figure

  canvas = figure.Figure(figsize=(9, 4.5), layout='constrained')
  axes = canvas.add_subplot()
  for label, result in results.items():
    centres = [
      (a + b) / 2 for a, b in zip(result.edges, result.edges[1:], strict=False)
    ]
    (line,) = axes.plot(centres, result.mean, label=label)
    # Where models agree their bands lie on each other: faint enough to see by.
    axes.fill_between(
      centres,
      result.low,
      result.high,
      color=line.get_color(),
      alpha=0.3 / len(results),
      linewidth=0,
    )
  if trained_length is not None:
    axes.axvline(trained_length, color='grey', linestyle=':')
    axes.annotate(
      'trained length',
      (trained_length, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(3, -3),
      textcoords='offset points',
      rotation=90,
      va='top',
      color='grey',
      fontsize='small',
    )
  axes.set_xscale('log', base=2)
  axes.set_ylim(top=limit)
  axes.set(xlabel='position in the text (tokens)', ylabel='nats per token')
  axes.set_title(title)
  canvas.legend(loc='outside right upper')
  axes.grid(alpha=0.3)
  canvas.savefig(path, dpi=150)


def draw_stream(result: Mapping[str, Sequence[float]], path: str | os.PathLike):
  """Writes a picture of loss, time and memory along one endless text.

  Args:
    result: lists 'position', 'nats', 'resident_bytes', 'seconds_per_chunk' and
      'processor_seconds_per_chunk' (None where there is none to tell).
    path: of the .png.
  """
  from matplotlib import figure

  canvas = figure.Figure(figsize=(8, 6), layout='constrained')
  panels = (
    (('nats',), 'nats per token', 1),
    (
      ('seconds_per_chunk', 'processor_seconds_per_chunk'),
      'seconds per chunk',
      1,
    ),
    (('resident_bytes',), 'memory (MB)', 1e6),
  )
  for axes, (names, label, unit) in zip(
    canvas.subplots(len(panels), sharex=True), panels, strict=True
  ):
    values = [np.array(result[name], float) / unit for name in names]
    for name, value in zip(names, values, strict=True):
      axes.plot(
        result['position'], value, label=name.removesuffix('_per_chunk')
      )
    axes.set(ylabel=label, ylim=(0, 1.2 * np.nanmax(values)))
    if len(names) > 1:
      axes.legend(fontsize='small')
    axes.grid(alpha=0.3)
  axes.set_xlabel('position in the text (tokens)')
  canvas.savefig(path, dpi=150)
