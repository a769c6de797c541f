"""Sharded attention against the same call on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import longjax
from longjax.sharding import (
  all_to_all_attention,
  make_mesh,
  merge_over_axis,
  sharded_attention,
  varying,
)

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 2, 64, 4, 2, 16
RUNS = np.repeat([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, -1, -1]], 8, 1)
XL = longjax.TransformerXL(
  *(
    jax.random.normal(jax.random.key(9), shape)
    for shape in ((HEADS, SIZE), (HEADS, SIZE), (LENGTH, HEADS, SIZE))
  )
)
ROPE = {'position': longjax.RoPE()}
GLOBAL = {'global_tokens': jnp.asarray([[0, 40, -1, 99], [63, 5, 5, -1]])}
PAPER = ((8, 16, 64), (1, 2, 4))

# name -> pattern, options; 'ids' shards segment ids with the rows.
CASES = {
  'window': (longjax.SlidingWindow(20), ROPE),
  'two-sided window': (longjax.SlidingWindow(5, 7), ROPE),
  'window of one key': (longjax.SlidingWindow(0), ROPE),
  'window longer than the sequence': (longjax.SlidingWindow(200, 3), ROPE),
  'dilations': (longjax.SlidingWindow(6, 0, (1, 1, 2, 3)), ROPE),
  'lambda': (longjax.Lambda(20, 3), ROPE),
  'lambda, ALiBi': (longjax.Lambda(20, 3), {'position': longjax.ALiBi()}),
  'lambda, many start keys': (longjax.Lambda(9, 30), ROPE),
  'sinks': (longjax.AttentionSinks(12, 4), ROPE),
  'ceiling': (longjax.DistanceCeiling(20), ROPE),
  'Self-Extend': (longjax.SelfExtend(8, 4), ROPE),
  'full': (longjax.Full(), ROPE),
  'full, two-sided': (longjax.Full(causal=False), ROPE),
  'LongNet': (longjax.Dilated(*PAPER), ROPE),
  'LongNet, one segment': (longjax.Dilated((8, 1000), (1, 8)), ROPE),
  'LongNet, two-sided': (longjax.Dilated(*PAPER, causal=False), ROPE),
  'LongNet, torchscale': (
    longjax.Dilated(*PAPER, offsets='torchscale', detach_weights=True),
    {'position': longjax.ALiBi()},
  ),
  'LongNet, segments across shards': (
    longjax.Dilated((5, 12), (1, 3)),
    ROPE,
  ),
  'blockwise': (longjax.BlockwiseCausal(12, longjax.Dilated(*PAPER)), ROPE),
  'Sparse Transformer': (longjax.FixedSparse(16, 4), ROPE),
  'LongNet, xPos': (longjax.Dilated(*PAPER), {'position': longjax.XPos()}),
  'xPos': (longjax.SlidingWindow(20), {'position': longjax.XPos()}),
  'Transformer-XL': (longjax.SlidingWindow(20), {'position': XL}),
  'Transformer-XL, full': (longjax.Full(), {'position': XL}),
  'globals': (longjax.SlidingWindow(6, 6), GLOBAL),
  'globals, causal': (longjax.SlidingWindow(6), GLOBAL | ROPE),
  'globals, lambda': (longjax.Lambda(9, 2), GLOBAL | ROPE),
  'documents': (longjax.SlidingWindow(20, 20), ROPE | {'ids': RUNS}),
  'documents, dilations': (
    longjax.SlidingWindow(4, 4, (1, 2, 2, 1)),
    GLOBAL | {'ids': RUNS},
  ),
  'documents, full': (longjax.Full(), ROPE | {'ids': RUNS}),
  'documents, globals': (longjax.SlidingWindow(9), GLOBAL | {'ids': RUNS}),
  'dropout': (
    longjax.SlidingWindow(20),
    {'dropout_rate': 0.3, 'dropout_key': jax.random.key(3)},
  ),
  'dropout, full': (
    longjax.Full(),
    {'dropout_rate': 0.3, 'dropout_key': jax.random.key(3)},
  ),
  'options': (
    longjax.SlidingWindow(20),
    ROPE | {'scale': 0.5, 'logit_soft_cap': 3.0, 'positions': 7},
  ),
  'two-sided, elsewhere': (
    longjax.SlidingWindow(5, 20),
    ROPE | {'positions': jnp.asarray([7, 100])},
  ),
}
# The default run; all others are in the whole grid.
USUAL = {
  2: ('full',),
  4: (
    'window',
    'dilations',
    'lambda, many start keys',
    'full, two-sided',
    'LongNet',
    'LongNet, torchscale',
    'LongNet, xPos',
    'globals, causal',
    'documents, dilations',
    'Transformer-XL',
    'dropout',
    'two-sided, elsewhere',
  ),
  8: ('window longer than the sequence', 'lambda', 'globals', 'Self-Extend'),
}


def grid():
  for name in CASES:
    for devices in (1, 2, 4, 8):
      usual = name in USUAL.get(devices, ())
      yield pytest.param(
        name,
        devices,
        id=f'{name}-{devices}',
        marks=() if usual else pytest.mark.full,
      )


def arrays(length=LENGTH):
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
  *qkv, weights = (
    jax.random.normal(key, (BATCH, length, h, SIZE))
    for key, h in zip(keys, heads, strict=True)
  )
  return tuple(qkv), weights


def sharded(pattern, devices, *, by=sharded_attention, **options):
  """The sharded call as a function of whole arrays."""
  mesh = make_mesh({'seq': devices}, jax.devices()[:devices])
  ids = options.pop('ids', None)
  position = options.pop('position', None)

  def attend(q, k, v, position, ids):
    return by(
      q,
      k,
      v,
      pattern,
      axis_name='seq',
      position=position,
      segment_ids=ids,
      return_lse=True,
      **options,
    )

  along = P(None, 'seq')
  specs = along, along, along, P(), None if ids is None else along
  run = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=along)

  def call(q, k, v, position=position):
    return run(q, k, v, position, None if ids is None else jnp.asarray(ids))

  return call


def alone(pattern, **options):
  ids = options.pop('ids', None)
  at = options.pop('positions', 0)
  position = options.pop('position', None)

  def call(q, k, v, position=position):
    return longjax.attention(
      q,
      k,
      v,
      pattern,
      position=position,
      segment_ids=None if ids is None else jnp.asarray(ids),
      q_positions=at,
      kv_positions=at,
      return_lse=True,
      **options,
    )

  return call


def value_and_gradients(call, qkv, weights, position):
  """(out, lse), and gradients of a loss that depends on both."""

  def loss(x):
    qkv, position = x
    out, lse = call(*qkv, position)
    seen = jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0)
    return (out * weights).sum() + seen.sum(), (out, lse)

  (_, result), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    (qkv, position)
  )
  return jax.tree.leaves((result, gradient))


@pytest.mark.parametrize(('name', 'devices'), list(grid()))
def test_equals_one_device(name, devices):
  pattern, options = CASES[name]
  qkv, weights = arrays()
  position = options.get('position')
  got, wanted = (
    value_and_gradients(call, qkv, weights, position)
    for call in (
      sharded(pattern, devices, **options),
      alone(pattern, **options),
    )
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ('pattern', 'position'),
  [
    (longjax.SlidingWindow(300), longjax.ALiBi()),
    pytest.param(
      longjax.Dilated((512, 2048), (1, 2)),
      longjax.RoPE(),
      marks=pytest.mark.full,
    ),
    pytest.param(longjax.Full(), longjax.RoPE(), marks=pytest.mark.full),
  ],
  ids=str,
)
def test_many_blocks_on_a_mesh_of_two_axes(pattern, position):
  """Loops over blocks, which JAX wants typed; batch rows are split as well."""
  qkv = jax.random.normal(jax.random.key(0), (3, 2, 2048, 1, 4))
  weights = jax.random.normal(jax.random.key(1), (2, 2048, 1, 4))

  def attend(q, k, v):
    return sharded_attention(
      q, k, v, pattern, axis_name='seq', position=position, return_lse=True
    )

  rows = P('data', 'seq')
  run = jax.shard_map(
    attend,
    mesh=make_mesh({'data': 2, 'seq': 4}),
    in_specs=rows,
    out_specs=rows,
  )
  got, wanted = (
    value_and_gradients(call, tuple(qkv), weights, None)
    for call in (
      lambda q, k, v, _: run(q, k, v),
      lambda q, k, v, _: alone(pattern)(q, k, v, position),
    )
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('length', [8, 60])
def test_shards_of_odd_length(length):
  """No zig-zag there, and shards of one row."""
  qkv, weights = arrays(length)
  got, wanted = (
    value_and_gradients(call, qkv, weights, longjax.RoPE())
    for call in (
      sharded(longjax.Full(), length // (15 if length > 8 else 1), **ROPE),
      alone(longjax.Full(), **ROPE),
    )
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
  'name',
  ['lambda, ALiBi', 'globals', 'documents', 'Transformer-XL', 'LongNet 2'],
)
def test_all_to_all(name):
  if name == 'LongNet 2':
    # Ratios that divide a device's two heads.
    pattern, options = longjax.Dilated((8, 64), (1, 2)), ROPE
  else:
    pattern, options = CASES[name]
  qkv, weights = arrays()
  position = options.get('position')
  got, wanted = (
    value_and_gradients(call, qkv, weights, position)
    for call in (
      sharded(pattern, 2, by=all_to_all_attention, **options),
      alone(pattern, **options),
    )
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ('pattern', 'devices', 'options', 'error', 'message'),
  [
    (longjax.Full(), 4, {}, ValueError, 'divide the 2 kv heads'),
    (
      longjax.Dilated(*PAPER),
      2,
      {},
      NotImplementedError,
      r'differs between heads \(0, 1\) and \(2, 3\)',
    ),
    (
      longjax.Full(),
      2,
      {'dropout_rate': 0.1, 'dropout_key': jax.random.key(0)},
      NotImplementedError,
      'named by their head',
    ),
  ],
)
def test_all_to_all_refuses(pattern, devices, options, error, message):
  qkv, _ = arrays()
  call = sharded(pattern, devices, by=all_to_all_attention, **options)
  with pytest.raises(error, match=message):
    call(*qkv)


def test_traced_positions():
  qkv, _ = arrays()
  pattern = longjax.Lambda(9, 70)

  @functools.partial(jax.jit, static_argnums=0)
  def run(make, start):
    return make(pattern, positions=start, **ROPE)(*qkv)[0]

  make = functools.partial(sharded, devices=4)
  for start in (0, 50):
    np.testing.assert_allclose(
      run(make, start), run(alone, start), atol=1e-5, err_msg=str(start)
    )
  with pytest.raises(NotImplementedError, match='known to begin at position 0'):
    sharded(longjax.Dilated((5,), (1,)), 4, positions=jnp.int32(5))(*qkv)
  with pytest.raises(NotImplementedError, match='named by positions'):
    sharded(pattern, 4, **CASES['dropout'][1], positions=5)(*qkv)


def test_causal_by_perturbation():
  """torchscale's sharded causal path leaves out a device's own keys, and shows
  the first device keys that are zeros (peers' defect S4)."""
  qkv, _ = arrays()
  call = jax.jit(sharded(longjax.Dilated(*PAPER), 8, **ROPE))
  out, lse = call(*qkv)
  # The first query sees itself only, on every head that keeps row 0.
  first = np.repeat(np.asarray(qkv[2][:, 0]), HEADS // KV_HEADS, axis=1)
  np.testing.assert_allclose(out[:, 0], first, atol=1e-6)
  assert np.isfinite(lse).all()
  for row in (0, 7, 8, 33, 63):
    changed = [x.at[:, row].add(1.0) for x in qkv]
    after, _ = call(*changed)
    np.testing.assert_array_equal(after[:, :row], out[:, :row])
    # Its own value always counts.
    assert (np.asarray(after[:, row]) != np.asarray(out[:, row])).all()


def test_partial_results_merge_over_the_axis():
  """Few queries, the same everywhere, over keys that are sharded."""
  (q, k, v), weights = arrays()
  q, weights = q[:, :3], weights[:, :3]
  mesh = make_mesh({'seq': 8})

  def partly(q, k, v):
    rank = jax.lax.axis_index('seq')
    out, lse = longjax.attention(
      varying(q, 'seq'),
      k,
      v,
      longjax.Full(causal=False),
      kv_positions=rank * k.shape[1],
      return_lse=True,
    )
    return merge_over_axis(out, lse, 'seq')

  along = P(None, 'seq')
  run = jax.shard_map(
    partly, mesh=mesh, in_specs=(P(), along, along), out_specs=P()
  )
  got, wanted = (
    value_and_gradients(call, (q, k, v), weights, None)
    for call in (
      lambda q, k, v, _: run(q, k, v),
      alone(longjax.Full(causal=False)),
    )
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
  ('pattern', 'options', 'error', 'message'),
  [
    (
      longjax.Dilated((8, 64), (1, 3)),
      ROPE,
      NotImplementedError,
      'the ratio 3 does not divide shards of 16',
    ),
    (
      longjax.Dilated((8, 64), (1, 2)),
      ROPE | {'positions': 8},
      NotImplementedError,
      'segments of 64 need to begin where the sequence does',
    ),
    (
      longjax.Lambda(9, 2),
      {'ids': RUNS},
      NotImplementedError,
      'whose first row another device may hold',
    ),
    (
      longjax.SlidingWindow(9),
      {'positions': jnp.zeros((BATCH, LENGTH), int)},
      ValueError,
      'the position of the first row',
    ),
    (
      longjax.SlidingWindow(9),
      GLOBAL | {'implementation': ['xla', 'reference']},
      NotImplementedError,
      "'reference' with global_tokens across devices",
    ),
  ],
)
def test_refusals(pattern, options, error, message):
  qkv, _ = arrays()
  with pytest.raises(error, match=message):
    sharded(pattern, 4, **options)(*qkv)
