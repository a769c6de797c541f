"""Continuing prompts: one compiled loop over a streaming cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.ops.middle import MiddleKeys

# Prompts are read in chunks: the keys that one chunk's attention holds are
# then no more than a layer's cache and the chunk itself.
PREFILL_CHUNK = 512


def sample(
  model: nnx.Module,
  prompt_tokens,
  num_tokens: int,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  repetition_penalty: float = 1.0,
  stop_tokens: Sequence[int] = (),
  middle_keys: MiddleKeys | None = None,
  seed: int = 0,
  prefill_chunk: int = PREFILL_CHUNK,
) -> np.ndarray:
  """Samples `num_tokens` tokens after each prompt.

  A row's tokens depend on its prompt, its number and the seed, not on the
  other rows. Compiled once per number and (rounded up) length of prompts.

  Args:
    model: a `DecoderLM`, or whatever has its `init_cache`, `vocab_size` and
      call with `segment_ids` and `cache`.
    prompt_tokens: whole numbers, one prompt [length], a batch [batch, length],
      or a sequence of prompts of any lengths >= 1.
    num_tokens: how many to add to each prompt.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: sample among the k likeliest tokens only.
    top_p: sample among the likeliest tokens whose probabilities (after
      `temperature` and `top_k`) first reach p.
    repetition_penalty: positive logits of tokens that the row already has are
      divided by it, negative ones multiplied (arXiv 1909.05858, section 4.1).
    stop_tokens: a row ends with the first of these; what follows it is -1,
      which no tokenizer knows: decode row[row >= 0].
    middle_keys: LM-Infinite's top-k; see `DecoderLM.init_cache`.
    seed: of the random draws.
    prefill_chunk: how many prompt tokens are read at a time.

  Returns:
    The new tokens, int32 [num_tokens] for one prompt, else
    [batch, num_tokens].

  Raises:
    ValueError: an empty prompt, a token outside of the vocabulary, an option
      out of range, or more tokens than the model has (learned) positions.
  """
  prompts, single = _as_prompts(prompt_tokens)
  _check_prompts(prompts, model.vocab_size)
  for name, value in (
    ('num_tokens', num_tokens),
    ('prefill_chunk', prefill_chunk),
  ):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature must be finite and >= 0, got {temperature}')
  if top_k is not None and not 1 <= top_k <= model.vocab_size:
    raise ValueError(
      f'top_k must be in 1 ... {model.vocab_size} (the vocabulary), got {top_k}'
    )
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f'top_p must be in (0, 1], got {top_p}')

  if not 0 < repetition_penalty < float('inf'):
    raise ValueError(
      f'repetition_penalty must be finite and > 0, got {repetition_penalty}'
    )
  stop_tokens = tuple(int(token) for token in stop_tokens)
  for token in stop_tokens:
    if not 0 <= token < model.vocab_size:
      raise ValueError(
        f'stop token {token} is outside of the vocabulary 0 ... '
        f'{model.vocab_size - 1}'
      )

  longest = max(map(len, prompts))
  # The last new token needs no position: it is not read any more.
  positions = longest + num_tokens - 1
  options = {'middle_keys': middle_keys} if middle_keys else {}
  cache = model.init_cache(len(prompts), max_length=positions, **options)
  if cache.limit is not None and positions > cache.limit:
    raise ValueError(
      f'{longest} prompt tokens and {num_tokens} new ones need {positions} '
      f'positions, but the model has no more than {cache.limit}'
    )
  # All but the last token of a prompt, which is read like a new one.
  chunk = min(prefill_chunk, max(longest - 1, 1))
  padded = -(-(longest - 1) // chunk) * chunk
  tokens = np.zeros((len(prompts), padded), np.int32)
  segment_ids = np.full_like(tokens, -1)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt) - 1] = prompt[:-1]
    segment_ids[row, : len(prompt) - 1] = 0
  last = np.array([prompt[-1] for prompt in prompts], np.int32)
  graphdef, state = nnx.split(model)
  new_tokens, _ = _generate(
    graphdef,
    state,
    tokens,
    segment_ids,
    last,
    cache,
    jax.random.key(seed),
    jnp.float32(temperature),
    jnp.float32(1 if top_p is None else top_p),
    jnp.float32(repetition_penalty),
    stop_tokens=stop_tokens,
    greedy=temperature == 0,
    top_k=top_k,
    num_tokens=num_tokens,
    chunk=chunk,
  )
  new_tokens = np.asarray(new_tokens)
  return new_tokens[0] if single else new_tokens


def choose(logits, key, temperature, top_p, *, greedy=False, top_k=None):
  """Draws one token per row of logits [batch, vocabulary].

  Every row has random numbers of its own, fold_in(key, row).
  """
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  order = jnp.argsort(-logits, axis=-1)
  logits = jnp.take_along_axis(logits, order, axis=-1) / temperature
  if top_k is not None:
    logits = jnp.where(jnp.arange(logits.shape[-1]) < top_k, logits, -jnp.inf)
  p = jax.nn.softmax(logits)
  # Probability of all likelier tokens: the first one is always kept.
  before = jnp.cumsum(p, axis=-1) - p
  logits = jnp.where((before < top_p) | (before == 0), logits, -jnp.inf)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    key, jnp.arange(logits.shape[0])
  )
  rank = jax.vmap(jax.random.categorical)(keys, logits)
  chosen = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
  return chosen.astype(jnp.int32)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=('stop_tokens', 'greedy', 'top_k', 'num_tokens', 'chunk'),
  # Written in place; else there would be two of them all the while.
  donate_argnames='cache',
)
def _generate(
  graphdef,
  state,
  tokens,
  segment_ids,
  last,
  cache,
  key,
  temperature,
  top_p,
  repetition_penalty,
  *,
  stop_tokens,
  greedy,
  top_k,
  num_tokens,
  chunk,
):
  """Prefill in chunks, then decode: (int32 [batch, num_tokens], cache)."""
  model = nnx.merge(graphdef, state)
  batch = tokens.shape[0]
  rows = jnp.arange(batch)
  # Which tokens a row has already.
  has = jnp.zeros((batch, model.vocab_size), bool)
  has = has.at[rows[:, None], tokens].max(segment_ids >= 0)
  has = has.at[rows, last].set(True)

  def prefill(cache, inputs):
    tokens, segment_ids = inputs
    _, cache = model(tokens, segment_ids=segment_ids, cache=cache)
    return cache, None

  def unfinished(carry):
    step, *_, ended, _ = carry
    return (step < num_tokens) & ~ended.all()

  def decode(carry):
    step, cache, token, has, ended, new = carry
    # Rows that have ended read padding, which leaves their cache alone.
    segment_ids = jnp.where(ended, -1, 0)[:, None]
    logits, cache = model(token[:, None], segment_ids=segment_ids, cache=cache)
    logits = logits[:, 0]
    repeated = jnp.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
    token = choose(
      jnp.where(has, logits * repeated, logits),
      jax.random.fold_in(key, step),
      temperature,
      top_p,
      greedy=greedy,
      top_k=top_k,
    )
    new = new.at[:, step].set(jnp.where(ended, -1, token))
    has = has.at[rows, token].set(True)
    for stop in stop_tokens:
      ended = ended | (token == stop)
    return step + 1, cache, token, has, ended, new

  chunks = tuple(
    x.reshape(batch, x.shape[1] // chunk, chunk).swapaxes(0, 1)
    for x in (tokens, segment_ids)
  )
  cache, _ = jax.lax.scan(prefill, cache, chunks)
  ended = jnp.zeros(batch, bool)
  new = jnp.full((batch, num_tokens), -1, jnp.int32)
  carry = 0, cache, last, has, ended, new
  _, cache, *_, new = jax.lax.while_loop(unfinished, decode, carry)
  return new, cache


def _as_prompts(prompt_tokens) -> tuple[list[np.ndarray], bool]:
  """([tokens of each prompt], whether one prompt was given alone)."""
  if isinstance(prompt_tokens, str | bytes):
    raise ValueError(
      f'prompt_tokens must be whole numbers, got {prompt_tokens!r}: encode it '
      'first'
    )
  if isinstance(prompt_tokens, Sequence):
    single = all(np.ndim(entry) == 0 for entry in prompt_tokens)
  else:
    single = np.ndim(prompt_tokens) < 2
  rows = [prompt_tokens] if single else prompt_tokens
  return [np.atleast_1d(np.asarray(row)) for row in rows], single


def _check_prompts(prompts: list[np.ndarray], vocab_size: int):
  if not prompts:
    raise ValueError('prompt_tokens has no prompts: at least one is needed')
  for row, prompt in enumerate(prompts):
    if not prompt.size:
      raise ValueError(f'prompt {row} is empty: at least one token is needed')
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
      raise ValueError(
        f'prompt {row} must be whole numbers [length], got {prompt.dtype} '
        f'of shape {prompt.shape}'
      )
    outside = prompt[(prompt < 0) | (prompt >= vocab_size)]
    if outside.size:
      raise ValueError(
        f'prompt {row} has token {outside[0]}, outside of the vocabulary '
        f'0 ... {vocab_size - 1}'
      )
