"""ALiBi's slopes and Transformer-XL's formula."""

import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax.positions import alibi_slopes

rng = np.random.default_rng(1)


def normal(*shape):
  return rng.normal(size=shape).astype(np.float32)


def test_alibi_slopes_of_the_paper():
  np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
  np.testing.assert_allclose(
    alibi_slopes(16), 0.5 ** np.arange(0.5, 8.5, 0.5), rtol=1e-6
  )
  assert alibi_slopes(1) == [2.0**-8]
  # No power of two: those of 8, then every other one of 16.
  np.testing.assert_allclose(
    alibi_slopes(12),
    [*0.5 ** np.arange(1, 9), *0.5 ** np.arange(0.5, 4.5)],
    rtol=1e-6,
  )


@pytest.mark.parametrize('slopes', [None, [0.5, 0.1, 0.0]])
def test_alibi_takes_the_absolute_distance_off(slopes):
  heads = 3
  scheme = longjax.ALiBi(None if slopes is None else np.float32(slopes))
  q, k = normal(2, heads, 4), normal(2, 5, heads, 4)
  distance = np.array([[-7, -1, 0, 2, 1000]])
  got = scheme.logits(q, k, distance, 0.3)
  m = alibi_slopes(heads) if slopes is None else np.array(slopes)
  wanted = 0.3 * np.einsum('bhd,bshd->bhs', q, k)
  wanted = wanted - m[:, None] * np.abs(distance)
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('min_distance', [0, -3])
def test_transformer_xl_formula(min_distance):
  """scale * [(q + u) . k + (q + v) . r_distance], term by term."""
  heads, size, count = 2, 4, 9
  q, k = normal(1, heads, size), normal(1, 6, heads, size)
  u, v, r = normal(heads, size), normal(heads, size), normal(count, heads, size)
  scheme = longjax.TransformerXL(u, v, r, min_distance)
  distance = min_distance + np.array([0, 1, 8, 5, 3, 2])
  got = scheme.logits(q, k, distance[None], 0.7)
  for h in range(heads):
    for s, d in enumerate(distance):
      a = q[0, h] @ k[0, s, h]  # content
      b = q[0, h] @ r[d - min_distance, h]  # content and position
      c = u[h] @ k[0, s, h]  # global content bias
      e = v[h] @ r[d - min_distance, h]  # global position bias
      np.testing.assert_allclose(
        got[0, h, s], 0.7 * (a + b + c + e), rtol=1e-4, atol=1e-5
      )


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_transformer_xl_in_attention_against_plain_numpy(implementation):
  """Rows of r are the distances 0, 1, 2, ..., also with a dilation."""
  length, heads, size = 40, 2, 8
  q, k, value = normal(3, length, heads, size)
  u, v, r = normal(heads, size), normal(heads, size), normal(30, heads, size)
  dilation = (1, 3)
  out = longjax.attention(
    *(y[None] for y in (q, k, value)),
    longjax.SlidingWindow(9, dilation=dilation),
    position=longjax.TransformerXL(u, v, r),
    implementation=implementation,
  )
  for h in range(heads):
    for i in range(length):
      keys = [i - n * dilation[h] for n in range(10) if i >= n * dilation[h]]
      logits = [
        ((q[i, h] + u[h]) @ k[j, h] + (q[i, h] + v[h]) @ r[i - j, h])
        / np.sqrt(size)
        for j in keys
      ]
      p = np.exp(np.array(logits, np.float64) - max(logits))
      wanted = (p / p.sum()) @ value[keys, h]
      np.testing.assert_allclose(out[0, i, h], wanted, atol=1e-5)


def test_transformer_xl_has_no_silent_distance():
  """Pairs outside of the table: an error if known, NaN if traced."""
  x = jnp.asarray(normal(1, 12, 1, 4))
  scheme = longjax.TransformerXL(normal(1, 4), normal(1, 4), normal(6, 1, 4))
  with pytest.raises(ValueError, match='distances 0 to 5, but .* 0 to 7'):
    longjax.attention(x, x, x, longjax.SlidingWindow(7), position=scheme)
  with pytest.raises(ValueError, match='distances 0 to 5, but .* -2 to 5'):
    longjax.attention(x, x, x, longjax.SlidingWindow(5, 2), position=scheme)
  for implementation in ('xla', 'reference'):
    out = longjax.attention(
      x,
      x,
      x,
      longjax.SlidingWindow(7),
      position=scheme,
      q_positions=jnp.arange(12)[None],
      kv_positions=jnp.arange(12)[None],
      implementation=implementation,
    )
    assert np.isfinite(out[:, :6]).all() and np.isnan(out[:, 6:]).all()


def test_bad_shapes_are_refused():
  u, r = np.zeros((2, 4)), np.zeros((9, 2, 4))
  x = jnp.ones((1, 3, 2, 4))
  for scheme, message in (
    (longjax.ALiBi(np.ones(3)), r'slopes have shape \(3,\), but \(2,\)'),
    (longjax.TransformerXL(u[:1], u, r), r'u has shape \(1, 4\), .* \(2, 4\)'),
    (longjax.TransformerXL(u, u[:, :3], r), r'v has shape \(2, 3\)'),
    (longjax.TransformerXL(u, u, r[:, :1]), r'r has shape \(9, 1, 4\)'),
    (longjax.TransformerXL(u, u, u), r'r has shape \(2, 4\), '),
  ):
    with pytest.raises(ValueError, match=message):
      longjax.attention(x, x, x, longjax.Full(), position=scheme)
