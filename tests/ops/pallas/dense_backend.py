"""A backend whose kernels are the contract's definition: tests of what is
around the kernels need no interpreter, and refuse nothing."""

import sys

import jax.numpy as jnp

from longjax.ops.pallas import attend as pallas
from tests.ops.pallas import oracle


def attend(call):
  return pallas.attend(
    call,
    # Enough programs to be kept busy that small tests split their keys.
    pallas.Kernels(sys.modules[__name__], programs=64, piece=64),
  )


def check(spec, x):
  del spec, x


def forward(spec, x, *, config=None, interpret=None):
  del config, interpret
  out, lse = oracle.dense(spec, x)
  return out.astype(x.q.dtype), lse


def backward(spec, x, lse, delta, dout, *, configs=None, interpret=None):
  """Gradients of a band merged into (lse, delta), from those of one alone.

  The weights of this band in the merged result are w = exp(own lse - lse)
  times its own; cotangents of its own out and lse that say the same are w
  dout and w (rowsum(dout * out) - delta).
  """
  del configs, interpret
  out, own = oracle.dense(spec, x)
  w = jnp.where(own == -jnp.inf, 0.0, jnp.exp(own - lse))
  dout = dout.astype(jnp.float32)
  mine = oracle._per_head(spec, dout)
  sums = (mine * out.transpose(0, 2, 3, 1, 4)).sum(-1)
  dlse = jnp.where(w > 0, w * (sums - delta), 0.0)
  # Rows that were not selected do not matter: w is spread over all residues.
  dout = dout * w.transpose(0, 3, 1, 2)[..., None]
  *_, gradients = oracle.forward_and_backward(spec, x, dout, dlse)
  return gradients._replace(
    **{name: getattr(gradients, name).astype(x.q.dtype) for name in 'qkv'}
  )
