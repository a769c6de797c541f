"""Calls of attention for tests: random inputs, and implementations run on them.

Shape letters as in `longjax.ops`.
"""

import functools
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

import longjax

# Most of a small case's time is LLVM's; what is computed stays the same.
QUICK = {'xla_backend_optimization_level': 0}


def normal(seed, *shape, dtype=jnp.float32):
  """A standard normal array."""
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def qkv(
  seed=0,
  batch=2,
  length=40,
  heads=4,
  kv_heads=None,
  size=8,
  value_size=None,
  kv_length=None,
  dtype=jnp.float32,
):
  """Random (q, k, v)."""
  kv_heads = kv_heads or heads
  kv_length = kv_length or length
  value_size = value_size or size
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in (
      (batch, length, heads, size),
      (batch, kv_length, kv_heads, size),
      (batch, kv_length, kv_heads, value_size),
    )
  )


def transformer_xl(seed, heads, size, first, last):
  """A scheme that knows the distances first, ..., last."""
  rng = np.random.default_rng(seed)
  u, v, r = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((heads, size), (heads, size), (last - first + 1, heads, size))
  )
  return longjax.TransformerXL(u, v, r, min_distance=first)


def _traced(x):
  parts = x if isinstance(x, tuple) else (x,)
  return all(hasattr(y, 'shape') for y in parts)


def run(implementation, inputs, pattern, *, cotangents=None, **options):
  """One compiled call, forward and backward.

  Args:
    implementation: 'xla' or 'reference'.
    inputs: (q, k, v).
    cotangents: of (out, lse); random if None.
    **options: of `attention`; arrays among them are traced.

  Returns:
    A dict of numpy arrays: out, lse, dq, dk, dv and dposition (a list of what
    the position scheme's arrays get).
  """
  position = options.pop('position', None)
  traced = {name: x for name, x in options.items() if _traced(x)}
  static = {name: x for name, x in options.items() if name not in traced}

  def call(q, k, v, position, traced):
    return longjax.attention(
      q,
      k,
      v,
      pattern,
      position=position,
      implementation=implementation,
      return_lse=True,
      **static,
      **traced,
    )

  def both(inputs, position, traced, cotangents):
    (out, lse), pull = jax.vjp(lambda *x: call(*x, traced), *inputs, position)
    dq, dk, dv, dposition = pull(
      (cotangents[0].astype(out.dtype), cotangents[1])
    )
    dposition = jax.tree.leaves(dposition)
    return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv, dposition=dposition)

  q, _, v = inputs
  if cotangents is None:
    cotangents = (
      normal(98, *q.shape[:3], v.shape[3]),
      normal(99, *q.shape[:3]),
    )
  arguments = inputs, position, traced, cotangents
  compiled = jax.jit(both).lower(*arguments).compile(compiler_options=QUICK)
  return jax.tree.map(np.asarray, compiled(*arguments))


def forward(implementation, inputs, pattern, **options):
  """(out, lse) of one compiled call, as numpy arrays."""
  position = options.pop('position', None)
  traced = {name: x for name, x in options.items() if _traced(x)}
  static = {name: x for name, x in options.items() if name not in traced}

  def call(inputs, position, traced):
    return longjax.attention(
      *inputs,
      pattern,
      position=position,
      implementation=implementation,
      return_lse=True,
      **static,
      **traced,
    )

  arguments = inputs, position, traced
  compiled = jax.jit(call).lower(*arguments).compile(compiler_options=QUICK)
  return jax.tree.map(np.asarray, compiled(*arguments))


def assert_close(got, wanted, *, forward=2e-5, gradient=5e-5):
  """Compares two results of `run`.

  Bounds are absolute up to size 1 and relative to the largest entry above.
  """
  assert got.keys() == wanted.keys()
  for name in wanted:
    bound = forward if name in ('out', 'lse') else gradient
    pairs = [(got[name], wanted[name])]
    if name == 'dposition':
      pairs = list(zip(got[name], wanted[name], strict=True))
    for a, b in pairs:
      assert a.dtype == b.dtype and a.shape == b.shape, name
      a, b = (y.astype(np.float64) for y in (a, b))
      if name == 'lse':
        np.testing.assert_array_equal(a == -np.inf, b == -np.inf)
        a, b = (np.where(y == -np.inf, 0, y) for y in (a, b))
      assert np.isfinite(a).all() and np.isfinite(b).all(), name
      worst = np.abs(a - b).max() / max(1.0, np.abs(b).max())
      assert worst <= bound, f'{name} is off by {worst:.2e}'


def check_against_reference(inputs, pattern, *, narrow=False, **options):
  """xla equals the definition, forward and backward."""
  call = functools.partial(run, inputs=inputs, pattern=pattern, **options)
  # Nearly all of the time is compilation, which can go on side by side.
  with futures.ThreadPoolExecutor(2) as pool:
    got, wanted = pool.map(call, ('xla', 'reference'))
  if narrow:  # bfloat16 and float16 inputs, rounded outputs and products
    assert_close(got, wanted, forward=2e-2, gradient=4e-2)
  else:
    assert_close(got, wanted)
  return got
