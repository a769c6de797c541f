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
# The others of the paper's kinds are trained in test_training.py.
USUAL = ('modern', 'Longformer')


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
