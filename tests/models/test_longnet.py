"""LongNet's models: sizes, MAGNETO's blocks, encoders, baselines."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax import BlockwiseCausal, DecoderLM, Dilated, FixedSparse, Full
from longjax.models import Encoder, SlideEncoder
from longjax.models.longnet import (
  SIZES,
  gigapath_schedule,
  longnet,
  magneto,
  schedule,
)
from tests.models.filled import filled
from tests.ops.helpers import QUICK

# The dense definition, which compiles quickly.
TINY = dict(
  num_layers=2,
  features=16,
  num_heads=4,
  mlp_features=24,
  implementation='reference',
)
jit = functools.partial(jax.jit, compiler_options=QUICK)
PATTERN = Dilated((4, 8), (1, 2))
BOTH_WAYS = Dilated((4, 8), (1, 2), causal=False)


def decoder(patterns=PATTERN, **overrides):
  keywords = longnet(**{'vocab_size': 11, **TINY, **overrides})
  return filled(DecoderLM, **keywords, patterns=patterns)


def encoder(patterns=BOTH_WAYS, **overrides):
  keywords = TINY | magneto() | overrides
  return filled(Encoder, **keywords, patterns=patterns)


def make_tokens(batch=2, length=12, seed=0):
  key = jax.random.key(seed)
  return jax.random.randint(key, (batch, length), 0, 11)


def parameters(model):
  return {
    path: np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


# --- Sizes -------------------------------------------------------------------


def count(size, **overrides):
  def state():
    keywords = longnet(size, **overrides)
    model = DecoderLM(**keywords, patterns=PATTERN, rngs=nnx.Rngs(0))
    return nnx.state(model, nnx.Param)

  leaves = jax.tree.leaves(jax.eval_shape(state))
  return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(
  ('size', 'layers', 'width', 'without_table', 'total'),
  [
    ('125m', 12, 768, 85_148_160, 162_160_896),
    ('350m', 24, 1024, 302_557_184, 405_240_832),
    ('760m', 24, 1536, 680_328_192, 834_353_664),
    ('2.7b', 32, 2560, 2_518_471_680, 2_775_180_800),
  ],
)
def test_parameters_of_table_4(size, layers, width, without_table, total):
  """Counted out by the shapes of MAGNETO's blocks."""
  d, hidden = width, 4 * width
  attention = 4 * (d * d + d)  # W_q, W_k, W_v and W_o, with biases
  mlp = d * hidden + hidden + hidden * d + d
  # Scale and bias, before and inside of attention and before and inside of MLP.
  norms = 2 * (d + d + d + hidden)
  blocks = layers * (attention + mlp + norms) + 2 * d  # and the last norm
  assert blocks == without_table
  assert count(size) == blocks + 100_277 * d == total
  # A read-out of its own.
  if size == '125m':
    assert count(size, tie_embedding=False) == total + 100_277 * d
  assert SIZES[size][:2] == (layers, width)


def test_the_papers_schedules():
  assert schedule(32768) == Dilated(
    (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
  )
  assert schedule(8192).ratios == (1, 2, 4)
  assert schedule(2048) == Dilated((2048,), (1,))
  slides = gigapath_schedule()
  assert slides.segment_lengths == (1024, 5792, 32768, 185363, 1048576)
  assert slides.ratios == (1, 2, 4, 8, 16) and not slides.causal
  with pytest.raises(ValueError, match='length 512 is below the shortest'):
    schedule(512)
  with pytest.raises(ValueError, match='max_tokens must be .* got 100'):
    gigapath_schedule(100)
  with pytest.raises(ValueError, match="'3b' is not one of .*'2.7b'"):
    longnet('3b')


# --- MAGNETO's blocks --------------------------------------------------------


def layer_norm(x, scale, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_a_block_written_out():
  """Norms at the inputs and, inside, before the output projections."""
  model = encoder(num_layers=1, position=None, vocab_size=None)
  p = {path[2:]: y for path, y in parameters(model).items() if len(path) > 2}
  p |= {path: y for path, y in parameters(model).items() if len(path) == 2}

  def norm(x, *path):
    return layer_norm(x, p[*path, 'scale'], p[*path, 'bias'])

  def linear(x, *path):
    return x @ p[*path, 'kernel'] + p[*path, 'bias']

  x = np.random.default_rng(1).normal(size=(9, 16))
  h = norm(x, 'attention_norm')
  q, k, v = (
    linear(h, 'attention', name).reshape(9, 4, 4)
    for name in ('query', 'key', 'value')
  )
  i = np.arange(9)
  c = model.patterns[0].multiplicity(
    i[:, None], i, np.arange(4)[:, None, None], 4
  )
  w = c * np.exp(np.einsum('thd,shd->hts', q, k) / 2)
  out = np.einsum('hts,shd->thd', w / w.sum(-1, keepdims=True), v)
  out = norm(out.reshape(9, 16), 'attention', 'inner_norm')
  y = x + linear(out, 'attention', 'output')
  h = linear(norm(y, 'mlp_norm'), 'mlp', 'up')
  h = h * np.vectorize(lambda t: 0.5 * (1 + math.erf(t / math.sqrt(2))))(h)
  y = y + linear(norm(h, 'mlp', 'inner_norm'), 'mlp', 'down')
  run = jit(lambda x: model(x, return_states=True))
  out, states = run(jnp.asarray(x[None], jnp.float32))
  np.testing.assert_allclose(states[1][0], y, atol=2e-5)
  np.testing.assert_allclose(out[0], norm(y, 'final_norm'), atol=2e-5)


def test_initial_weights_are_scaled_for_depth():
  """Xavier's, and sqrt(ln(2 M)) times it: values, outputs, the MLP."""
  sizes = dict(vocab_size=11, num_layers=4, features=96, mlp_features=200)
  keywords = longnet(num_heads=4, **sizes)
  model = DecoderLM(**keywords, patterns=PATTERN, rngs=nnx.Rngs(0))
  gain = math.sqrt(math.log(8))
  seen = set()
  for path, value in parameters(model).items():
    if path[-1] == 'kernel':
      scaled = path[-2] in ('value', 'output', 'up', 'down')
      expected = math.sqrt(2 / sum(value.shape)) * (gain if scaled else 1)
      assert abs(value.std() / expected - 1) < 0.05, path
      seen.add(path[-2])
    elif path == ('embedding', 'embedding'):
      assert abs(value.std() * math.sqrt(96) - 1) < 0.1
    elif path[-1] == 'bias':
      assert not value.any(), path
  assert seen == {'query', 'key', 'value', 'output', 'up', 'down'}


def test_bfloat16_activations_keep_norms_and_gelu_in_float32():
  model = decoder(dtype='bfloat16')
  jaxpr = jax.make_jaxpr(lambda t: model(t))(make_tokens())
  text = str(jaxpr)
  erf = [line for line in text.splitlines() if ' erf' in line]
  assert erf and all('f32' in line for line in erf)
  # The products around are not.
  assert 'bf16[2,12,24] = dot_general' in text


def test_sub_norm_can_be_learned():
  """Gradients reach every parameter, the inner norms' too."""
  model = decoder(FixedSparse(4, 2), num_layers=1)
  graphdef, state = nnx.split(model, nnx.Param)
  tokens = make_tokens()

  @jit
  @jax.grad
  def gradient(state):
    logits = nnx.merge(graphdef, state)(tokens)
    return -jax.nn.log_softmax(logits)[..., 3].mean()

  for path, g in nnx.to_flat_state(gradient(state)):
    # The key's bias moves all logits of a query alike, but for xPos.
    assert g[...].any(), path


# --- Decoding, evaluation, baselines -----------------------------------------


@pytest.mark.parametrize(
  'trained',
  [
    pytest.param(Full(), marks=pytest.mark.full),
    FixedSparse(4, 2),
    PATTERN,
  ],
)
def test_blocks_beyond_the_trained_length(trained):
  """The same parameters, and in the first l tokens the same function."""
  wanted = parameters(decoder(trained, num_layers=1))
  model = decoder(BlockwiseCausal(4, trained), num_layers=1)
  got = parameters(model)
  assert got.keys() == wanted.keys()
  for path, value in got.items():
    np.testing.assert_array_equal(value, wanted[path])
  tokens = make_tokens(length=24)
  beyond = jit(model.__call__)(tokens)
  trained = jit(decoder(trained, num_layers=1).__call__)(tokens[:, :8])
  np.testing.assert_allclose(beyond[:, :8], trained, atol=2e-5)


@pytest.mark.parametrize('pattern', [FixedSparse(4, 2), BlockwiseCausal(3)])
def test_baselines_stream(pattern):
  """The cache equals recomputation, row by row."""
  model = decoder(pattern, num_layers=1)
  tokens = make_tokens(length=14)
  whole = jit(model.__call__)(tokens)
  cache = model.init_cache(2, max_length=14)
  step = jit(lambda t, c: model(t, cache=c))
  logits, cache = step(tokens[:, :5], cache)
  np.testing.assert_allclose(logits, whole[:, :5], atol=2e-5)
  for t in range(5, 14):
    logits, cache = step(tokens[:, t : t + 1], cache)
    np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=2e-5)


def test_xpos_refuses_to_look_far_ahead_and_offers_rope():
  far = Dilated((65536,), (1,), causal=False)
  x = jnp.zeros((1, 40_000, 16))
  options = dict(num_layers=1, implementation='xla')
  model = encoder(far, position='xpos', **options)
  with pytest.raises(ValueError, match='would overflow .*: use RoPE'):
    jax.eval_shape(model, x)
  jax.eval_shape(model, x[:, :16_000])
  rope = encoder(far, position='rope', **options)
  assert jax.eval_shape(rope, x).shape == x.shape


# --- The encoder -------------------------------------------------------------


def test_encoder_sees_both_sides_and_never_padding():
  model = encoder(vocab_size=11, position='xpos')
  tokens = make_tokens(1, 9)
  run = jit(lambda t, ids: model(t, segment_ids=ids))
  alone = run(tokens, jnp.zeros((1, 9), int))
  padded = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=99)
  ids = jnp.asarray([[0] * 9 + [-1] * 3])
  out = run(padded, ids)
  np.testing.assert_allclose(out[:, :9], alone, atol=1e-5)
  other = run(padded.at[:, 9:].add(7), ids)
  np.testing.assert_array_equal(out[:, :9], other[:, :9])
  # Token 7 lies in the first token's segment, 8 does not.
  later = run(tokens.at[0, 7].add(1), jnp.zeros((1, 9), int))
  assert (later[0, 0] != alone[0, 0]).any()
  np.testing.assert_array_equal(later[0, 8], alone[0, 8])


def test_encoder_options():
  options = dict(vocab_size=11, num_layers=1)
  tokens, key = make_tokens(), jax.random.key(0)
  model = encoder(**options, dropout_rate=0.3)
  out, states = jit(lambda t: model(t, return_states=True))(tokens)
  assert len(states) == 2 and states[0].shape == out.shape
  assert (jit(lambda t: model(t, dropout_key=key))(tokens) != out).any()
  remat = encoder(**options, remat='attention')
  np.testing.assert_allclose(jit(remat.__call__)(tokens), out, atol=1e-5)
  assert encoder(**options, final_norm=False).final_norm is None
  scaled = encoder(**options, scale_embedding=True)
  np.testing.assert_allclose(
    scaled._embed(tokens, None), 4 * states[0], rtol=1e-6
  )


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (dict(patterns=[PATTERN] * 3), 'patterns has 3 entries for num_layers=2'),
    (dict(patterns=7), 'layer 0: 7 is no pattern'),
    (dict(position='transformer_xl'), "'transformer_xl' is for DecoderLM"),
    (dict(position='absolute'), "'absolute' is not one of"),
    (dict(num_heads=3), 'features=16 is not divisible by num_heads=3'),
    (dict(num_layers=0), 'num_layers must be at least 1, got 0'),
    (dict(vocab_size=0), 'vocab_size must be at least 1, got 0'),
    (dict(dropout_rate=1.0), r'dropout_rate must be in \[0, 1\)'),
    (dict(remat='all'), "remat 'all' is not one of .*'attention'"),
  ],
)
def test_bad_encoders(overrides, message):
  with pytest.raises(ValueError, match=message):
    encoder(**overrides)


def test_bad_inputs_of_encoders():
  with pytest.raises(ValueError, match=r'length >= 1, 16\], got \(2, 3, 8\)'):
    encoder()(jnp.zeros((2, 3, 8)))
  with pytest.raises(ValueError, match=r'tokens must be .* got float32'):
    encoder(vocab_size=11)(jnp.zeros((2, 3)))


# --- Slides ------------------------------------------------------------------


def slides(**overrides):
  keywords = TINY | magneto() | overrides
  return filled(
    SlideEncoder,
    6,
    patterns=BOTH_WAYS,
    grid=10,
    tile_size=100,
    **keywords,
  )


@pytest.mark.parametrize(
  'pool', ['class', pytest.param('mean', marks=pytest.mark.full)]
)
def test_slides_are_sets_of_placed_tiles(pool):
  rng = np.random.default_rng(0)
  tiles = jnp.asarray(rng.normal(size=(2, 7, 6)), jnp.float32)
  places = jnp.asarray(rng.integers(0, 1000, (2, 7, 2)))
  model = slides(pool=pool, num_layers=1)
  run = jit(lambda x, at, valid: model(x, at, valid=valid))
  valid = jnp.asarray([[True] * 7, [True] * 5 + [False] * 2])
  base = run(tiles, places, valid)
  assert base.shape == (2, 16) and base.dtype == jnp.float32
  # Where a tile lies matters, and not where in it.
  same = places // 100 * 100
  np.testing.assert_array_equal(run(tiles, same, valid), base)
  assert (run(tiles, same.at[1, 2, 0].add(100), valid)[1] != base[1]).any()
  assert (run(tiles, places[..., ::-1], valid) != base).any()
  # Padding may be anything, anywhere.
  noise = tiles.at[1, 5:].set(9.0), places.at[1, 5:].set(-1)
  np.testing.assert_array_equal(run(*noise, valid), base)
  alone = jit(model.__call__)(tiles[1:, :5], places[1:, :5])
  np.testing.assert_allclose(base[1:], alone, atol=1e-5)


def test_bad_slides():
  model = slides()
  tiles, places = jnp.zeros((1, 3, 6)), jnp.zeros((1, 3, 2))
  with pytest.raises(ValueError, match=r'tiles >= 1, 6\], got \(1, 3, 5\)'):
    model(tiles[..., :5], places)
  with pytest.raises(ValueError, match=r'coordinates must .* got \(1, 2, 2\)'):
    model(tiles, places[:, :2])
  with pytest.raises(ValueError, match='outside of the grid of 10 x 10'):
    model(tiles, places + 1000)
  with pytest.raises(ValueError, match="pool 'max' is not one of"):
    slides(pool='max')
  with pytest.raises(ValueError, match='features=18 must be a multiple of 4'):
    slides(features=18, num_heads=3)
  assert longjax.models.SlideEncoder is SlideEncoder
