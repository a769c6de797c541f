"""The decoder: counted parameters, options, gradients, invariances, streams."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import (
  DecoderLM,
  Dilated,
  Full,
  Lambda,
  RoPE,
  SlidingWindow,
)
from longjax.models.char_lm import char_lm_large, char_lm_small
from longjax.nn import embedding
from longjax.ops import dropout

VOCABULARY = 11
MIXED = (SlidingWindow(2, dilation=(1, 2)), SlidingWindow(4))


def make(patterns=MIXED, **kwargs):
  sizes = dict(vocab_size=VOCABULARY, num_layers=2, features=16, num_heads=2)
  return DecoderLM(**{**sizes, **kwargs}, patterns=patterns, rngs=nnx.Rngs(0))


def make_tokens(batch=2, length=12, seed=0):
  key = jax.random.key(seed)
  return jax.random.randint(key, (batch, length), 0, VOCABULARY)


def count(**keywords):
  def parameters():
    return nnx.state(DecoderLM(**keywords, rngs=nnx.Rngs(0)), nnx.Param)

  leaves = jax.tree.leaves(jax.eval_shape(parameters))
  return sum(math.prod(leaf.shape) for leaf in leaves)


def test_parameters_of_the_paper():
  """Longformer's character LMs, 41M and 102M parameters, counted out."""
  d, hidden, symbols, heads, head_dim = 512, 2048, 204, 8, 64
  attention = 5 * d * d  # W_q, W_k, W_v, W_o and W_r of the layer, no biases
  mlp = d * hidden + hidden + hidden * d + d
  norms = 2 * (d + d)  # scale and bias, before attention and before the MLP
  layer = attention + mlp + norms
  assert (attention, mlp, norms) == (1_310_720, 2_099_712, 2_048)
  # The table is the read-out too; u and v are shared by all layers. There is
  # no norm after the last block and no bias of the logits.
  shared = symbols * d + 2 * heads * head_dim
  assert shared == 104_448 + 1_024
  pattern = SlidingWindow(32)
  small = count(**char_lm_small(patterns=pattern))
  assert small == 12 * layer + shared == 41_055_232
  large = count(**char_lm_large(patterns=pattern))
  assert large == 30 * layer + shared == 102_479_872


def test_initial_parameters():
  model = make(
    features=64, position='transformer_xl', norm_scale_std=0.02, mlp_bias=True
  )
  for path, value in nnx.to_flat_state(nnx.state(model)):
    value, name = np.asarray(value[...]), path[-1]
    if name == 'bias':
      assert not value.any(), path
    elif name == 'scale':
      assert abs(value.mean() - 1) < 0.02 and value.std() > 0.01, path
    else:
      assert abs(value.std() / 0.02 - 1) < 0.25, path
  block = make(zero_init_outputs=True).layers[0]
  for projection in (block.attention.output, block.mlp.down):
    assert not projection.kernel[...].any()


@pytest.mark.parametrize(
  'options',
  [
    # The character LM as published, and a modern variant.
    char_lm_small(
      vocab_size=VOCABULARY, num_layers=1, features=16, num_heads=2
    ),
    dict(
      position=('alibi', RoPE(fraction=0.5)),
      norm='rms',
      qk_norm=True,
      mlp='swiglu',
      mlp_features=24,
      head_dim=4,
      num_kv_heads=1,
      zero_init_outputs=True,
      tie_embedding=False,
      output_bias=True,
      logit_soft_cap=5.0,
      dropout_rate=0.1,
      dtype='bfloat16',
      implementation='reference',
    ),
  ],
  ids=['char_lm', 'modern'],
)
def test_jit_grad_through_merge_with_dropout(options):
  options = {**options, 'attention_dropout_rate': 0.1}
  model = make(SlidingWindow(2, dilation=2), **options)
  tokens = make_tokens()
  graphdef, params = nnx.split(model, nnx.Param)

  @jax.jit
  @jax.value_and_grad
  def loss(params, key):
    logits = nnx.merge(graphdef, params)(tokens, dropout_key=key)
    assert logits.dtype == jnp.float32
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), tokens[..., None], -1
    )
    return -picked.mean()

  value, grads = loss(params, jax.random.key(1))
  again, _ = loss(params, jax.random.key(1))
  other, _ = loss(params, jax.random.key(2))
  assert value == again != other
  assert abs(value - math.log(VOCABULARY)) < 1
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  zero = 0
  for path, g in nnx.to_flat_state(grads):
    assert jnp.isfinite(g[...]).all(), path
    assert g[...].dtype == jnp.float32
    zero += not g[...].any()
  # With zero output projections nothing before them has a gradient yet.
  assert (zero == 0) == (not options.get('zero_init_outputs', False))


def test_other_patterns_take_the_same_parameters():
  options = dict(num_layers=1, implementation='reference')
  short, long = make(SlidingWindow(1), **options), make(Full(), **options)
  tokens = make_tokens()

  def split(model):
    graphdef, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda p: nnx.merge(graphdef, p)(tokens)), params

  (run_short, params), (run_long, own) = split(short), split(long)
  assert jax.tree.structure(own) == jax.tree.structure(params)
  # Same seed, same parameters.
  np.testing.assert_array_equal(run_long(params), run_long(own))
  assert jnp.abs(run_long(params) - run_short(params)).max() > 1e-4


def test_remat_recomputes_each_block_and_changes_no_gradient():
  tokens, key = make_tokens(), jax.random.key(0)

  def gradients(remat):
    model = make(
      SlidingWindow(2),
      num_layers=1,
      position=None,
      dropout_rate=0.1,
      implementation='reference',
      remat=remat,
    )
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params):
      return nnx.merge(graphdef, params)(tokens, dropout_key=key).std()

    jaxpr = jax.make_jaxpr(loss)(params).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    return names, jax.jit(jax.grad(loss))(params)

  (plain, expected), (remat, computed) = gradients(False), gradients(True)
  assert sum('remat' in name or 'checkpoint' in name for name in remat) == 1
  assert len(remat) < len(plain)
  for path, gradient in nnx.to_flat_state(computed):
    np.testing.assert_allclose(
      gradient[...],
      dict(nnx.to_flat_state(expected))[path][...],
      atol=1e-7,
      err_msg=str(path),
    )


def test_dropout_sites(monkeypatch):
  """Embedding, relative embedding, final state; three in each block."""
  model = make(position='transformer_xl', dropout_rate=0.5)
  tokens, seeds = make_tokens(), []

  def keep_mask(seed, *arguments):
    seeds.append(seed.tolist())
    return dropout.keep_mask(seed, *arguments)

  monkeypatch.setattr(embedding, 'keep_mask', keep_mask)
  model(tokens)
  assert not seeds
  model(tokens, dropout_key=jax.random.key(0))
  assert len(seeds) == len(set(map(tuple, seeds))) == 3 + 2 * 3


@pytest.mark.parametrize(
  'position',
  [
    dict(position=['rope', 'alibi']),
    dict(position=['transformer_xl', 'xpos']),
    dict(position='learned', max_positions=20),
  ],
  ids=str,
)
def test_padding_neighbours_and_packing_do_not_matter(position):
  """Left and right padding and packing, several rows: one text, one result."""
  patterns = [SlidingWindow(3), Dilated((4, 8), (1, 2))]
  model = make(patterns, implementation='reference', **position)
  run = jax.jit(lambda tokens, ids: model(tokens, segment_ids=ids))
  text = make_tokens(1, 9)[0]
  other = make_tokens(1, 20, seed=1)[0]
  alone = jax.jit(model.__call__)(text[None])[0]

  # Padding of 99, outside of the vocabulary: it must not even be looked up.
  rows, ids = np.full((4, 20), 99), np.full((4, 20), -1)
  starts = (11, 0, 5, 0)
  for row, start in enumerate(starts[:3]):
    rows[row, start : start + 9] = text
    ids[row, start : start + 9] = row
  rows[2, :5], ids[2, :5] = other[:5], 1
  rows[3], ids[3] = other, 0
  out = run(rows, ids)
  for row, start in enumerate(starts[:3]):
    np.testing.assert_allclose(
      out[row, start : start + 9], alone, atol=2e-6, err_msg=str(row)
    )
  # At equal shapes, bit by bit.
  rows[3], rows[2, :5] = other[::-1], 0
  np.testing.assert_array_equal(run(rows, ids)[:2], out[:2])
  np.testing.assert_array_equal(run(rows, ids)[2, 5:], out[2, 5:])


def test_positions_shift_absolute_embeddings():
  model = make(
    Full(), num_layers=1, position='sinusoidal', implementation='reference'
  )
  tokens = make_tokens()
  run = jax.jit(lambda first: model(tokens, positions=first))
  moved = run(jnp.asarray([0, 3]))
  np.testing.assert_allclose(moved[0], run(0)[0], atol=1e-6)
  np.testing.assert_allclose(moved[1], run(3)[1], atol=1e-6)
  assert jnp.abs(moved - run(0))[1].max() > 1e-3


def test_logit_soft_cap_and_embedding_scale():
  tokens = make_tokens()

  def run(**kwargs):
    # Blocks that are the identity: logits are embedding times table.
    model = make(
      Full(),
      num_layers=1,
      zero_init_outputs=True,
      final_norm=False,
      implementation='reference',
      **kwargs,
    )
    return jax.jit(model.__call__)(tokens), model.embedding.embedding[...]

  logits, table = run()
  np.testing.assert_allclose(logits, table[tokens] @ table.T, atol=1e-6)
  np.testing.assert_allclose(
    run(scale_embedding=True)[0], math.sqrt(16) * logits, atol=1e-6
  )
  np.testing.assert_allclose(
    run(logit_soft_cap=0.01)[0], 0.01 * jnp.tanh(logits / 0.01), atol=1e-6
  )


STREAMS = {
  'rope and alibi': dict(
    num_layers=3,
    patterns=[
      SlidingWindow(2, dilation=(1, 2)),
      Lambda(window=4, start=2),
      Lambda(window=5, start=1),
    ],
    position=['rope', 'rope', 'alibi'],
    num_kv_heads=1,
    qk_norm=True,
    implementation='reference',
  ),
  'transformer_xl': dict(
    patterns=[SlidingWindow(2, dilation=(1, 2)), Lambda(window=4, start=2)],
    position='transformer_xl',
    implementation='reference',
  ),
  'sinusoidal': dict(
    patterns=[Dilated((4, 8), (1, 2)), Full()],
    position='sinusoidal',
    implementation='reference',
  ),
}


@pytest.mark.parametrize('name', STREAMS)
def test_stream_equals_full_recomputation(name):
  """Ragged rows, chunks then single tokens, past four windows: row by row."""
  model = make(**STREAMS[name])
  lengths = (25, 22, 19)  # the windows span 5 positions
  length = max(lengths)
  tokens = np.asarray(make_tokens(3, length))
  valid = np.arange(length) < np.asarray(lengths)[:, None]
  ids = np.where(valid, 0, -1)
  full = np.asarray(jax.jit(model.__call__)(tokens, segment_ids=ids))

  @jax.jit
  def step(cache, tokens, ids):
    return model(tokens, segment_ids=ids, cache=cache)

  unbounded = name == 'sinusoidal'
  cache = model.init_cache(3, max_length=25 if unbounded else None)
  assert cache.limit == (25 if unbounded else None)
  shapes = jax.tree.map(jnp.shape, cache)
  # Left padding first (rows start 0, 3 and 6 late), then tokens one at a time.
  late = length - np.asarray(lengths)
  shifted, shifted_ids = np.zeros_like(tokens), np.full_like(ids, -1)
  for row, start in enumerate(late):
    shifted[row, start:] = tokens[row, : lengths[row]]
    shifted_ids[row, start:] = 0
  out = []
  for first, last in [(0, 7), (7, 14), *((i, i + 1) for i in range(14, 25))]:
    logits, cache = step(
      cache, shifted[:, first:last], shifted_ids[:, first:last]
    )
    out.append(logits)
  out = np.concatenate(out, axis=1)
  for row, start in enumerate(late):
    np.testing.assert_allclose(
      out[row, start:], full[row, : lengths[row]], atol=2e-5, err_msg=str(row)
    )
  np.testing.assert_array_equal(cache.lengths, lengths)
  assert jax.tree.map(jnp.shape, cache) == shapes  # bounded


def test_stream_of_right_padded_chunks_in_bfloat16():
  model = make(Lambda(window=3, start=1), num_layers=1, dtype='bfloat16')
  tokens = make_tokens(2, 6)
  cache = model.init_cache(2)
  assert cache.layers[0].keys.dtype == jnp.bfloat16
  step = jax.jit(lambda t, ids, c: model(t, segment_ids=ids, cache=c))
  # Row 1 brings one token in the first chunk, row 0 three.
  _, cache = step(tokens[:, :3], np.asarray([[0, 0, 0], [0, -1, -1]]), cache)
  logits, cache = step(tokens[:, 1:4], np.zeros((2, 3), int), cache)
  np.testing.assert_array_equal(cache.lengths, [6, 4])
  full = jax.jit(model.__call__)(tokens[1:, :4])
  np.testing.assert_allclose(logits[1, -1], full[0, -1], atol=0.02)


def test_a_full_cache_is_an_error():
  model = make(Full(), num_layers=1, implementation='reference')
  tokens = make_tokens(2, 4)
  step = jax.jit(lambda t, ids, c: model(t, segment_ids=ids, cache=c))
  cache = model.init_cache(2, max_length=5)
  _, cache = step(tokens, np.asarray([[0] * 4, [-1, -1, -1, 0]]), cache)
  with pytest.raises(ValueError, match='holds max_length=5 .* now has 8'):
    model(tokens, cache=cache)
  # Inside jit lengths are unknown: the row that overflows becomes NaN.
  logits, _ = step(tokens, np.zeros((2, 4), int), cache)
  assert jnp.isnan(logits[0]).all() and jnp.isfinite(logits[1]).all()
  with pytest.raises(ValueError, match='init_cache needs max_length'):
    model.init_cache(2)
  learned = make(position='learned', max_positions=3)
  assert learned.init_cache(2).limit == 3
  with pytest.raises(ValueError, match='max_length=3 .* now has 4'):
    learned(tokens, cache=learned.init_cache(2, max_length=100))


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(patterns=[Full()] * 3), 'patterns has 3 entries for num_layers=2'),
    (dict(position=['rope']), 'position has 1 entries for num_layers=2'),
    (dict(patterns=SlidingWindow(2, 2)), 'layer 0 .* not causal'),
    (dict(patterns=[Full(), Full(causal=False)]), 'layer 1 .* not causal'),
    (dict(patterns=512), 'layer 0: 512 is no pattern'),
    (dict(position='absolute'), "'absolute' is not one of .*'rope'"),
    (dict(position=['rope', 'learned']), "'learned' is not one of"),
    (dict(position='learned'), 'max_positions is needed'),
    (dict(max_positions=5), 'max_positions is needed'),
    (dict(mlp='silu'), "'silu' is not one of .*'geglu'"),
    (dict(norm='none'), "'none' is not one of"),
    (dict(num_heads=3), 'features=16 is not divisible by num_heads=3'),
    (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=2'),
    (dict(num_layers=0), 'num_layers must be at least 1, got 0'),
    (dict(dropout_rate=1), r'dropout_rate must be in \[0, 1\), got 1'),
    (
      dict(patterns=SlidingWindow(1, dilation=(1, 2, 3))),
      '3 dilations .* for 2 heads',
    ),
  ],
)
def test_bad_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)


def test_bad_calls():
  model, tokens = make(), make_tokens()
  with pytest.raises(ValueError, match=r'\[batch, length >= 1\], got \(12,\)'):
    model(tokens[0])
  with pytest.raises(ValueError, match=r'got \(2, 0\)'):
    model(tokens[:, :0])
  with pytest.raises(ValueError, match=r'positions must be .* got shape'):
    model(tokens, positions=jnp.zeros((2, 12), jnp.int32))
  cache = model.init_cache(2)
  with pytest.raises(ValueError, match='dropout_key cannot be given with a'):
    model(tokens, cache=cache, dropout_key=jax.random.key(0))
  with pytest.raises(ValueError, match='positions cannot be given with a'):
    model(tokens, cache=cache, positions=3)
  learned = make(position='learned', max_positions=10)
  with pytest.raises(ValueError, match='12 positions .* max_positions=10'):
    learned(tokens)
  with pytest.raises(ValueError, match='13 positions .* max_positions=10'):
    learned(tokens[:, :10], positions=3)
  outside = jnp.full_like(tokens, VOCABULARY)
  model = make(Full(), num_layers=1, implementation='reference')
  assert jnp.isnan(jax.jit(model.__call__)(outside)).all()
