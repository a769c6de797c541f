"""Sampling: against a plain loop, and what the options keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import DecoderLM, Full, Lambda, SlidingWindow
from longjax.generation import choose, sample

VOCABULARY = 7


WINDOWS = (SlidingWindow(2), Lambda(window=3, start=1))


def make(patterns=WINDOWS, **kwargs):
  return DecoderLM(
    VOCABULARY,
    2,
    16,
    2,
    patterns=patterns,
    implementation='reference',
    # Without a norm the logits of an untrained model hardly differ.
    scale_embedding=True,
    rngs=nnx.Rngs(0),
    **kwargs,
  )


MODEL = make()


def test_greedy_equals_a_loop_that_recomputes_everything():
  """Ragged prompts, read in chunks, past the windows; alone as in a batch."""
  prompts = [[1, 2, 3, 4, 5, 6, 0], [3], [5, 5, 5, 1]]
  out = sample(MODEL, prompts, 9, temperature=0, prefill_chunk=3)
  assert out.shape == (3, 9) and out.dtype == np.int32

  @jax.jit
  def next_token(tokens, length):
    ids = jnp.where(jnp.arange(16) < length, 0, -1)
    return MODEL(tokens[None], segment_ids=ids[None])[0, length - 1].argmax()

  for prompt, row in zip(prompts, out, strict=True):
    tokens = np.zeros(16, int)
    tokens[: len(prompt)] = prompt
    for step in range(9):
      length = len(prompt) + step
      tokens[length : length + 1] = token = next_token(tokens, length)
      assert token == row[step]


def test_a_row_ends_with_its_stop_token():
  prompts = [[1, 2, 3, 4, 5, 6, 0], [3], [5, 5, 5, 1]]
  free = sample(MODEL, prompts, 12, seed=3)
  stops = (2, 5)
  out = sample(MODEL, prompts, 12, seed=3, stop_tokens=stops)
  ends = set()
  for row, wanted in zip(out, free, strict=True):
    hits = np.flatnonzero(np.isin(wanted, stops))
    end = hits[0] + 1 if hits.size else 12
    np.testing.assert_array_equal(row[:end], wanted[:end])
    assert (row[end:] == -1).all()
    ends.add(int(end))
  assert len(ends) > 1 and min(ends) < 12


def test_repetition_penalty():
  """Against a loop; a huge one uses every token once before any again."""
  prompt = [1, 2]
  penalty = 20.0
  out = sample(MODEL, prompt, 6, temperature=0, repetition_penalty=penalty)
  tokens = [*prompt, *map(int, out)]
  before = np.array(MODEL(jnp.asarray([tokens]))[0])
  for step in range(len(prompt), len(tokens)):
    logits = before[step - 1]
    for seen in set(tokens[:step]):
      logits[seen] *= penalty if logits[seen] < 0 else 1 / penalty
    assert tokens[step] == logits.argmax()
  plain = sample(MODEL, prompt, 6, temperature=0)
  assert (plain != out).any()
  shifted = make(output_bias=True)
  shifted.output_bias[...] = jnp.full(VOCABULARY, -100.0)
  out = sample(
    shifted, prompt, VOCABULARY - 2, temperature=0, repetition_penalty=1e3
  )
  assert set(out) == set(range(VOCABULARY)) - set(prompt)


def test_rows_depend_on_seed_and_row_not_on_neighbours():
  prompts = np.asarray([[1, 2, 3], [4, 5, 6]])
  out = sample(MODEL, prompts, 12, seed=1)
  np.testing.assert_array_equal(out, sample(MODEL, prompts, 12, seed=1))
  assert (out != sample(MODEL, prompts, 12, seed=2)).any()
  prompts[1] = 0
  np.testing.assert_array_equal(out[0], sample(MODEL, prompts, 12, seed=1)[0])
  # The same prompt twice gives two continuations.
  twice = sample(MODEL, [[1, 2, 3]] * 2, 12, seed=1)
  assert (twice[0] != twice[1]).any()
  assert ((out >= 0) & (out < VOCABULARY)).all()


def test_one_prompt_gives_one_row_as_far_as_positions_go():
  model = make(Full(), position='learned', max_positions=8)
  for prompt in ([1, 2, 3], (1, 2, 3), np.asarray([1, 2, 3]), jnp.arange(3)):
    out = sample(model, prompt, 6, top_k=2)
    assert out.shape == (6,) and ((out >= 0) & (out < VOCABULARY)).all()
  with pytest.raises(ValueError, match='3 .* and 7 .* need 9 .* than 8'):
    sample(model, prompt, 7)


def frequencies(logits, count=4000, temperature=1.0, top_p=1.0, **kwargs):
  tokens = choose(
    jnp.tile(jnp.asarray(logits), (count, 1)),
    jax.random.key(0),
    temperature,
    top_p,
    **kwargs,
  )
  return np.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
  ('kwargs', 'expected'),
  [
    ({}, [0.2, 0.4, 0.1, 0.3]),
    # p ** 2, normalised.
    (dict(temperature=0.5), [0.04 / 0.3, 0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=1), [0, 1, 0, 0]),
    # 0.4 + 0.3 + 0.2 first reach 0.75; 0.4 alone reaches 0.3.
    (dict(top_p=0.75), [2 / 9, 4 / 9, 0, 3 / 9]),
    (dict(top_p=0.3), [0, 1, 0, 0]),
    (dict(top_p=1e-9), [0, 1, 0, 0]),
    # Of the two likeliest, 4/7 reaches a half.
    (dict(top_k=2, top_p=0.5), [0, 1, 0, 0]),
    (dict(greedy=True), [0, 1, 0, 0]),
  ],
  ids=str,
)
def test_choose_follows_the_distribution(kwargs, expected):
  found = frequencies(np.log([0.2, 0.4, 0.1, 0.3]), **kwargs)
  # Five standard deviations of 4,000 draws.
  np.testing.assert_allclose(found, expected, atol=0.04)
  assert (found[np.asarray(expected) == 0] == 0).all()


def test_top_k_keeps_exactly_k_of_equals():
  assert (frequencies(np.zeros(4), top_k=2) > 0).sum() == 2


@pytest.mark.parametrize(
  ('prompt', 'kwargs', 'message'),
  [
    ([], {}, 'prompt 0 is empty'),
    ([[1], []], {}, 'prompt 1 is empty'),
    (np.zeros((0, 3), int), {}, 'has no prompts'),
    ([1, 7], {}, r'prompt 0 has token 7, outside of the vocabulary 0 \.\.\. 6'),
    ([[1], [-1]], {}, 'prompt 1 has token -1'),
    ([0.5], {}, 'must be whole numbers'),
    ('text', {}, "got 'text': encode it first"),
    (np.zeros((1, 1, 1), int), {}, r'of shape \(1, 1\)'),
    ([1], dict(num_tokens=0), 'num_tokens must be at least 1, got 0'),
    ([1], dict(prefill_chunk=0), 'prefill_chunk must be at least 1, got 0'),
    ([1], dict(temperature=-1.0), r'temperature .* >= 0, got -1.0'),
    ([1], dict(temperature=float('nan')), 'temperature .* got nan'),
    ([1], dict(top_p=0.0), r'top_p must be in \(0, 1\], got 0.0'),
    ([1], dict(top_p=1.1), 'got 1.1'),
    ([1], dict(top_k=0), r'top_k must be in 1 \.\.\. 7 .* got 0'),
    ([1], dict(top_k=8), 'got 8'),
    ([1], dict(repetition_penalty=0.0), 'repetition_penalty .* got 0.0'),
    ([1], dict(stop_tokens=(7,)), 'stop token 7 is outside'),
  ],
  ids=str,
)
def test_errors(prompt, kwargs, message):
  with pytest.raises(ValueError, match=message):
    sample(MODEL, prompt, **{'num_tokens': 3, **kwargs})
