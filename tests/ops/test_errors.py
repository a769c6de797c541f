"""Bad input of `attention`: one line, before compute, naming the value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from longjax import Full, SlidingWindow

B, T, H, D = 2, 6, 4, 8


def call(pattern=None, *, q=None, k=None, v=None, **options):
  x = jnp.ones((B, T, H, D))
  return longjax.attention(
    x if q is None else q,
    x if k is None else k,
    x if v is None else v,
    SlidingWindow(2) if pattern is None else pattern,
    **options,
  )


def ones(*shape, dtype=jnp.float32):
  return jnp.ones(shape, dtype)


BAD = {
  'rank': (dict(q=ones(T, H, D)), r'q must be \[batch, length, .* \(6, 4, 8\)'),
  'empty': (dict(k=ones(B, 0, H, D)), r'k must be .* >= 1, got shape \(2, 0,'),
  'integers': (
    dict(q=ones(B, T, H, D, dtype=jnp.int32)),
    'q must be float32, bfloat16 or float16, got int32',
  ),
  'float8': (
    dict(v=ones(B, T, H, D, dtype=jnp.float8_e4m3fn)),
    'v must be float32, .* got float8_e4m3fn',
  ),
  'dtypes': (
    dict(k=ones(B, T, H, D, dtype=jnp.bfloat16)),
    'one dtype, got float32, bfloat16, float32',
  ),
  'lengths of k and v': (
    dict(v=ones(B, T + 1, H, D)),
    r'k and v differ .* \(2, 6, 4, 8\) and \(2, 7, 4, 8\)',
  ),
  'batch': (
    dict(q=ones(B + 1, T, H, D)),
    r'q and k differ in batch or head size: \(3, 6, 4, 8\) and \(2, 6, 4, 8\)',
  ),
  'head size': (
    dict(q=ones(B, T, H, D + 1)),
    r'q and k differ in batch or head size: \(2, 6, 4, 9\)',
  ),
  'kv heads': (
    dict(k=ones(B, T, 3, D), v=ones(B, T, 3, D)),
    '3 kv heads do not divide 4 heads',
  ),
  'pattern': (dict(pattern='full'), "must be a longjax Pattern, got 'full'"),
  'dilations': (
    dict(pattern=SlidingWindow(2, dilation=(1, 2))),
    r'2 dilations \(1, 2\) for 4 heads',
  ),
  'position': (
    dict(position='rope'),
    "must be a longjax Position, got 'rope'",
  ),
  'odd rotation': (
    dict(position=longjax.RoPE(fraction=0.4)),
    '0.4 of head size 8 is 3',
  ),
  'q_positions shape': (
    dict(q_positions=np.zeros(5, int)),
    r'q_positions must be whole numbers of shape \(\), \(2,\) or \(2, 6\), '
    r'got int\d+ \(5,\)',
  ),
  'kv_positions dtype': (
    dict(kv_positions=1.5),
    r'kv_positions must be whole numbers .* got float',
  ),
  'segment shape': (
    dict(segment_ids=np.zeros((B, T + 1), int)),
    r'segment_ids must be whole numbers of .* got \(\(2, 7\), \(2, 7\)\)',
  ),
  'segment dtype': (
    dict(segment_ids=np.zeros((B, T))),
    'segment_ids must be whole numbers',
  ),
  'segment pair': (
    dict(segment_ids=(np.zeros((B, T), int),) * 3),
    'segment_ids',
  ),
  'mixed ranks with segments': (
    dict(segment_ids=np.zeros((B, T), int), q_positions=np.zeros((B, T), int)),
    r'both be arrays of rank 2 or neither, got ranks \(2, 0\)',
  ),
  'global shape': (
    dict(global_tokens=np.zeros((B + 1, 2), int)),
    r'global_tokens must be whole numbers of shape \(2, G\), got \(3, 2\)',
  ),
  'global rank': (
    dict(global_tokens=np.zeros(2, int)),
    r'global_tokens must .* got \(2,\)',
  ),
  'global dtype': (
    dict(global_tokens=np.ones((B, 2))),
    'global_tokens must be whole numbers',
  ),
  'dropout rate': (dict(dropout_rate=1.0), r'in \[0, 1\), got 1.0'),
  'negative rate': (dict(dropout_rate=-0.1), r'in \[0, 1\), got -0.1'),
  'dropout key': (
    dict(dropout_rate=0.5),
    'dropout_rate 0.5 needs a dropout_key',
  ),
  'soft cap': (dict(logit_soft_cap=0.0), 'logit_soft_cap must be > 0, got 0.0'),
  'negative cap': (dict(logit_soft_cap=-5.0), 'must be > 0, got -5.0'),
  'implementation': (
    dict(implementation='cuda'),
    "'cuda' is not one of .*'reference', 'xla'",
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(name):
  options, message = BAD[name]
  with pytest.raises(ValueError, match=message) as error:
    call(**options)
  assert '\n' not in str(error.value)


def test_errors_come_while_tracing():
  """Before any compute is spent, also under jit."""
  with pytest.raises(ValueError, match='do not divide'):
    jax.eval_shape(
      lambda q, k: call(q=q, k=k, v=k), ones(B, T, 4, D), ones(B, T, 3, D)
    )


def test_no_global_tokens_at_all():
  out = call(global_tokens=np.zeros((B, 0), int))
  np.testing.assert_array_equal(out, call())


def test_what_is_allowed_though_it_looks_odd():
  """A window beyond the length, one key, kv lengths apart."""
  q, k = ones(1, 3, 2, 4), ones(1, 1, 1, 4)
  out, lse = longjax.attention(
    q, k, k, SlidingWindow(1000, 1000), return_lse=True
  )
  assert out.shape == (1, 3, 2, 4) and lse.shape == (1, 3, 2)
  np.testing.assert_allclose(out, 1)
  full = longjax.attention(q, k, k, Full(causal=False))
  np.testing.assert_allclose(full, 1)
