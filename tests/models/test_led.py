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


@pytest.mark.parametrize('case', CASES)
def test_equals_transformers(case):
  arrays = goldens()
  graphdef, state = nnx.split(module('led', case, max_globals=4))
  tokens, masks = arguments(case)
  if case == 'first_token':
    # What the model does by itself.
    masks = {'mask': masks['mask']}

  @jax.jit
  def run(state, tokens, masks):
    def call(state):
      return nnx.merge(graphdef, state)(*tokens, **masks)

    logits, pull = jax.vjp(call, state)
    return logits, pull(arrays[f'{case}/cotangent'])[0]

  logits, gradient = run(state, tokens, masks)
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
  model = module('bart')
  logits = jax.jit(lambda *tokens: model(*tokens))(
    arrays['tokens'], arrays['target']
  )
  np.testing.assert_allclose(logits, arrays['logits'], atol=2e-5)


def test_step_by_step_is_all_at_once():
  """... also with several rows for each source, which share its states."""
  model = module('led', 'first_token')
  (tokens, target), _ = arguments('first_token')
  other = np.roll(target, 2, axis=1)
  targets = np.stack([target, other], axis=1).reshape(4, -1)
  wanted = model(np.repeat(tokens, 2, axis=0), targets)
  states, segment_ids = model.encode(tokens)
  state = model.init_state(states, segment_ids, target.shape[1], rows_each=2)
  for source in state.sources:
    assert source.keys.shape[0] == len(tokens)
  decode = jax.jit(lambda tokens, state: model.decode(tokens, state))
  first, state = decode(targets[:, :1], state)
  logits = [first]
  for step in range(1, targets.shape[1]):
    more, state = decode(targets[:, step, None], state)
    logits.append(more)
  np.testing.assert_allclose(jnp.concatenate(logits, 1), wanted, atol=1e-5)
  # There is no room for more.
  more, _ = decode(targets[:, :1], state)
  assert np.isnan(more).all()


def test_rows_go_on_where_others_were():
  model = module('led', 'first_token')
  (tokens, target), _ = arguments('first_token')
  states, segment_ids = model.encode(tokens)
  state = model.init_state(states, segment_ids, 3, rows_each=2)
  tokens = np.array([[5, 6], [7, 8], [9, 10], [11, 12]])
  _, state = model.decode(tokens, state)
  rows = np.array([1, 1, 3, 2])
  moved, _ = model.decode(np.full((4, 1), 4), state.take(rows))
  _, again = model.decode(
    tokens[rows], model.init_state(states, segment_ids, 3, rows_each=2)
  )
  wanted, _ = model.decode(np.full((4, 1), 4), again)
  np.testing.assert_allclose(moved, wanted, atol=1e-6)


def test_dropout_and_remat():
  (tokens, target), _ = arguments('first_token')
  calm = module('led', 'first_token')
  wanted = calm(tokens, target)
  remat = module('led', 'first_token', remat=True)
  np.testing.assert_allclose(remat(tokens, target), wanted, atol=1e-6)
  for rate in ('dropout', 'attention_dropout', 'activation_dropout'):
    rates = {
      f'{name}_rate': 0.5 * (name == rate)
      for name in ('dropout', 'attention_dropout', 'activation_dropout')
    }
    model = module('led', 'first_token', **rates)
    a, b, c = (
      model(tokens, target, dropout_key=jax.random.key(seed))
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3 and np.abs(a - wanted).max() > 1e-3


def test_no_global_token_warns():
  model = module('led', 'no_globals')
  (tokens, target), masks = arguments('no_globals')
  with pytest.warns(UserWarning, match='first token global'):
    model(tokens, target, **masks)


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
