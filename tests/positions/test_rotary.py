"""RoPE and xPos against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax.positions.rotary import angles

rng = np.random.default_rng(0)
POSITIONS = np.unique(
  np.concatenate(
    [
      np.arange(40),
      2 ** np.arange(31),
      2 ** np.arange(1, 31) - 1,
      2 ** np.arange(1, 30) + 1,
      rng.integers(0, 2**30, 2000),
    ]
  )
).astype(np.int32)


def frequencies(width, base=10000.0):
  return base ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def rotated(x, positions, *, width=None, interleaved=False, base=10000.0):
  """Float64 numpy: the last axis of x rotated to positions."""
  x = np.array(x, np.float64)
  width = width or x.shape[-1]
  angle = np.asarray(positions, np.float64)[..., None] * frequencies(
    width, base
  )
  y = np.broadcast_to(x, (*angle.shape[:-1], x.shape[-1])).copy()
  if interleaved:
    first, second = np.arange(0, width, 2), np.arange(1, width, 2)
  else:
    first, second = np.arange(width // 2), np.arange(width // 2, width)
  a, b = y[..., first].copy(), y[..., second].copy()
  y[..., first] = a * np.cos(angle) - b * np.sin(angle)
  y[..., second] = a * np.sin(angle) + b * np.cos(angle)
  return y


@pytest.mark.parametrize('base', [10000.0, 1e6, 3.7])
@pytest.mark.parametrize('sign', [1, -1])
def test_angles_are_within_1e_4_of_float64(base, sign):
  inverse_frequency = frequencies(64, base)
  got = jax.jit(lambda p: angles(p, inverse_frequency))(sign * POSITIONS)
  assert got.dtype == jnp.float32
  exact = sign * POSITIONS[:, None].astype(np.float64) * inverse_frequency
  error = np.asarray(got, np.float64) - exact
  error = (error + np.pi) % (2 * np.pi) - np.pi
  assert np.abs(error).max() < 2e-5
  # Plain float32 would have failed here.
  plain = POSITIONS[:, None].astype(np.float32) * np.float32(inverse_frequency)
  plain_error = (plain - sign * exact + np.pi) % (2 * np.pi) - np.pi
  assert np.abs(plain_error).max() > 1


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rope_rotates_by_float64_angles_whatever_the_dtype(dtype, interleaved):
  """The angle that a unit vector was turned by is within 1e-4 rad.

  A narrow dtype rounds the result once, at the end, and never the angle.
  """
  scheme = longjax.RoPE(interleaved=interleaved)
  x = np.zeros((len(POSITIONS), 8), np.float32)
  x[:, [0, 2, 4, 6] if interleaved else [0, 1, 2, 3]] = 1
  got = jax.jit(scheme.rotate)(jnp.asarray(x, dtype), POSITIONS)
  assert got.dtype == dtype
  wanted = rotated(x, POSITIONS, interleaved=interleaved)
  if dtype == jnp.float32:
    np.testing.assert_allclose(got, wanted, atol=1e-4)
  else:
    # Not one more rounding than the exact result itself needs, but where the
    # exact value lies between two numbers of the dtype.
    step = float(jnp.finfo(dtype).eps)
    error = np.abs(np.asarray(got, np.float64) - wanted)
    assert error.max() < 0.5 * step + 1e-4


@pytest.mark.parametrize('interleaved', [False, True])
def test_partial_rotation_leaves_the_rest(interleaved):
  scheme = longjax.RoPE(fraction=0.5, interleaved=interleaved, base=500.0)
  x = rng.normal(size=(3, 20, 16)).astype(np.float32)
  got = scheme.rotate(jnp.asarray(x), jnp.arange(20))
  # Frequencies are of the rotated width, as in GPT-J and GPT-NeoX.
  wanted = np.stack(
    [
      rotated(row, np.arange(20), width=8, interleaved=interleaved, base=500.0)
      for row in x
    ]
  )
  np.testing.assert_allclose(got, wanted, atol=1e-6)
  np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_the_two_pairings_are_a_permutation_of_features():
  x = rng.normal(size=(20, 16)).astype(np.float32)
  order = np.arange(16).reshape(8, 2).T.reshape(-1)  # evens, then odds
  half = longjax.RoPE().rotate(jnp.asarray(x[:, order]), jnp.arange(20))
  pairs = longjax.RoPE(interleaved=True).rotate(jnp.asarray(x), jnp.arange(20))
  np.testing.assert_allclose(half, np.asarray(pairs)[:, order], atol=1e-6)
  assert np.abs(np.asarray(half) - np.asarray(pairs)).max() > 0.1


@pytest.mark.parametrize('scheme', [longjax.RoPE(), longjax.XPos()])
def test_logits_depend_on_the_distance_only(scheme):
  q = jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32)
  k = jnp.asarray(rng.normal(size=(1, 3, 1, 8)), jnp.float32)
  distance = jnp.array([[0, 3, 700]])
  logits = scheme.logits(q, k, distance, 0.5)
  for shift in (0, 11, 2**20):
    turned = scheme.rotate(q[:, None], jnp.array([[[700 + shift]]]))
    keys = scheme.rotate(k, (700 + shift - distance)[..., None])
    products = 0.5 * (turned * keys).sum(-1)[0, :, 0]
    if isinstance(scheme, longjax.XPos):
      turned = scheme.damp(turned, jnp.full((1, 1, 1), 700))
      keys = scheme.damp(keys, (distance - 700)[..., None])
      products = 0.5 * (turned * keys).sum(-1)[0, :, 0]
    np.testing.assert_allclose(products, logits[0, 0], atol=2e-5)


def test_xpos_formula():
  """rotation and zeta ** (distance / scale_base), pair by pair, float64."""
  head_dim, scale_base = 8, 64.0
  scheme = longjax.XPos(scale_base=scale_base)
  q, k = rng.normal(size=(2, head_dim))
  distance = np.array([0, 1, 100, 5000])
  got = scheme.logits(
    jnp.asarray(q, jnp.float32)[None, None],
    jnp.broadcast_to(jnp.asarray(k, jnp.float32), (1, 4, 1, head_dim)),
    jnp.asarray(distance)[None],
    1.0,
  )
  zeta = (np.arange(0, head_dim, 2) / head_dim + 0.4) / 1.4
  decay = np.repeat(zeta, 2) ** (distance[:, None] / scale_base)
  turned = rotated(q, distance, interleaved=True)
  wanted = (turned * decay * k).sum(-1)
  np.testing.assert_allclose(got[0, 0], wanted, atol=2e-5)


def test_xpos_is_fine_over_long_causal_distances_in_attention():
  """Scales around the query tile: nothing over- or underflows to NaN."""
  length = 6000
  x = rng.normal(size=(3, 1, length, 1, 8)).astype(np.float32)
  # A small base: zeta ** (6000 / 8) is far below any float32.
  scheme = longjax.XPos(scale_base=8.0)

  def total(q, k, v):
    out = longjax.attention(
      q, k, v, longjax.SlidingWindow(100), position=scheme
    )
    return (out**2).sum(), out

  (_, out), grads = jax.jit(
    jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  )(*x)
  assert all(np.isfinite(y).all() for y in (out, *grads))
  # The end of the text equals the same text at the beginning.
  tail = longjax.attention(
    *(jnp.asarray(y[:, -300:]) for y in x),
    longjax.SlidingWindow(100),
    position=scheme,
  )
  np.testing.assert_allclose(out[:, -150:], tail[:, -150:], atol=2e-5)


def test_xpos_refuses_keys_that_far_ahead_before_it_computes():
  scheme = longjax.XPos(scale_base=16.0)
  furthest = scheme.furthest_ahead()
  assert furthest == int(40 * 16 / np.log(1.4 / 0.4))
  x = jnp.ones((1, 2, 1, 4))
  with pytest.raises(ValueError, match=f'{furthest + 1} positions ahead'):
    # The positions are traced: the pattern's own reach counts.
    jax.jit(
      lambda p: longjax.attention(
        x,
        x,
        x,
        longjax.SlidingWindow(4, furthest + 1),
        position=scheme,
        q_positions=p,
      )
    )(0)
  long = jnp.ones((1, furthest + 2, 1, 4))
  with pytest.raises(ValueError, match='XPos would overflow'):
    longjax.attention(
      long, long, long, longjax.Full(causal=False), position=scheme
    )
  # Global keys may lie ahead of a two-sided window by any number.
  with pytest.raises(ValueError, match='XPos would overflow'):
    longjax.attention(
      long,
      long,
      long,
      longjax.SlidingWindow(1, 1),
      position=scheme,
      global_tokens=np.array([[0, furthest + 1]]),
    )
  # Keys behind are any number of positions away.
  assert scheme.check_reach(0) is None
  # Where the text is short, an unbounded pattern is served.
  out = longjax.attention(x, x, x, longjax.Full(causal=False), position=scheme)
  assert np.isfinite(out).all()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: longjax.RoPE(base=0.0), 'base must be > 0, got 0.0'),
    (lambda: longjax.RoPE(base=-1.0), 'base must be > 0, got -1.0'),
    (lambda: longjax.RoPE(fraction=0.0), r'fraction .* got 0.0'),
    (lambda: longjax.RoPE(fraction=1.5), r'fraction .* got 1.5'),
    (lambda: longjax.RoPE().check(2, 7), 'head size 7 is 7: an even number'),
    (
      lambda: longjax.RoPE(fraction=0.25).check(2, 12),
      '0.25 of head size 12 is 3: an even number',
    ),
    (lambda: longjax.XPos(scale_base=0.0), 'scale_base must be > 0, got 0.0'),
    (lambda: longjax.XPos(base=-2.0), 'XPos base must be > 0, got -2.0'),
    (lambda: longjax.XPos().check(2, 5), 'even head size, got 5'),
  ],
)
def test_bad_input(make, message):
  with pytest.raises(ValueError, match=message):
    make()
