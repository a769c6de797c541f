"""Loss by position: streaming, truncation, averages, the picture."""

import jax
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.evaluation import length as evaluation
from longjax.models import llama

VOCABULARY, LENGTH = 13, 75
KEYWORDS = llama(
  vocab_size=VOCABULARY,
  num_layers=2,
  features=8,
  num_heads=2,
  num_kv_heads=1,
  mlp_features=12,
)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


def make(pattern):
  model = longjax.DecoderLM(**KEYWORDS, patterns=pattern, rngs=nnx.Rngs(0))
  # Weights large enough for positions to matter.
  return jax.tree.map(lambda x: 8 * x, model)


def plain(model, tokens):
  """Nats of tokens 1, 2, ... by one pass over everything."""
  logp = jax.nn.log_softmax(model(tokens[:, :-1]))
  return -np.take_along_axis(np.asarray(logp), tokens[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize(
  'pattern',
  [
    longjax.Full(),
    longjax.Lambda(9, 3),
    longjax.Lambda(9, 3, ceiling=False),
    longjax.DistanceCeiling(9),
    longjax.AttentionSinks(9, 3),
    longjax.SelfExtend(9, 4),
  ],
)
def test_streaming_is_one_pass_whatever_the_chunk(pattern):
  model = make(pattern)
  wanted = plain(model, TOKENS)
  for chunk in (1, 16, 100):
    got = evaluation.streamed_losses(model, TOKENS, chunk=chunk)
    np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_chunks_tell_where_they_are():
  chunks = list(evaluation.stream(make(longjax.Lambda(9, 3)), TOKENS, chunk=32))
  assert [c.first for c in chunks] == [1, 33, 65]
  assert [c.losses.shape for c in chunks] == [(2, 32), (2, 32), (2, 10)]
  assert all(c.seconds > 0 for c in chunks)


def test_a_stream_goes_on_from_a_cache():
  model = make(longjax.Lambda(9, 3))
  whole = evaluation.streamed_losses(model, TOKENS)
  first = next(evaluation.stream(model, TOKENS, chunk=32))
  rest = evaluation.stream(model, TOKENS[:, 32:], chunk=9, cache=first.cache)
  losses = np.concatenate([first.losses, *(c.losses for c in rest)], axis=1)
  np.testing.assert_allclose(losses, whole, atol=2e-4)


def test_truncation_forgets_everything_before():
  model = make(longjax.Full())
  length, stride = 16, 8
  got = evaluation.truncated_losses(model, TOKENS, length=length, stride=stride)
  assert got.shape == (2, LENGTH - 1)
  # Tokens 1 ... 16 in one window, each next 8 in a window of their own.
  for token in (1, 5, 16, 17, 24, 25, 60, LENGTH - 1):
    start = 0 if token <= length else -(-(token - length) // stride) * stride
    wanted = plain(model, TOKENS[:, start : token + 1])[:, -1]
    np.testing.assert_allclose(got[:, token - 1], wanted, atol=2e-4)


def test_averages_and_confidence():
  rng = np.random.default_rng(1)
  losses = rng.normal(2.0, 1.0, (50, 100)) + np.arange(100) / 10
  result = evaluation.loss_by_position(losses, (1, 11, 51, 101))
  np.testing.assert_allclose(
    result.mean,
    [losses[:, a:b].mean() for a, b in ((0, 10), (10, 50), (50, 100))],
  )
  low, high = np.array(result.low), np.array(result.high)
  assert (low < result.mean).all() and (result.mean < high).all()
  # The error of a mean over 50 documents of independent bins.
  wanted = 2 * 1.96 / np.sqrt(50 * np.array([10, 40, 50]))
  np.testing.assert_allclose(high - low, wanted, rtol=0.3)
  alone = evaluation.loss_by_position(losses[:1], (1, 101))
  assert np.isnan(alone.low[0]) and alone.documents == 1


def test_the_picture(tmp_path):
  losses = np.random.default_rng(0).random((3, 64))
  result = evaluation.loss_by_position(losses, (1, 8, 16, 32, 65))
  path = tmp_path / 'loss.png'
  evaluation.draw({'a': result, 'b': result}, path, trained_length=16, limit=3)
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: evaluation.streamed_losses(m, TOKENS[0]), r'got \(75,\)'),
    (lambda m: evaluation.streamed_losses(m, TOKENS[:, :1]), r'got \(2, 1\)'),
    (
      lambda m: evaluation.streamed_losses(m, TOKENS + 5),
      'token 1[3-7] is out',
    ),
    (lambda m: evaluation.streamed_losses(m, TOKENS, chunk=0), 'got 0'),
    (
      lambda m: evaluation.truncated_losses(m, TOKENS, length=8, stride=9),
      'stride must lie in 1 ... 8 .* got 9',
    ),
    (
      lambda m: evaluation.loss_by_position(np.ones((2, 9)), (1, 5, 5)),
      'edges must grow from 1 or more to 10',
    ),
    (
      lambda m: evaluation.loss_by_position(np.ones((2, 9)), (1, 11)),
      'edges must grow',
    ),
  ],
)
def test_bad_input(call, message):
  model = make(longjax.Lambda(4, 1))
  with pytest.raises(ValueError, match=message):
    call(model)


def test_perplexity_at_milestones():
  losses = np.log([[2.0, 4, 4, 8], [2, 4, 4, 2]])
  got = evaluation.perplexity_at(losses, (2, 4, 5), 2)
  assert got == pytest.approx({2: 2.0, 4: 4.0, 5: 4.0})
  for milestone in (1, 6):
    with pytest.raises(ValueError, match=f'milestone {milestone} lies outside'):
      evaluation.perplexity_at(losses, (milestone,), 2)
