"""LED and BART equal transformers', forward, gradients, step by step."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.interop import led as interop
from longjax.models.led import LED

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
CASES = ('first_token', 'ragged_globals', 'no_globals')


@functools.cache
def goldens(name='led'):
  with np.load(GOLDENS / f'{name}.npz') as file:
    return dict(file)


def names(kind):
  prefix = {'led': 'led.', 'bart': 'model.'}[kind]
  return interop.family(kind, kind == 'led', prefix)


def module(kind, case=None, **changes):
  """The module of transformers' tensors by name."""
  arrays = goldens(kind)
  config = json.loads(str(arrays['config']))
  if case:
    config['attention_window'] = arrays[f'{case}/windows'].tolist()
  model = LED(**interop.read(config) | changes, rngs=nnx.Rngs(0))

  def read(path, leaf):
    tensor = names(kind).tensor(path)
    value = arrays[f'weights/{tensor.name}']
    return leaf.replace(jnp.asarray(value.T if tensor.transposed else value))

  graphdef, state = nnx.split(model)
  flat = [(p, read(p, leaf)) for p, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def arguments(case):
  arrays = goldens()
  return [arrays[f'{case}/{name}'] for name in ('tokens', 'target')], {
    name: arrays[f'{case}/{name}'] for name in ('mask', 'global_mask')
  }


@jax.jit
def run(model, *arguments, **keywords):
  return model(*arguments, **keywords)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(c, marks=() if c == 'ragged_globals' else pytest.mark.full)
    for c in CASES
  ],
)
def test_equals_transformers(case):
  arrays = goldens()
  graphdef, state = nnx.split(module('led', case, max_globals=4, remat=True))
  tokens, masks = arguments(case)
  if case == 'first_token':
    # What the model does by itself.
    masks = {'mask': masks['mask']}

  @jax.jit
  def differentiate(state, tokens, masks):
    def call(state):
      return nnx.merge(graphdef, state)(*tokens, **masks)

    logits, pull = jax.vjp(call, state)
    return logits, pull(arrays[f'{case}/cotangent'])[0]

  logits, gradient = differentiate(state, tokens, masks)
  np.testing.assert_allclose(logits, arrays[f'{case}/logits'], atol=2e-5)
  compared = 0
  for path, leaf in nnx.to_flat_state(gradient):
    tensor = names('led').tensor(path)
    got = np.asarray(leaf[...])
    if path == ('output_bias',):
      assert not got.any()  # not trained
    wanted = arrays.get(f'{case}/gradient/{tensor.name}')
    if wanted is not None:
      np.testing.assert_allclose(
        got.T if tensor.transposed else got,
        wanted,
        rtol=1e-4,
        atol=1e-4,
        err_msg=tensor.name,
      )
      compared += 1
  assert compared == sum(f'{case}/gradient/' in name for name in arrays) > 0


def test_bart_equals_transformers():
  arrays = goldens('bart')
  logits = run(module('bart'), arrays['tokens'], arrays['target'])
  np.testing.assert_allclose(logits, arrays['logits'], atol=2e-5)


@jax.jit
def decode(model, tokens, state):
  return model.decode(tokens, state)


@functools.partial(jax.jit, static_argnums=(2, 3))
def begin(model, tokens, max_length, rows_each):
  states, segment_ids = model.encode(tokens)
  return model.init_state(states, segment_ids, max_length, rows_each)


def test_step_by_step_is_all_at_once():
  """... also with several rows for each source, which share its states."""
  model = make(max_target_positions=4)
  model.embedding.embedding[...] *= 20  # tokens that make a difference
  tokens = TOKENS
  targets = np.random.default_rng(0).integers(0, 13, (4, 4))
  start = state = begin(model, tokens, 4, 2)
  for source in state.sources:
    assert source.keys.shape[0] == len(tokens)
  logits = []
  for step in range(4):
    more, state = decode(model, targets[:, step, None], state)
    logits.append(more)
    if step == 1:
      # Rows go on where other rows of the same source were.
      rows = np.array([1, 1, 3, 2])
      moved, _ = decode(model, targets[:, 2, None], state.take(rows))
      again = start
      for other in (0, 1):
        _, again = decode(model, targets[rows, other, None], again)
      same, _ = decode(model, targets[:, 2, None], again)
      np.testing.assert_allclose(moved, same, atol=1e-6)
  wanted = run(model, np.repeat(tokens, 2, axis=0), targets)
  logits = jnp.concatenate(logits, 1)
  np.testing.assert_allclose(logits, wanted, atol=2e-5)
  assert np.abs(wanted[0] - wanted[1]).max() > 0.1
  # There is no room for more.
  more, _ = decode(model, targets[:, :1], state)
  assert np.isnan(more).all()


def test_first_token_is_global_and_dropout_needs_a_key():
  (tokens, target), _ = arguments('first_token')
  names = ('dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate')
  model = module('led', 'first_token', **dict.fromkeys(names, 0.3))
  wanted = goldens()['first_token/logits']
  np.testing.assert_allclose(run(model, tokens, target), wanted, atol=2e-5)
  a, b, c = (
    run(model, tokens, target, dropout_key=jax.random.key(seed))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0.1 and np.abs(a - wanted).max() > 0.1


def test_no_global_token_warns():
  with pytest.warns(UserWarning, match='first token global'):
    make().prepare(TOKENS, global_mask=0 * TOKENS)


# --- What is wrong is named --------------------------------------------------


def make(**changes):
  keywords = dict(
    vocab_size=13,
    num_encoder_layers=1,
    num_decoder_layers=1,
    features=8,
    num_encoder_heads=2,
    num_decoder_heads=2,
    patterns=longjax.SlidingWindow(2, 2),
    max_positions=9,
    max_target_positions=5,
  )
  return LED(**keywords | changes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'patterns': longjax.SlidingWindow(2)}, 'layer 0 has .* is causal'),
    ({'max_target_positions': 0}, 'max_target_positions must be at least 1'),
    ({'position_offset': -1}, 'position_offset must be at least 0, got -1'),
    ({'num_decoder_heads': 3}, 'features=8 is not divisible by num_heads=3'),
    (
      {'attention_dropout_rate': 1},
      r'attention dropout rate must be in \[0, 1',
    ),
  ],
)
def test_wrong_models(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


TOKENS = np.array([[0, 5, 6, 7, 2, 1], [0, 5, 6, 7, 8, 2]])
TARGET = np.array([[2, 3, 4], [2, 5, 6]])


@pytest.mark.parametrize(
  ('changes', 'call', 'message'),
  [
    ({}, {'tokens': TOKENS[0]}, r'^tokens must be \[batch, length >= 1\]'),
    ({}, {'decoder_tokens': TARGET[:, :0]}, 'decoder_tokens must be'),
    ({}, {'decoder_tokens': TARGET[:1]}, 'must have one batch, got 2 and 1'),
    (
      {'max_positions': 5},
      {},
      r'6 tokens are more than the 5 positions of the encoder.*--length=6',
    ),
    (
      {'max_target_positions': 2},
      {},
      '3 decoder tokens are more than the 2 positions of the decoder',
    ),
    ({}, {'tokens': TOKENS + 8}, 'tokens has 13 in row 0, outside of 0'),
    ({}, {'decoder_tokens': -TARGET}, 'decoder_tokens has -2 in row 0'),
    ({}, {'mask': TOKENS[:, 1:]}, 'mask must have the shape of tokens'),
    ({}, {'global_mask': TARGET}, 'global_mask must have the shape of tokens'),
    (
      {'max_globals': 2},
      {'global_mask': TOKENS > 4},
      'row 1 has 4 global tokens, but max_globals=2',
    ),
    (
      {'max_globals': 0},
      {'global_mask': TOKENS > 4},
      r'without global projections \(max_globals=0\)',
    ),
    (
      {},
      {'tokens': TOKENS[:, ::-1]},
      'row 0 begins with padding, but the first token is global',
    ),
  ],
)
def test_wrong_calls(changes, call, message):
  arguments = {'tokens': TOKENS, 'decoder_tokens': TARGET} | call
  with pytest.raises(ValueError, match=message):
    make(**changes)(**arguments)
