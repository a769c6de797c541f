"""What is generated is what transformers generates, and how it is asked for."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import longjax
from longjax.generation import beam, decode, generate
from longjax.interop import led as interop
from longjax.models.led import LED

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
NAMES = {
  'no_repeat_ngram_size': 'no_repeat_ngram',
  'forced_bos_token_id': 'forced_bos',
  'forced_eos_token_id': 'forced_eos',
}
MAX_LENGTH = 16


@functools.cache
def goldens():
  with np.load(GOLDENS / 'led.npz') as file:
    return dict(file)


SEARCHES = json.loads(str(goldens()['searches']))


@functools.cache
def model():
  arrays = goldens()
  config = json.loads(str(arrays['config']))
  config['attention_window'] = arrays['no_globals/windows'].tolist()
  names = interop.family('led', True, 'led.')
  graphdef, state = nnx.split(LED(**interop.read(config), rngs=nnx.Rngs(0)))
  flat = []
  for path, leaf in nnx.to_flat_state(state):
    tensor = names.tensor(path)
    value = arrays[f'weights/{tensor.name}']
    value = value.T if tensor.transposed else value
    flat.append((path, leaf.replace(jnp.asarray(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def search(name, tokens=None, **changes):
  settings = {NAMES.get(k, k): v for k, v in SEARCHES[name].items()}
  if tokens is None:
    tokens = goldens()['search/tokens']
  return generate(model(), tokens, max_length=MAX_LENGTH, **settings | changes)


# Each of these is compiled for itself.
MORE = ('greedy_ngrams', 'beam2')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.full if name in MORE else ())
    for name in SEARCHES
  ],
)
def test_equals_transformers(name):
  texts, scores = search(name)
  wanted = goldens()[f'search/{name}/texts']
  width = wanted.shape[1]
  np.testing.assert_array_equal(texts[:, :width], wanted)
  assert (texts[:, width:] == 1).all()
  if 'beam' in name:
    wanted = goldens()[f'search/{name}/scores']
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)


def test_the_searches_differ():
  found = {
    name: goldens()[f'search/{name}/texts'].tolist() for name in SEARCHES
  }
  texts = [json.dumps(text) for text in found.values()]
  assert len(set(texts)) >= len(texts) - 1
  lengths = {
    sum(t != 1 for t in row) for text in found.values() for row in text
  }
  assert len(lengths) >= 6


def test_a_row_does_not_depend_on_the_others():
  tokens = goldens()['search/tokens']
  others = np.stack([tokens[3], tokens[1], tokens[3], tokens[3]])
  for name in ('beam4_early', 'beam4_never'):
    texts, scores = search(name)
    again, again_scores = search(name, others)
    np.testing.assert_array_equal(texts[1], again[1])
    np.testing.assert_allclose(scores[1], again_scores[1], rtol=1e-5)


def test_decode_is_generate_where_the_model_is_traced():
  graphdef, state = nnx.split(model())
  tokens = goldens()['search/tokens']
  options = {NAMES.get(k, k): v for k, v in SEARCHES['greedy'].items()}

  @jax.jit
  def run(state, tokens):
    model = nnx.merge(graphdef, state)
    return decode(model, tokens, max_length=MAX_LENGTH, **options)

  texts, _ = run(state, tokens)
  wanted = goldens()['search/greedy/texts']
  np.testing.assert_array_equal(texts[:, : wanted.shape[1]], wanted)
  with pytest.raises(ValueError, match='num_beams must be at least 1, got 0'):
    decode(model(), tokens, num_beams=0)
  with pytest.raises(ValueError, match='draws tokens: give a key'):
    decode(model(), tokens, temperature=0.5)


def test_enough_beams_find_the_best_text():
  """Every text of a small vocabulary, and its score by the definition."""
  small = LED(
    vocab_size=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    features=8,
    num_encoder_heads=2,
    num_decoder_heads=2,
    patterns=longjax.SlidingWindow(2, 2),
    max_positions=9,
    max_target_positions=5,
    rngs=nnx.Rngs(3),
  )
  # Logits that tell tokens apart.
  small.embedding.embedding[...] *= 30
  tokens = np.array([[0, 5, 6, 7, 2]])
  max_length, penalty = 4, 0.7
  end = small.eos_token
  candidates = [
    text
    for size in (1, 2, 3)
    for text in itertools.product(range(8), repeat=size)
    if end not in text[:-1] and (text[-1] == end or size == max_length - 1)
  ]
  padded = np.array([text + (1,) * (3 - len(text)) for text in candidates])
  start = np.full((len(padded), 1), small.decoder_start_token)
  given = np.concatenate([start, padded[:, :-1]], axis=1)
  many = np.repeat(tokens, len(given), axis=0)
  log_p = jax.nn.log_softmax(jax.jit(small.__call__)(many, given))
  log_p = np.take_along_axis(np.asarray(log_p), padded[..., None], 2)[..., 0]
  sizes = np.array([len(text) for text in candidates])
  log_p *= np.arange(3) < sizes[:, None]
  scores = log_p.sum(axis=1) / sizes**penalty
  texts, found = generate(
    small,
    tokens,
    max_length=max_length,
    num_beams=4,
    length_penalty=penalty,
    early_stopping='never',
  )
  # Four beams of eight tokens hold almost everything; the best is among it.
  best = scores.argmax()
  np.testing.assert_allclose(found[0], scores[best], rtol=1e-4)
  np.testing.assert_array_equal(texts[0, 1:], padded[best])


def test_sampling():
  draw = functools.partial(search, 'greedy', temperature=1.0)
  found = [draw(seed=seed)[0] for seed in range(8)]
  assert len({text.tobytes() for text in found}) > 6
  np.testing.assert_array_equal(draw(seed=3)[0], found[3])
  # As likely as their logits say.
  firsts = np.stack(found)[:, :, 1]
  assert len(np.unique(firsts)) > 3
  greedy, _ = search('greedy')
  np.testing.assert_array_equal(draw(top_p=1e-6)[0], greedy)


def test_encoder_states_are_not_copied_per_beam(monkeypatch):
  """Nothing in the search is as large as the states times the beams."""
  length, beams = 24, 4
  tokens = np.full((2, length), 5)
  compiled, calls = beam._generate, []

  def record(*arguments):
    calls.append(arguments)
    return np.zeros(1), np.zeros(1)

  monkeypatch.setattr(beam, '_generate', record)
  generate(model(), tokens, num_beams=beams, max_length=MAX_LENGTH)
  ((graphdef, *arguments),) = calls
  jaxpr = jax.make_jaxpr(functools.partial(compiled, graphdef))(*arguments)
  (call,) = jaxpr.eqns
  # The search is the last loop; the encoder comes before.
  *_, loop = (
    equation
    for equation in call.params['jaxpr'].eqns
    if equation.primitive.name == 'while'
  )
  found = [variable.aval for variable in (*loop.invars, *loop.outvars)]
  assert (len(tokens), beams, MAX_LENGTH) in {aval.shape for aval in found}

  def collect(jaxpr):
    for equation in jaxpr.eqns:
      found.extend(variable.aval for variable in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        collect(inner)

  for inner in jaxprs_in_params(loop.params):
    collect(inner)
  sizes = [aval.size for aval in found if length in getattr(aval, 'shape', ())]
  states = len(tokens) * length * model().features
  assert states <= max(sizes) < beams * states


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_beams': 0}, 'num_beams must be at least 1, got 0'),
    ({'num_beams': 16}, 'num_beams must be at most 15'),
    ({'max_length': 1}, r'max_length must be in 2 \.\.\. 17'),
    ({'max_length': 18}, 'one more than the positions of the decoder, got 18'),
    ({'min_length': 9, 'max_length': 8}, r'min_length must be in 0 \.\.\. 8'),
    ({'early_stopping': 'yes'}, "early_stopping must be .* got 'yes'"),
    ({'no_repeat_ngram': -1}, 'no_repeat_ngram must be >= 0, got -1'),
    ({'repetition_penalty': 0}, 'repetition_penalty must be finite and > 0'),
    ({'temperature': -1}, 'temperature must be finite and >= 0, got -1'),
    ({'temperature': 1, 'num_beams': 2}, 'draws tokens, which num_beams=2'),
    ({'forced_bos': 31}, 'forced_bos 31 is outside of the vocabulary'),
    ({'forced_eos': -1}, 'forced_eos -1 is outside of the vocabulary'),
    ({'top_k': 0}, r'top_k must be in 1 \.\.\. 31'),
    ({'top_p': 0}, r'top_p must be in \(0, 1\], got 0'),
    ({'tokens': np.full((1, 25), 5)}, '25 tokens are more than the 24'),
    ({'tokens': np.full((1, 5), 31)}, 'tokens has 31 in row 0, outside of 0'),
    ({'global_mask': np.ones((1, 3))}, 'global_mask must have the shape'),
  ],
)
def test_wrong_options(options, message):
  arguments = {'tokens': np.full((1, 4), 5), 'max_length': 8} | options
  with pytest.raises(ValueError, match=message):
    generate(model(), **arguments)
