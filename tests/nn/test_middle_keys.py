"""LM-Infinite's top-k middle keys: facts B11, identities 13 and 14."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax import MiddleKeys
from longjax.generation.sample import sample
from longjax.models import llama
from longjax.ops.merge import merge
from longjax.ops.middle import attend_middle
from tests.ops import dense
from tests.ops.helpers import qkv

WINDOW, START, LENGTH = 6, 2, 30
PATTERN = longjax.Lambda(WINDOW, START)
Q, K, V = qkv(3, 2, LENGTH, heads=4, kv_heads=2)
ROW = LENGTH - 1
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
MIDDLE = np.arange(START, ROW - WINDOW + 1)


def last_row(middle, position=None):
  """(out [B, H, E], lse) of the last query: Λ and the chosen middle keys."""
  plain = longjax.attention(
    Q[:, ROW:],
    K,
    V,
    PATTERN,
    position=position,
    q_positions=ROW,
    return_lse=True,
  )
  more = attend_middle(
    Q[:, ROW:], K, V, POSITIONS[:, ROW:], POSITIONS, PATTERN, middle, position
  )
  return [np.asarray(y[:, 0]) for y in merge([plain, more])]


def by_hand(chosen_of, distance):
  """The same in float64; `chosen_of` maps middle logits [H, M] to a mask."""
  outs = []
  for row in range(2):
    q = np.asarray(Q[row], np.float64)
    k, v = (
      np.repeat(np.asarray(y[row], np.float64), 2, axis=1) for y in (K, V)
    )
    i = np.arange(LENGTH)
    told = np.minimum(ROW - i, WINDOW)
    told[MIDDLE] = distance
    s = np.zeros((4, LENGTH))
    for j in i:
      turned = dense.rotate(q[ROW : ROW + 1], [told[j]])[0]
      s[:, j] = (turned * k[j]).sum(-1) / np.sqrt(q.shape[-1])
    seen = np.ones((4, LENGTH), bool)
    seen[:, MIDDLE] = chosen_of(s[:, MIDDLE])
    p = np.where(seen, np.exp(s), 0)
    outs.append(np.einsum('hs,she->he', p / p.sum(-1, keepdims=True), v))
  return np.stack(outs)


def largest(count):
  def chosen(s):
    return s >= np.sort(s, axis=-1)[:, -count][:, None]

  return chosen


@pytest.mark.parametrize('count', [1, 3])
def test_b11_13_each_head_chooses_its_own(count):
  out, _ = last_row(MiddleKeys(count), longjax.RoPE())
  wanted = by_hand(largest(count), WINDOW // 2)
  np.testing.assert_allclose(out, wanted, atol=2e-5)


def test_b11_13_all_of_them():
  out, _ = last_row(MiddleKeys(1000), longjax.RoPE())
  wanted = by_hand(lambda s: np.ones_like(s, bool), WINDOW // 2)
  np.testing.assert_allclose(out, wanted, atol=2e-5)


@pytest.mark.parametrize('position', [None, longjax.RoPE(), longjax.ALiBi()])
def test_b11_13_none_is_plain_lambda(position):
  out, lse = last_row(MiddleKeys(0), position)
  wanted = longjax.attention(
    Q, K, V, PATTERN, position=position, return_lse=True
  )
  np.testing.assert_allclose(out, wanted[0][:, ROW], atol=1e-6)
  np.testing.assert_allclose(lse, wanted[1][:, ROW], atol=1e-6)


def test_b11_14_without_positions_all_of_them_are_vanilla():
  """Distance plays no part: all keys are seen, as they are."""
  out, lse = last_row(MiddleKeys(LENGTH))
  wanted = longjax.attention(Q, K, V, longjax.Full(), return_lse=True)
  np.testing.assert_allclose(out, wanted[0][:, ROW], atol=2e-6)
  np.testing.assert_allclose(lse, wanted[1][:, ROW], atol=2e-6)


@pytest.mark.parametrize('position', [longjax.RoPE(), longjax.ALiBi()])
def test_b11_14_at_its_true_distance_a_key_has_its_own_logit(position):
  """One middle key at a time, the cache's other slots empty."""
  told = jnp.asarray(ROW - MIDDLE)[None]
  repeated = jnp.repeat(K[:, MIDDLE], 2, axis=2)
  wanted = position.logits(Q[:, ROW], repeated, told, Q.shape[-1] ** -0.5)
  for place, key in enumerate(MIDDLE):
    _, lse = attend_middle(
      Q[:, ROW:],
      K,
      V,
      POSITIONS[:, ROW:],
      jnp.where(POSITIONS == key, key, -1),
      PATTERN,
      MiddleKeys(3, distance=int(ROW - key)),
      position,
    )
    np.testing.assert_allclose(lse[:, 0], wanted[..., place], atol=1e-5)


def test_b11_13_a_constant_changes_nothing_of_the_choice():
  """Keys longer by a multiple of the query: all its logits rise as much."""
  q = Q[:, ROW:]
  shift = 0.5 * q[:, :, ::2]
  args = (POSITIONS[:, ROW:], POSITIONS, PATTERN, MiddleKeys(2), None)
  q = q.at[:, :, 1::2].set(q[:, :, ::2])  # heads of a group ask the same
  a, lse = attend_middle(q, K, V, *args)
  b, moved = attend_middle(q, K + shift, V, *args)
  np.testing.assert_allclose(a, b, atol=1e-5)
  assert (np.asarray(moved) > np.asarray(lse) + 0.1).all()


MODEL = longjax.DecoderLM(
  **llama(
    vocab_size=11,
    num_layers=3,
    features=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_features=16,
  ),
  patterns=PATTERN,
  rngs=nnx.Rngs(0),
)
MODEL = jax.tree.map(lambda x: 10 * x, MODEL)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, LENGTH)))


def decode(middle):
  """Logits of the last token after a prefill, and after single steps."""
  cache = MODEL.init_cache(2, LENGTH, middle)
  _, cache = MODEL(TOKENS[:, :-1], cache=cache)
  logits, _ = MODEL(TOKENS[:, -1:], cache=cache)
  return np.asarray(logits[:, 0])


def test_only_single_tokens_and_higher_layers():
  plain = np.asarray(MODEL(TOKENS)[:, -1])
  # Layers that have none: plain Λ.
  np.testing.assert_allclose(decode(MiddleKeys(5, 3)), plain, atol=1e-4)
  np.testing.assert_allclose(decode(MiddleKeys(0, 0)), plain, atol=1e-4)
  higher, all_layers = decode(MiddleKeys(5, 1)), decode(MiddleKeys(5, 0))
  assert np.abs(higher - plain).max() > 1e-2
  assert np.abs(higher - all_layers).max() > 1e-2
  # Rows of a longer call are plain Λ, whatever the cache holds.
  cache = MODEL.init_cache(2, LENGTH, MiddleKeys(5, 0))
  logits, _ = MODEL(TOKENS, cache=cache)
  np.testing.assert_allclose(logits[:, -1], plain, atol=1e-4)


def test_sampling_reads_the_last_prompt_token_with_them():
  middle = MiddleKeys(5, 0)
  prompts = np.asarray(TOKENS)
  out = sample(MODEL, prompts, 1, temperature=0, middle_keys=middle)
  np.testing.assert_array_equal(out[:, 0], decode(middle).argmax(-1))


def test_errors():
  with pytest.raises(ValueError, match='none can be evicted.*max_length'):
    MODEL.init_cache(1, None, MiddleKeys(5, 0))
  window = longjax.DecoderLM(
    **llama(
      vocab_size=5, num_layers=1, features=8, num_heads=2, mlp_features=8
    ),
    patterns=longjax.SlidingWindow(4),
    rngs=nnx.Rngs(0),
  )
  with pytest.raises(ValueError, match='go with Lambda, not with Sliding'):
    window.init_cache(1, 9, MiddleKeys(5, 0))
  for kwargs, name in (
    (dict(count=-1), 'count'),
    (dict(first_layer=-2), 'first_layer'),
    (dict(distance=-1), 'distance'),
  ):
    with pytest.raises(ValueError, match=f'MiddleKeys {name} must be'):
      MiddleKeys(**kwargs)
