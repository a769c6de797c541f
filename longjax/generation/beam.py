"""Text from an encoder-decoder: beam search, greedy or sampled.

Beam search keeps, of each source, the `num_beams` likeliest unfinished texts
and the `num_beams` best finished ones. A finished text of n tokens (without the
first, the decoder's start) has the score

    sum of its tokens' log-probabilities / n ** length_penalty

so a penalty above 0 favours long texts (the sum is negative), and 0 takes the
likeliest. The keys and values of the encoder's states are kept once for each
source, whatever the number of beams.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.generation.sample import choose

# Less than any sum of log-probabilities, and finite: no nan from differences.
NEVER = -1e9


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'min_length',
    'length_penalty',
    'stop_when_full',
    'optimistic',
    'repetition_penalty',
    'forced_bos',
    'forced_eos',
    'temperature',
    'top_p',
  ],
  meta_fields=['num_beams', 'max_length', 'no_repeat_ngram', 'greedy', 'top_k'],
)
@dataclasses.dataclass(frozen=True)
class _Options:
  """What is asked for; only a change of the static ones compiles anew.

  `early_stopping` is `stop_when_full` for True, `optimistic` for 'never';
  a forced token is -1 for none.
  """

  num_beams: int
  max_length: int
  no_repeat_ngram: int
  greedy: bool
  top_k: int | None
  min_length: jax.Array
  length_penalty: jax.Array
  stop_when_full: jax.Array
  optimistic: jax.Array
  repetition_penalty: jax.Array
  forced_bos: jax.Array
  forced_eos: jax.Array
  temperature: jax.Array
  top_p: jax.Array


def generate(
  model: nnx.Module,
  tokens,
  *,
  mask=None,
  global_mask=None,
  max_length: int = 256,
  min_length: int = 0,
  num_beams: int = 1,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
  no_repeat_ngram: int = 0,
  repetition_penalty: float = 1.0,
  forced_bos: int | None = None,
  forced_eos: int | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a text for each row of tokens.

  Compiled once per shape, `num_beams`, `max_length`, `no_repeat_ngram`, `top_k`
  and whether tokens are drawn. A row's text depends on no other row.

  Args:
    model: a `longjax.models.LED`.
    tokens, mask, global_mask: of its encoder, [batch, length].
    max_length: of a text, with the decoder's start token.
    min_length: no end before a text has this many tokens, with the start.
    num_beams: 1 for no beam search.
    length_penalty: see above; of beam search, as the next.
    early_stopping: when to stop. True: as soon as `num_beams` texts are
      finished. False: also when the likeliest unfinished text, scored as if it
      ended now, is no better than the worst finished one. 'never': when it
      could not become better, scored at `max_length` if the penalty is
      positive.
    no_repeat_ngram: no sequence of so many tokens twice in a text; 0 for none.
    repetition_penalty: as of `longjax.generation.sample`.
    forced_bos: the first token after the start.
    forced_eos: the last token of a text that reaches `max_length`.
    temperature, top_k, top_p, seed: as of `longjax.generation.sample`; with a
      temperature above 0 tokens are drawn. Not with beams.

  Returns:
    (texts int32 [batch, max_length], beginning with the decoder's start token
    and filled up with `pad_token`; scores float32 [batch]: without beams the
    sum of the log-probabilities of what was chosen among).

  Raises:
    ValueError: an option out of range, or what the model refuses.
  """
  options = _make_options(
    model,
    max_length=max_length,
    min_length=min_length,
    num_beams=num_beams,
    length_penalty=length_penalty,
    early_stopping=early_stopping,
    no_repeat_ngram=no_repeat_ngram,
    repetition_penalty=repetition_penalty,
    forced_bos=forced_bos,
    forced_eos=forced_eos,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
  )
  # What is wrong with the input is refused here, where it can be seen.
  prepared = model.prepare(tokens, mask, global_mask)
  graphdef, state = nnx.split(model)
  texts, scores = _generate(
    graphdef, state, prepared, jax.random.key(seed), options
  )
  return np.asarray(texts), np.asarray(scores)


def decode(
  model: nnx.Module, tokens, *, mask=None, global_mask=None, key=None, **options
):
  """`generate` where the model is traced: inside of `jax.jit`.

  Args:
    model, tokens, mask, global_mask: as of `generate`.
    key: of what is drawn, where a temperature is above 0.
    **options: the others of `generate`, but for the seed.

  Returns:
    (texts int32 [batch, max_length], scores float32 [batch]).

  Raises:
    ValueError: an option out of range. What is wrong with the tokens cannot be
      seen here: see `LED.__call__`.
  """
  if key is None:
    if options.get('temperature'):
      raise ValueError('a temperature above 0 draws tokens: give a key')
    key = jax.random.key(0)
  prepared = model.prepare(tokens, mask, global_mask)
  return _decode(model, prepared, key, _make_options(model, **options))


def _make_options(
  model,
  *,
  max_length=256,
  min_length=0,
  num_beams=1,
  length_penalty=1.0,
  early_stopping=False,
  no_repeat_ngram=0,
  repetition_penalty=1.0,
  forced_bos=None,
  forced_eos=None,
  temperature=0.0,
  top_k=None,
  top_p=None,
) -> _Options:
  _check(model, num_beams, max_length, min_length, early_stopping, temperature)
  if no_repeat_ngram < 0:
    raise ValueError(f'no_repeat_ngram must be >= 0, got {no_repeat_ngram}')
  if not 0 < repetition_penalty < float('inf'):
    raise ValueError(
      f'repetition_penalty must be finite and > 0, got {repetition_penalty}'
    )
  for name, token in (('forced_bos', forced_bos), ('forced_eos', forced_eos)):
    if token is not None and not 0 <= token < model.vocab_size:
      raise ValueError(
        f'{name} {token} is outside of the vocabulary 0 ... '
        f'{model.vocab_size - 1}'
      )
  if top_k is not None and not 1 <= top_k <= model.vocab_size:
    raise ValueError(
      f'top_k must be in 1 ... {model.vocab_size} (the vocabulary), got {top_k}'
    )
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f'top_p must be in (0, 1], got {top_p}')
  return _Options(
    num_beams=num_beams,
    max_length=max_length,
    no_repeat_ngram=no_repeat_ngram,
    greedy=temperature == 0,
    top_k=top_k,
    min_length=jnp.int32(min_length),
    length_penalty=jnp.float32(length_penalty),
    stop_when_full=jnp.bool_(early_stopping is True),
    optimistic=jnp.bool_(early_stopping == 'never'),
    repetition_penalty=jnp.float32(repetition_penalty),
    forced_bos=jnp.int32(-1 if forced_bos is None else forced_bos),
    forced_eos=jnp.int32(-1 if forced_eos is None else forced_eos),
    temperature=jnp.float32(temperature),
    top_p=jnp.float32(1 if top_p is None else top_p),
  )


def _check(
  model, num_beams, max_length, min_length, early_stopping, temperature
):
  if num_beams < 1:
    raise ValueError(f'num_beams must be at least 1, got {num_beams}')
  if num_beams > model.vocab_size // 2:
    raise ValueError(
      f'num_beams must be at most {model.vocab_size // 2}, half of the '
      f'vocabulary, got {num_beams}'
    )
  if not 2 <= max_length <= model.max_target_positions + 1:
    raise ValueError(
      f'max_length must be in 2 ... {model.max_target_positions + 1}, one more '
      f'than the positions of the decoder, got {max_length}'
    )
  if not 0 <= min_length <= max_length:
    raise ValueError(
      f'min_length must be in 0 ... {max_length} (max_length), got {min_length}'
    )
  if early_stopping not in (True, False, 'never'):
    raise ValueError(
      f"early_stopping must be True, False or 'never', got {early_stopping!r}"
    )
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature must be finite and >= 0, got {temperature}')
  if num_beams > 1 and temperature:
    raise ValueError(
      f'temperature={temperature} draws tokens, which num_beams={num_beams} '
      'does not: give one of them'
    )


@functools.partial(jax.jit, static_argnums=0)
def _generate(graphdef, state, prepared, key, options):
  return _decode(nnx.merge(graphdef, state), prepared, key, options)


def _decode(model, prepared, key, options):
  states, segment_ids = model.encode_prepared(prepared)
  start = model.init_state(
    states, segment_ids, options.max_length - 1, options.num_beams
  )
  if options.num_beams > 1:
    return _beam_search(model, start, len(states), options)
  return _single(model, start, len(states), key, options)


# --- What may follow ---------------------------------------------------------


def _repeats(texts, length, size):
  """Tokens that would end a second occurrence of some `size` tokens.

  Args:
    texts: int [rows, max_length], of which `length` are given.
    length: how many, traced.
    size: of what must not occur twice, at least 1.

  Returns:
    (tokens int [rows, places], whether each is to be avoided).
  """
  rows, longest = texts.shape
  places = longest - size + 1
  if places < 1:
    return jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)
  # The last size - 1 tokens, and those before each place.
  last = jax.lax.dynamic_slice_in_dim(
    texts, jnp.maximum(length - size + 1, 0), size - 1, axis=1
  )
  same = jnp.ones((rows, places), bool)
  for step in range(size - 1):
    same &= texts[:, step : step + places] == last[:, step, None]
  ends = jnp.arange(places) + size - 1
  known = (ends < length) & (length >= size)
  return texts[:, size - 1 :], same & known


def _restrict(scores, texts, length, model, options):
  """Scores [rows, vocabulary] with -inf for what may not follow the texts."""
  rows = jnp.arange(len(texts))[:, None]
  given = jnp.arange(texts.shape[1]) < length
  has = jnp.zeros(scores.shape, bool).at[rows, texts].max(given)
  factor = options.repetition_penalty
  punished = jnp.where(scores > 0, scores / factor, scores * factor)
  scores = jnp.where(has, punished, scores)
  if options.no_repeat_ngram:
    tokens, repeated = _repeats(texts, length, options.no_repeat_ngram)
    scores = scores.at[rows, tokens].min(jnp.where(repeated, -jnp.inf, jnp.inf))
  vocabulary = jnp.arange(scores.shape[1])
  is_end = vocabulary == model.eos_token
  scores = jnp.where(is_end & (length < options.min_length), -jnp.inf, scores)
  for token, place in (
    (options.forced_bos, 1),
    (options.forced_eos, options.max_length - 1),
  ):
    only = jnp.where(vocabulary == token, 0.0, -jnp.inf)
    scores = jnp.where((length == place) & (token >= 0), only, scores)
  return scores


# --- One text a row ----------------------------------------------------------


def _single(model, state, batch, key, options):
  texts = jnp.full((batch, options.max_length), model.pad_token, jnp.int32)
  texts = texts.at[:, 0].set(model.decoder_start_token)

  def unfinished(carry):
    length, *_, ended = carry
    return (length < options.max_length) & ~ended.all()

  def step(carry):
    length, state, texts, sums, ended = carry
    last = jax.lax.dynamic_slice_in_dim(texts, length - 1, 1, axis=1)
    logits, state = model.decode(last, state)
    logits = _restrict(logits[:, 0], texts, length, model, options)
    token = choose(
      logits,
      jax.random.fold_in(key, length),
      options.temperature,
      options.top_p,
      greedy=options.greedy,
      top_k=options.top_k,
    )
    log_p = jax.nn.log_softmax(logits)
    gained = jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
    sums = sums + jnp.where(ended, 0.0, gained)
    texts = texts.at[:, length].set(jnp.where(ended, model.pad_token, token))
    return length + 1, state, texts, sums, ended | (token == model.eos_token)

  carry = (1, state, texts, jnp.zeros(batch), jnp.zeros(batch, bool))
  _, _, texts, sums, _ = jax.lax.while_loop(unfinished, step, carry)
  return texts, sums


# --- Beam search -------------------------------------------------------------


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'length',
    'state',
    'texts',
    'scores',
    'done',
    'done_scores',
    'is_done',
    'open',
    'stopped',
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Search:
  """A search between two tokens; [batch, beams, ...] throughout.

  Attributes:
    length: of the unfinished texts.
    state: the decoder's, rows batch * beams.
    texts, scores: unfinished texts and the sums of their log-probabilities,
      best first.
    done, done_scores, is_done: finished texts, best first; whether there is
      one.
    open: [batch], whether an unfinished text may still become better.
    stopped: whether all is over.
  """

  length: jax.Array
  state: object
  texts: jax.Array
  scores: jax.Array
  done: jax.Array
  done_scores: jax.Array
  is_done: jax.Array
  open: jax.Array
  stopped: jax.Array


def _pick(x, index):
  """x [batch, n, ...] at index [batch, m] -> [batch, m, ...]."""
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _beam_search(model, state, batch, options):
  beams, longest = options.num_beams, options.max_length
  texts = jnp.full((batch, beams, longest), model.pad_token, jnp.int32)
  texts = texts.at[:, :, 0].set(model.decoder_start_token)
  nothing = jnp.full((batch, beams), NEVER)
  search = _Search(
    length=jnp.int32(1),
    state=state,
    texts=texts,
    # All beams are the same yet: only the first goes on.
    scores=nothing.at[:, 0].set(0.0),
    done=texts,
    done_scores=nothing,
    is_done=jnp.zeros((batch, beams), bool),
    open=jnp.ones(batch, bool),
    stopped=jnp.bool_(False),
  )
  search = jax.lax.while_loop(
    lambda search: ~search.stopped,
    functools.partial(_step, model, options),
    search,
  )
  return search.done[:, 0], search.done_scores[:, 0]


def _step(model, options, search):
  """All beams grow by one token."""
  batch, beams, longest = search.texts.shape
  length = search.length
  flat = search.texts.reshape(batch * beams, longest)
  last = jax.lax.dynamic_slice_in_dim(flat, length - 1, 1, axis=1)
  logits, state = model.decode(last, search.state)
  log_p = jax.nn.log_softmax(logits[:, 0])
  log_p = _restrict(log_p, flat, length, model, options)
  vocabulary = log_p.shape[1]
  total = log_p.reshape(batch, beams, vocabulary) + search.scores[..., None]

  # Twice as many as beams: should half of them end, the others go on.
  scores, index = jax.lax.top_k(total.reshape(batch, -1), 2 * beams)
  parents, tokens = index // vocabulary, (index % vocabulary).astype(jnp.int32)
  texts = _pick(search.texts, parents).at[:, :, length].set(tokens)
  ends = (tokens == model.eos_token) | (length + 1 >= longest)

  going, best = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), beams)
  rows = jnp.arange(batch)[:, None] * beams + _pick(parents, best)
  state = state.take(rows.reshape(-1))

  # Only an end among the best `beams` counts.
  ended = ends & (jnp.arange(2 * beams) < beams)
  count = length.astype(jnp.float32)  # tokens of a text that ends here
  refused = jnp.where(ended, 0.0, NEVER)
  refused += jnp.where(search.open, 0.0, NEVER)[:, None]
  full = search.is_done.all(axis=1, keepdims=True) & options.stop_when_full
  refused += jnp.where(full, NEVER, 0.0)
  final = scores / count**options.length_penalty + refused
  merged = jnp.concatenate([search.done_scores, final], axis=1)
  done_scores, kept = jax.lax.top_k(merged, beams)
  done = _pick(jnp.concatenate([search.done, texts], axis=1), kept)
  is_done = _pick(jnp.concatenate([search.is_done, ended], axis=1), kept)

  optimistic = options.optimistic & (options.length_penalty > 0)
  count = jnp.where(optimistic, longest - 1, count)
  likeliest = going[:, 0] / count**options.length_penalty
  worst = jnp.where(is_done, done_scores.min(axis=1, keepdims=True), NEVER)
  open_ = search.open & (likeliest[:, None] > worst).any(axis=1)
  stopped = ~open_.any() | ends.all()
  stopped |= is_done.all() & options.stop_when_full
  return _Search(
    length=length + 1,
    state=state,
    texts=_pick(texts, best),
    scores=going,
    done=done,
    done_scores=done_scores,
    is_done=is_done,
    open=open_,
    stopped=stopped,
  )
