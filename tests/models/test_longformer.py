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


@pytest.mark.parametrize('case', CASES)
def test_equals_transformers(case):
  arrays = goldens()
  # Inside jit as many as max_globals are computed.
  model = of_case(case, max_globals=5)
  graphdef, state = nnx.split(model)
  tokens, masks = arguments(case)
  cotangent = arrays[f'{case}/cotangent']

  @jax.jit
  def run(state, tokens, masks):
    def encode(state):
      return nnx.merge(graphdef, state).encode(tokens, **masks)

    hidden, pull = jax.vjp(encode, state)
    return hidden, pull(cotangent)[0]

  hidden, gradient = run(state, tokens, masks)
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
  window = longjax.SlidingWindow
  for changes, masks in (
    ({'patterns': (window(3, 3), window(4, 4))}, given),
    ({}, given | {'global_mask': np.zeros_like(ragged)}),
    ({}, given | {'types': 1 - given['types']}),
  ):
    wrong = of_case('mixed_windows', **changes).encode(tokens, **masks)
    assert np.abs(wrong - hidden).max() > 0.01


def test_remat_and_bfloat16_and_other_implementation():
  case = 'mixed_windows'
  tokens, masks = arguments(case)
  wanted = goldens()[f'{case}/hidden']
  for changes, tolerance in (
    ({'remat': True}, 2e-5),
    ({'implementation': 'reference'}, 2e-5),
    ({'dtype': jnp.bfloat16}, 0.15),
  ):
    hidden = of_case(case, **changes).encode(tokens, **masks)
    np.testing.assert_allclose(
      np.asarray(hidden, np.float32), wanted, atol=tolerance
    )


def test_neighbours_and_more_padding_change_nothing():
  tokens, masks = arguments('mixed_windows')
  model = of_case('mixed_windows')
  alone = model.encode(tokens[1:2], **{k: m[1:2] for k, m in masks.items()})
  longer = np.pad(tokens, ((0, 0), (0, 5)), constant_values=PAD)
  padded = {k: np.pad(m, ((0, 0), (0, 5))) for k, m in masks.items()}
  together = model.encode(longer, **padded)
  length = tokens.shape[1]
  np.testing.assert_allclose(alone[0], together[1, :length], atol=1e-5)


# --- Heads -------------------------------------------------------------------


def with_head(head, **changes):
  arrays = goldens('longformer_heads')
  config = json.loads(str(arrays['config']))
  weights = {
    name.removeprefix(f'weights/{group}/'): value
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


@pytest.mark.parametrize('globals_', ['default', 'given'])
@pytest.mark.parametrize('head', HEADS)
def test_heads_equal_transformers(head, globals_):
  model = with_head(head)
  tokens, global_mask = inputs(head)
  given = global_mask if globals_ == 'given' else None
  out = model(tokens, global_mask=given)
  wanted = goldens('longformer_heads')[f'{head}/{globals_}']
  np.testing.assert_allclose(np.asarray(out), wanted, atol=2e-5)
  inside = jax.jit(lambda t, g: model(t, global_mask=g))(tokens, given)
  np.testing.assert_allclose(np.asarray(inside), wanted, atol=2e-5)


def test_dropout_needs_a_key():
  for head in HEADS:
    model = with_head(
      head, dropout_rate=0.5, attention_dropout_rate=0.5, max_globals=16
    )
    tokens, _ = inputs(head)
    calm = np.asarray(model(tokens))
    a, b, c = (
      np.asarray(model(tokens, dropout_key=jax.random.key(seed)))
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
  changed = np.abs(model.encode(tokens) - model.encode(other)).max(axis=2)[0]
  one = {12 + step for step in (-5, -2, 0, 2, 5)}
  reached = {i + step for i in one for step in (-1, 0, 1)}
  assert set(np.flatnonzero(changed > 1e-7)) == reached


def test_a_task_without_its_global_tokens_warns():
  for head in ('sequence_classification', 'question_answering'):
    model = with_head(head)
    tokens, _ = inputs(head)
    with pytest.warns(UserWarning, match=f'{head} needs global tokens'):
      model(tokens, global_mask=np.zeros_like(tokens))
  # A model that sees everything anyway needs none.
  full = longjax.Full(causal=False)
  make(head='question_answering', patterns=full, max_globals=0)(tokens)


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
  run = jax.jit(lambda model, *args: model(args[0], global_mask=args[1]))
  model = make(max_globals=3, num_layers=1)
  bad = np.isnan(run(model, TOKENS, TOKENS > 2)).all(axis=(1, 2))
  np.testing.assert_array_equal(bad, [False, True])
  model = make(head='sequence_classification', num_layers=1)
  bad = np.isnan(run(model, TOKENS[:, ::-1], None)).all(axis=1)
  np.testing.assert_array_equal(bad, [True, False])
  # ... but rows of nothing but padding fill a batch up.
  assert np.isfinite(run(model, np.full((1, 4), PAD), None)).all()
