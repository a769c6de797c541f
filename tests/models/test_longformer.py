"""Longformer equals transformers', layer stack and heads, and refuses."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.interop import longformer as interop
from longjax.models.heads import HEADS
from longjax.models.longformer import Longformer

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
PAD, SEPARATOR = 1, 2


@functools.cache
def goldens(name='longformer_encoder'):
  with np.load(GOLDENS / f'{name}.npz') as file:
    return dict(file)


CASES = sorted({name.split('/')[0] for name in goldens() if '/tokens' in name})


def module(config, weights, head=None, **changes):
  """The module of transformers' tensors by name."""
  keywords = interop.read(config) | changes
  model = Longformer(**keywords, head=head, rngs=nnx.Rngs(0))
  names = interop.family('longformer', head, '')

  def read(path, leaf):
    tensor = names.tensor(path)
    value = weights[tensor.name]
    return leaf.replace(jnp.asarray(value.T if tensor.transposed else value))

  graphdef, state = nnx.split(model)
  flat = [(p, read(p, leaf)) for p, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def of_case(case, **changes):
  arrays = goldens()
  config = json.loads(str(arrays['config']))
  config['attention_window'] = arrays[f'{case}/windows'].tolist()
  weights = {
    name.removeprefix('weights/'): value
    for name, value in arrays.items()
    if name.startswith('weights/')
  }
  return module(config, weights, **changes)


def arguments(case):
  arrays = {
    name: goldens()[f'{case}/{name}']
    for name in ('tokens', 'mask', 'global_mask', 'types')
  }
  return arrays.pop('tokens'), arrays


@jax.jit
def run(model, *arguments, **keywords):
  return model(*arguments, **keywords)


# The hardest two; all are compiled for themselves.
ALWAYS = ('middle_padding', 'mixed_windows')


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(c, marks=() if c in ALWAYS else pytest.mark.full)
    for c in CASES
  ],
)
def test_equals_transformers(case):
  arrays = goldens()
  # Inside jit as many as max_globals are computed: in one of these cases so
  # many that every token has a key and a value for them, in the others fewer.
  most = arrays[f'{case}/global_mask'].sum(axis=1).max()
  model = of_case(case, max_globals=int(max(1, most)), remat=True)
  graphdef, state = nnx.split(model)
  tokens, masks = arguments(case)
  cotangent = arrays[f'{case}/cotangent']

  @jax.jit
  def differentiate(state, tokens, masks):
    def encode(state):
      return nnx.merge(graphdef, state).encode(tokens, **masks)

    hidden, pull = jax.vjp(encode, state)
    return hidden, pull(cotangent)[0]

  hidden, gradient = differentiate(state, tokens, masks)
  np.testing.assert_allclose(hidden, arrays[f'{case}/hidden'], atol=2e-5)
  names = interop.family('longformer', None, '')
  compared = 0
  for path, leaf in nnx.to_flat_state(gradient):
    tensor = names.tensor(path)
    wanted = arrays.get(f'{case}/gradient/{tensor.name}')
    if wanted is None:
      continue
    got = np.asarray(leaf[...])
    np.testing.assert_allclose(
      got.T if tensor.transposed else got,
      wanted,
      rtol=1e-4,
      atol=1e-4,
      err_msg=tensor.name,
    )
    compared += 1
  assert compared == sum(f'{case}/gradient/' in name for name in arrays) > 0


def test_the_cases_are_what_they_say():
  arrays = goldens()
  masks = {case: arguments(case)[1] for case in CASES}
  ragged = masks['mixed_windows']['global_mask']
  assert set(ragged.sum(axis=1)) == {0, 1, 4} and ragged[:, -1].any()
  assert len(set(arrays['mixed_windows/windows'])) == 2
  assert ragged.shape[1] % arrays['mixed_windows/windows'].max()
  assert arrays['window_over_length/windows'].min() > 2 * 7
  # Padding that would be global, and masked tokens that are none.
  both = [m['global_mask'] * (m['mask'] == 0) for m in masks.values()]
  assert any(x.any() for x in both)
  tokens = arrays['middle_padding/tokens']
  assert ((tokens != PAD) & (masks['middle_padding']['mask'] == 0)).any()
  # A wrong window or global token is visible.
  tokens, given = arguments('mixed_windows')
  hidden = arrays['mixed_windows/hidden']
  model = of_case('mixed_windows')
  for name in ('global_mask', 'types'):
    wrong = run(model, tokens, **given | {name: 1 - given[name]})
    assert np.abs(wrong - hidden).max() > 0.01
  window = longjax.SlidingWindow
  model = of_case('mixed_windows', patterns=(window(3, 3), window(4, 4)))
  assert np.abs(run(model, tokens, **given) - hidden).max() > 0.01


def test_bfloat16():
  tokens, masks = arguments('mixed_windows')
  hidden = run(of_case('mixed_windows', dtype=jnp.bfloat16), tokens, **masks)
  wanted = goldens()['mixed_windows/hidden']
  assert hidden.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(hidden), wanted, atol=0.15)


def test_neighbours_and_more_padding_change_nothing():
  tokens, masks = arguments('mixed_windows')
  rows = np.array([2, 1, 2])
  more = ((0, 0), (0, 5))
  longer = np.pad(tokens[rows], more, constant_values=PAD)
  padded = {k: np.pad(m[rows], more) for k, m in masks.items()}
  hidden = run(of_case('mixed_windows'), longer, **padded)
  wanted = goldens()['mixed_windows/hidden'][rows]
  np.testing.assert_allclose(hidden[:, :-5], wanted, atol=2e-5)


# --- Heads -------------------------------------------------------------------


def with_head(head, **changes):
  arrays = goldens('longformer_heads')
  config = json.loads(str(arrays['config']))
  weights = {
    # The pooler is the encoder's in some classes.
    name.removeprefix(f'weights/{group}/').removeprefix('longformer.'): value
    for group in ('base', head)
    for name, value in arrays.items()
    if name.startswith(f'weights/{group}/')
  }
  return module(config, weights, head, num_labels=3, **changes)


def inputs(head):
  arrays = goldens('longformer_heads')
  tokens, global_mask = arrays['tokens'], arrays['global_mask']
  if head == 'multiple_choice':
    return tokens[:, None], global_mask[:, None]
  return tokens, global_mask


@pytest.mark.parametrize(
  'globals_', ['default', pytest.param('given', marks=pytest.mark.full)]
)
@pytest.mark.parametrize('head', HEADS)
def test_heads_equal_transformers(head, globals_):
  model = with_head(head)
  tokens, global_mask = inputs(head)
  given = global_mask if globals_ == 'given' else None
  out = model(tokens, global_mask=given)
  wanted = goldens('longformer_heads')[f'{head}/{globals_}']
  np.testing.assert_allclose(np.asarray(out), wanted, atol=2e-5)
  if head == 'question_answering' and given is None:
    # Where the question's length cannot be seen.
    inside = run(model, tokens, global_mask=given)
    np.testing.assert_allclose(np.asarray(inside), wanted, atol=2e-5)


@pytest.mark.parametrize(
  'head',
  [
    'sequence_classification',
    pytest.param('multiple_choice', marks=pytest.mark.full),
  ],
)
def test_dropout_needs_a_key(head):
  rates = {'dropout_rate': 0.5, 'attention_dropout_rate': 0.5}
  model = with_head(head, max_globals=16, **rates)
  tokens, _ = inputs(head)
  calm = goldens('longformer_heads')[f'{head}/default']
  np.testing.assert_allclose(run(model, tokens), calm, atol=2e-5)
  a, b, c = (
    np.asarray(run(model, tokens, dropout_key=jax.random.key(seed)))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0.01 and np.abs(a - calm).max() > 0.01


def make(**changes):
  keywords = dict(
    vocab_size=31,
    num_layers=2,
    features=8,
    num_heads=2,
    patterns=longjax.SlidingWindow(3, 3),
    max_positions=24,
  )
  return Longformer(**keywords | changes, rngs=nnx.Rngs(0))


def test_dilation_by_layer_and_head():
  """Windows of one key, dilated: what is out of their reach is not seen."""
  window = longjax.SlidingWindow
  model = make(patterns=(window(1, 1, (2, 5)), window(1, 1)))
  tokens = np.full((1, 24), 5)
  other = tokens.copy()
  other[0, 12] = 6
  changed = np.abs(run(model, tokens) - run(model, other)).max(axis=2)[0]
  one = {12 + step for step in (-5, -2, 0, 2, 5)}
  reached = {i + step for i in one for step in (-1, 0, 1)}
  assert set(np.flatnonzero(changed > 1e-7)) == reached


def test_a_task_without_its_global_tokens_warns():
  for head in ('sequence_classification', 'question_answering'):
    model = with_head(head)
    tokens, _ = inputs(head)
    with pytest.warns(UserWarning, match=f'{head} needs global tokens'):
      jax.eval_shape(functools.partial(model, tokens, global_mask=0 * tokens))
  # A model that sees everything anyway needs none.
  full = longjax.Full(causal=False)
  model = make(head='question_answering', patterns=full, max_globals=0)
  jax.eval_shape(lambda: model(tokens))


# --- What is wrong is named --------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'patterns': longjax.SlidingWindow(3)}, 'layer 0 has .* is causal'),
    ({'patterns': [longjax.SlidingWindow(1, 1)]}, '1 entries for num_layers=2'),
    ({'patterns': (3, 3)}, 'layer 0: 3 is no pattern'),
    (
      {'patterns': longjax.SlidingWindow(1, 1, (1, 2, 3))},
      '3 dilations .* for 2 heads',
    ),
    ({'head': 'mlm'}, "head 'mlm' is not one of .*'masked_lm'"),
    ({'max_globals': -1}, 'max_globals must be at least 0, got -1'),
    ({'max_positions': 0}, 'max_positions must be at least 1'),
    ({'dropout_rate': 1.0}, r'dropout_rate must be in \[0, 1\), got 1'),
  ],
)
def test_wrong_models(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


TOKENS = np.array([[0, 5, 2, 2, 7, 9, 2, 1], [0, 5, 6, 2, 2, 7, 8, 2]])


@pytest.mark.parametrize(
  ('changes', 'call', 'message'),
  [
    ({}, {'tokens': TOKENS[0]}, r'tokens must be \[batch, length'),
    (
      {'head': 'multiple_choice'},
      {'tokens': TOKENS},
      r'tokens must be \[batch, choices, length',
    ),
    (
      {},
      {'global_mask': np.ones((2, 7))},
      r'global_mask must have the shape of tokens, \(2, 8\), got \(2, 7\)',
    ),
    ({}, {'mask': np.ones((1, 8))}, r'mask must have the shape .*\(1, 8\)'),
    ({}, {'types': np.ones(8)}, 'types must have the shape'),
    (
      {},
      {'types': TOKENS // 9},
      r'types has 1 in row 0, outside of 0 \.\.\. 0',
    ),
    ({}, {'tokens': TOKENS - 1}, 'tokens has -1 in row 0, outside of 0'),
    ({'vocab_size': 9}, {}, r'tokens has 9 in row 0, outside of 0 \.\.\. 8'),
    (
      {'max_globals': 3},
      {'global_mask': TOKENS > 2},
      'row 1 has 4 global tokens, but max_globals=3',
    ),
    (
      {'max_globals': 0},
      {'global_mask': TOKENS > 2},
      r'without global projections \(max_globals=0\)',
    ),
    (
      {'max_positions': 7},
      {},
      r'8 tokens are more than the 7 positions.*interop\.convert.*--length=8',
    ),
    (
      {'head': 'sequence_classification'},
      {'tokens': TOKENS[:, ::-1]},
      'row 0 begins with padding, but sequence_classification reads',
    ),
    (
      {'head': 'question_answering'},
      {'tokens': np.where(TOKENS == 2, 3, TOKENS)},
      'row 0 has no token 2 that separates the question',
    ),
    (
      {'head': 'question_answering', 'max_globals': 2},
      {},
      'row 1 has 3 global tokens, but max_globals=2',
    ),
  ],
)
def test_wrong_calls(changes, call, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)(**{'tokens': TOKENS} | call)


def test_what_jit_cannot_see_becomes_nan():
  model = make(vocab_size=9, max_globals=3, num_layers=1)
  tokens = np.concatenate([TOKENS, np.minimum(TOKENS[:1], 8)])
  hidden = run(model, tokens, global_mask=tokens == 2)
  bad = np.isnan(hidden).all(axis=(1, 2))
  np.testing.assert_array_equal(bad, [True, False, False])
  hidden = run(model, tokens[[2, 1, 2]], global_mask=TOKENS[[0, 1, 0]] > 2)
  bad = np.isnan(hidden).all(axis=(1, 2))
  np.testing.assert_array_equal(bad, [False, True, False])
  model = make(head='sequence_classification', num_layers=1)
  # Rows of nothing but padding fill a batch up.
  rows = np.stack([TOKENS[0, ::-1], TOKENS[1], np.full(8, PAD)])
  bad = np.isnan(run(model, rows)).all(axis=1)
  np.testing.assert_array_equal(bad, [True, False, False])
