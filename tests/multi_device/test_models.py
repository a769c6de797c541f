"""Models on shards against the same models on one device, dropout included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import longjax
from longjax.models import Encoder, longnet
from longjax.sharding import make_mesh, map_shards, varying
from longjax.training.loss import target_losses
from longjax.training.state import split

BATCH, LENGTH, TARGET, VOCABULARY = 4, 64, 6, 17
SIZES = dict(num_layers=2, features=16, num_heads=4)
DROPOUT = dict(dropout_rate=0.2, attention_dropout_rate=0.1)
WINDOWS = [longjax.SlidingWindow(5), longjax.SlidingWindow(20)]
TWO_SIDED = [
  longjax.SlidingWindow(3, 3),
  longjax.SlidingWindow(6, 6, (1, 1, 2, 2)),
]
DILATED = longjax.Dilated((8, 64), (1, 4))
LONGFORMER = SIZES | dict(
  patterns=TWO_SIDED, max_positions=LENGTH, max_globals=5, **DROPOUT
)


def random_tokens(seed, length=LENGTH):
  key = jax.random.key(seed)
  return jax.random.randint(key, (BATCH, length), 3, VOCABULARY)


def decoder(**options):
  options = SIZES | dict(patterns=WINDOWS, dropout_rate=0.2) | options
  return longjax.DecoderLM(VOCABULARY, **options, rngs=nnx.Rngs(0))


def next_tokens(model, batch, key):
  return target_losses(
    model, batch['tokens'], batch['targets'], dropout_key=key, logits=500
  )


def states(model, batch, key):
  return model(batch['tokens'], dropout_key=key)


def masked_states(model, batch, key):
  mask = batch['tokens'] > 4
  x = model(
    batch['tokens'],
    mask=batch['tokens'] > 1,
    global_mask=batch['globals'],
    dropout_key=key,
  )
  # Sums of what a norm made would be 0.
  x = (x * jnp.sin(jnp.arange(x.shape[-1]))).sum(-1)
  return jnp.where(mask, x, 0)


def summary(model, batch, key):
  # Every device along the sequence has all of the target.
  logits = model(batch['tokens'], batch['summary'], dropout_key=key)
  return jax.nn.log_softmax(logits)[..., 3]


def longformer(head, **options):
  return longjax.Longformer(
    VOCABULARY, head=head, **LONGFORMER | options, rngs=nnx.Rngs(0)
  )


def led(**options):
  options = dict(
    patterns=TWO_SIDED,
    max_positions=LENGTH,
    max_target_positions=TARGET,
    activation_dropout_rate=0.1,
    **DROPOUT,
    **options,
  )
  return longjax.LED(VOCABULARY, 2, 1, 16, 4, 2, **options, rngs=nnx.Rngs(0))


# name -> model, what is computed of it.
CASES = {
  'character LM': (
    lambda: decoder(
      position='transformer_xl', attention_dropout_rate=0.1, mlp_bias=True
    ),
    next_tokens,
  ),
  'LongNet': (
    lambda: longjax.DecoderLM(
      **longnet('125m', **SIZES)
      | dict(
        vocab_size=VOCABULARY,
        patterns=DILATED,
        mlp_features=32,
        position='rope',
        dropout_rate=0.2,
        mlp_piece=5,
        remat='block',
        scan_layers=True,
      ),
      rngs=nnx.Rngs(0),
    ),
    next_tokens,
  ),
  'modern': (
    lambda: decoder(
      patterns=[longjax.Lambda(20, 3), longjax.Full()],
      position=['rope', 'alibi'],
      num_kv_heads=2,
      norm='rms',
      qk_norm=True,
      mlp='swiglu',
      tie_embedding=False,
      output_bias=True,
      remat='dots',
    ),
    next_tokens,
  ),
  'learned positions': (
    lambda: decoder(position='learned', max_positions=LENGTH),
    next_tokens,
  ),
  'sinusoidal, parallel': (
    lambda: decoder(position='sinusoidal', parallel=True, remat='attention'),
    next_tokens,
  ),
  'LongNet encoder': (
    lambda: Encoder(
      **SIZES,
      patterns=longjax.Dilated((8, 64), (1, 4), causal=False),
      vocab_size=VOCABULARY,
      dropout_rate=0.2,
      rngs=nnx.Rngs(0),
    ),
    states,
  ),
  'Longformer': (lambda: longformer(None), masked_states),
  'Longformer, masked words': (
    lambda: longformer('masked_lm', max_globals=1),
    masked_states,
  ),
  'Longformer, class': (lambda: longformer('sequence_classification'), states),
  'Longformer, question': (
    lambda: longformer('question_answering', max_globals=40, remat=True),
    states,
  ),
  'LED': (led, summary),
  'LED, one global': (lambda: led(max_globals=1, remat=True), summary),
}
# Three of the papers' kinds are trained in test_training.py.
USUAL = ('learned positions',)


def batch_of():
  tokens = random_tokens(0)
  # Padding at the end of some rows, which the encoders do not see.
  tokens = tokens.at[1, 50:].set(1).at[3, 10:].set(1)
  # Separators of questions, one of them in another shard than the first token.
  for row, place in enumerate((5, 20, 3, 9)):
    tokens = tokens.at[row, place].set(2)
  globals_ = np.zeros((BATCH, LENGTH), int)
  globals_[0, [0, 17, 63]] = globals_[1, [0, 51]] = globals_[2, 40] = 1
  return {
    'tokens': tokens,
    'targets': random_tokens(1),
    'globals': jnp.asarray(globals_),
    'summary': random_tokens(2, TARGET),
  }


def specs_of(batch):
  return {
    name: P('data') if name == 'summary' else P('data', 'seq') for name in batch
  }


def on_shards(f, merge, params, batch, key):
  """What f returns, and gradients of the mean of its sines, over a mesh."""
  mesh = make_mesh({'data': 2, 'seq': 4})

  def local(params, batch, key):
    params = varying(params, ('data', 'seq'))

    def loss(params):
      y = f(merge(params), batch, key)
      return jnp.sin(y).mean(), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return varying(y, ('data', 'seq')), jax.lax.pmean(
      gradients, ('data', 'seq')
    )

  run = map_shards(
    local, mesh, (P(), specs_of(batch), P()), (P('data', 'seq'), P())
  )
  return jax.jit(run)(params, batch, key)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in CASES
  ],
)
def test_equals_one_device(name):
  make, f = CASES[name]
  merge, params = split(make())
  batch, key = batch_of(), jax.random.key(5)

  def loss(params):
    y = f(merge(params), batch, key)
    return jnp.sin(y).mean(), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  got, got_gradients = on_shards(f, merge, params, batch, key)
  if f is summary or 'class' in name:
    # Each of the four devices along the sequence has it.
    got = got.reshape(BATCH, 4, -1)
    np.testing.assert_allclose(got, np.repeat(got[:, :1], 4, 1), atol=1e-6)
    got = got[:, 0].reshape(y.shape)
  np.testing.assert_allclose(got, y, atol=2e-5)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(
      got_gradients[name], gradient, atol=2e-6, err_msg=name
    )


def prefill(model, cache, tokens):
  """Logits and the cache after a text that is split over eight devices."""
  run = map_shards(
    lambda cache, tokens: model(tokens, cache=cache),
    make_mesh({'seq': 8}),
    (P(), P(None, 'seq')),
    (P(None, 'seq'), P()),
  )
  return jax.jit(run)(cache, tokens)


def test_prefill_fills_the_cache_of_one_device():
  model = decoder(
    patterns=[longjax.SlidingWindow(20), longjax.Lambda(9, 3)],
    num_kv_heads=2,
    position='rope',
  )
  tokens = random_tokens(3)
  cache = model.init_cache(BATCH)
  wanted, filled = jax.jit(lambda c, t: model(t, cache=c))(cache, tokens)
  logits, got = prefill(model, cache, tokens)
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  step = jax.jit(lambda c: model(tokens[:, :1], cache=c))
  (logits, got), (wanted, filled) = step(got), step(filled)
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  for x, y in zip(*map(jax.tree.leaves, (got, filled)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_prefill_refuses():
  tokens = random_tokens(3)
  model = decoder(patterns=DILATED)
  with pytest.raises(NotImplementedError, match='thinned rows of whole segme'):
    prefill(model, model.init_cache(BATCH), tokens)
  model = decoder(patterns=longjax.Full())
  with pytest.raises(ValueError, match='max_length=60 .* the text has 64'):
    prefill(model, model.init_cache(BATCH, 60), tokens)


@pytest.mark.parametrize(
  ('make', 'kwargs', 'message'),
  [
    (
      lambda: decoder(position='learned', max_positions=LENGTH),
      {'segment_ids': np.zeros((BATCH, LENGTH), int)},
      'another may hold where a segment begins',
    ),
  ],
)
def test_refusals(make, kwargs, message):
  run = map_shards(
    lambda tokens, kwargs: make()(tokens, **kwargs),
    make_mesh({'seq': 8}),
    P(None, 'seq'),
    P(None, 'seq'),
  )
  with pytest.raises(NotImplementedError, match=message):
    run(random_tokens(0), kwargs)


def test_a_learned_table_is_as_long_as_the_whole_sequence():
  model = decoder(position='learned', max_positions=LENGTH - 1)
  run = map_shards(model, make_mesh({'seq': 8}), P(None, 'seq'), P(None, 'seq'))
  with pytest.raises(ValueError, match='64 positions are needed, but the'):
    run(random_tokens(0))
