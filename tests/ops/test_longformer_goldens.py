"""Longformer's attention equals Hugging Face's, and the formula, everywhere.

The golden file comes from transformers' LongformerSelfAttention; see
tests/goldens/README.md. Longformer's layer is `longjax.attention` over a
sliding window with global keys, and then the rows of global tokens are
overwritten by attention to all keys with projections of their own.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax

GOLDENS = (
  pathlib.Path(__file__).resolve().parents[1]
  / 'goldens'
  / 'longformer_self_attention.npz'
)


@functools.cache
def goldens():
  """Returns (weights, {case: arrays}, heads)."""
  weights, cases = {}, {}
  with np.load(GOLDENS) as file:
    for name in file:
      group, _, rest = name.partition('/')
      if group == 'weights':
        weights[rest] = file[name]
      elif rest:
        cases.setdefault(group, {})[rest] = file[name]
    return weights, cases, int(file['heads'])


CASES = sorted(goldens()[1])


def project(weights, name, hidden, heads):
  """A linear layer of torch's layout, split into heads: [B, T, H, D]."""
  out = hidden @ weights[f'{name}.weight'].T + weights[f'{name}.bias']
  return out.reshape(*hidden.shape[:2], heads, -1)


def dense_longformer(weights, hidden, mask, global_mask, side, heads):
  """The paper's layer, query by query and key by key, in float64 numpy."""
  weights = {k: v.astype(np.float64) for k, v in weights.items()}
  hidden = hidden.astype(np.float64)
  q, k, v, qg, kg, vg = (
    project(weights, name + suffix, hidden, heads)
    for suffix in ('', '_global')
    for name in ('query', 'key', 'value')
  )
  batch, length = mask.shape
  real = mask == 1
  is_global = real & (global_mask == 1)
  out = np.zeros_like(q)
  for b in range(batch):
    for i in np.flatnonzero(real[b]):
      if is_global[b, i]:
        query, keys, values = qg[b, i], kg[b], vg[b]
        seen = real[b]
      else:
        query, keys, values = q[b, i], k[b], v[b]
        near = np.abs(np.arange(length) - i) <= side
        seen = (near | is_global[b]) & real[b]
      logits = np.einsum('hd,shd->hs', query, keys[seen])
      logits /= np.sqrt(q.shape[-1])
      weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
      weight /= weight.sum(axis=-1, keepdims=True)
      out[b, i] = np.einsum('hs,shd->hd', weight, values[seen])
  return out.reshape(batch, length, -1)


def longjax_longformer(
  weights, hidden, *, mask, global_mask, side, heads, implementation
):
  """The same layer through `longjax.attention`."""
  is_global = (mask == 1) & (global_mask == 1)
  positions = np.where(is_global, np.arange(mask.shape[1]), -1)
  # Global positions first, at least one column, -1 for none.
  columns = max(1, is_global.sum(axis=1).max())
  global_tokens = -np.sort(-positions, axis=1)[:, :columns]
  attend = functools.partial(
    longjax.attention,
    segment_ids=np.where(mask == 1, 0, -1),
    implementation=implementation,
  )
  q, k, v, qg, kg, vg = (
    project(weights, name + suffix, hidden, heads)
    for suffix in ('', '_global')
    for name in ('query', 'key', 'value')
  )
  window = longjax.SlidingWindow(side, side)
  out = attend(q, k, v, window, global_tokens=global_tokens)
  rows = attend(qg, kg, vg, longjax.Full(causal=False))
  out = jnp.where(is_global[..., None, None], rows, out)
  return out.reshape(hidden.shape)


@pytest.mark.parametrize('case', CASES)
def test_dense_formula_equals_hugging_face(case):
  weights, cases, heads = goldens()
  arrays = cases[case]
  out = dense_longformer(
    weights,
    arrays['hidden'],
    arrays['mask'],
    arrays['global_mask'],
    int(arrays['side']),
    heads,
  )
  np.testing.assert_allclose(arrays['output'], out, rtol=0, atol=2e-5)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('case', CASES)
def test_longjax_equals_hugging_face(case, implementation):
  weights, cases, heads = goldens()
  arrays = cases[case]
  layer = functools.partial(
    longjax_longformer,
    mask=arrays['mask'],
    global_mask=arrays['global_mask'],
    side=int(arrays['side']),
    heads=heads,
    implementation=implementation,
  )

  @jax.jit
  def run(weights, hidden, cotangent):
    out, vjp = jax.vjp(layer, weights, hidden)
    return out, *vjp(cotangent)

  # Otherwise a CPU may not, and an accelerator will not, use all of float32.
  with jax.default_matmul_precision('highest'):
    out, d_weights, d_hidden = run(
      weights, arrays['hidden'], arrays['cotangent']
    )
  np.testing.assert_allclose(out, arrays['output'], rtol=0, atol=2e-5)
  # Padding is 0 exactly, whatever surrounds it.
  assert not np.any(np.asarray(out)[arrays['mask'] == 0])
  np.testing.assert_allclose(d_hidden, arrays['d_hidden'], rtol=1e-4, atol=1e-4)
  for name, gradient in d_weights.items():
    np.testing.assert_allclose(
      gradient,
      # Absent: no global token, no gradient.
      arrays.get(f'd_{name}', np.zeros_like(gradient)),
      rtol=1e-4,
      atol=1e-4,
      err_msg=name,
    )


def test_cases_are_what_they_say():
  """The goldens hold the traps, and a wrong window or global is visible."""
  weights, cases, heads = goldens()
  ragged = cases['ragged_globals']
  counts = ragged['global_mask'].sum(axis=1)
  assert len(set(counts)) == 3 and 0 in counts
  assert any(
    case['mask'].shape[1] % (2 * case['side']) for case in cases.values()
  )
  window = cases['window_over_length']
  assert window['side'] > window['mask'].shape[1]
  assert any(
    np.any((case['mask'] == 0) & (case['global_mask'] == 1))
    for case in cases.values()
  )
  arguments = (weights, ragged['hidden'], ragged['mask'])
  for global_mask, side in (
    (ragged['global_mask'], ragged['side'] + 1),
    (0 * ragged['global_mask'], ragged['side']),
  ):
    wrong = dense_longformer(*arguments, global_mask, int(side), heads)
    assert np.abs(wrong - ragged['output']).max() > 0.1
