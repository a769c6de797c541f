"""Dense attention in float64 numpy, with its gradients, for one text.

Independent of everything in longjax: what the papers' identities are checked
against. Arrays have no batch axis: q, k, v are [T, H, D].
"""

import numpy as np


def rotate(x, positions, base=10000.0):
  """RoPE in float64: x [T, H, D] at positions [T], halves paired."""
  half = x.shape[-1] // 2
  angle = np.asarray(positions, np.float64)[:, None]
  angle = (angle * base ** (-np.arange(half) / half))[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      a * np.sin(angle) + b * np.cos(angle),
    ],
    axis=-1,
  )


def logits(q, k):
  """[H, T, S] products over sqrt(head size)."""
  q, k = (np.asarray(x, np.float64) for x in (q, k))
  return np.einsum('thd,shd->hts', q, k) / np.sqrt(q.shape[-1])


def softmax(s, counts, v):
  """(out [T, H, E], lse [T, H], p [H, T, S]) with multiplicities."""
  counts = np.broadcast_to(counts, s.shape)
  s = np.where(counts > 0, s, -np.inf)
  largest = s.max(-1, keepdims=True)
  largest = np.where(np.isinf(largest), 0, largest)
  p = counts * np.exp(s - largest)
  total = p.sum(-1, keepdims=True)
  with np.errstate(divide='ignore'):
    lse = (np.log(total) + largest)[..., 0]
  p = p / np.where(total > 0, total, 1)
  out = np.einsum('hts,she->the', p, np.asarray(v, np.float64))
  return out, lse.T, p


def attention(q, k, v, counts, cotangents=None):
  """As `helpers.run` gives it: dict of out, lse and, if asked, gradients."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out, lse, p = softmax(logits(q, k), counts, v)
  result = dict(out=out, lse=lse)
  if cotangents is None:
    return result
  dout, dlse = (np.asarray(x, np.float64) for x in cotangents)
  dp = np.einsum('the,she->hts', dout, v)
  delta = (dout * out).sum(-1) - dlse
  ds = p * (dp - delta.T[..., None]) / np.sqrt(q.shape[-1])
  result['dq'] = np.einsum('hts,shd->thd', ds, k)
  result['dk'] = np.einsum('hts,thd->shd', ds, q)
  result['dv'] = np.einsum('hts,the->she', p, dout)
  return result


def check(got, wanted, atol=2e-5):
  """A result of `helpers.run` for a batch of one equals a dense one."""
  for name, x in wanted.items():
    np.testing.assert_allclose(got[name][0], x, atol=atol, err_msg=name)
