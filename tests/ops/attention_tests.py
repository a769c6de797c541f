"""Tests that every implementation of attention has to pass.

`AttentionTests` is the base of a class for each; all go through
`longjax.attention`. What an implementation refuses is tested to be refused.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from tests.ops.helpers import QUICK, normal, qkv, transformer_xl
from tests.ops.pallas import grid

LENGTHS = (1, 7, 127, 128, 129, 300)
KEY = jax.random.key(3)


def _packed(length, batch=1):
  """Two documents, with padding before, between and after them."""
  ids = np.full((batch, length), -1)
  ids[:, 5 : length // 2] = 7
  ids[:, length // 2 + 3 : -2] = 4
  return ids


# (pattern, arguments of `qkv`, options of `attention`). Lengths are mostly no
# multiples of anything. Arrays among the options are traced.
CASES = {
  'length 1': (longjax.Full(), dict(length=1), {}),
  'length 7': (
    longjax.Lambda(4, 2),
    dict(length=7),
    dict(position=longjax.RoPE()),
  ),
  'length 127': (
    longjax.Dilated((32, 127), (2, 4)),
    dict(length=127, heads=4, kv_heads=2),
    {},
  ),
  'length 128': (
    longjax.SlidingWindow(31, 20),
    dict(length=128),
    dict(global_tokens=np.array([[100, 3, -1, 3]])),
  ),
  'length 129': (
    longjax.SlidingWindow(40),
    dict(length=129, heads=4, kv_heads=2),
    dict(position=longjax.RoPE()),
  ),
  'length 300': (longjax.SlidingWindow(150), dict(length=300, heads=1), {}),
  'dilation by head': (
    longjax.SlidingWindow(9, 4, dilation=(1, 3)),
    dict(length=100, kv_heads=1),
    dict(dropout_rate=0.3, dropout_key=KEY),
  ),
  'dilation, ragged': (
    longjax.SlidingWindow(11, 7, dilation=4),
    dict(length=70, kv_length=75, heads=1),
    dict(q_positions=np.int32(3)),
  ),
  'packed, soft cap': (
    longjax.SlidingWindow(50, 3),
    dict(length=129),
    dict(segment_ids=_packed(129), logit_soft_cap=2.0),
  ),
  'start and global keys': (
    longjax.Lambda(30, 6),
    dict(length=100, kv_heads=1),
    dict(
      position=longjax.RoPE(),
      global_tokens=np.array([[50, 2, 99]]),
      dropout_rate=0.2,
      dropout_key=KEY,
    ),
  ),
  'self-extend': (
    longjax.SelfExtend(20, 4),
    dict(length=80, heads=1),
    dict(position=longjax.RoPE()),
  ),
  'segments, detached': (
    longjax.Dilated(
      (24, 64), (1, 3), False, offsets='torchscale', detach_weights=True
    ),
    dict(length=90, kv_heads=1),
    {},
  ),
  'a block and the last': (
    longjax.BlockwiseCausal(40),
    dict(length=100, kv_heads=1),
    dict(position=longjax.RoPE()),
  ),
  'positions of each row': (
    longjax.SlidingWindow(33),
    dict(batch=2, length=40, kv_length=90, heads=1),
    dict(q_positions=np.array([50, 20]), kv_positions=np.array([0, 9])),
  ),
  'dilation with global keys': (
    longjax.SlidingWindow(9, dilation=2),
    dict(length=66, heads=1),
    dict(global_tokens=np.array([[1, 30]]), scale=0.3),
  ),
  'few queries, many keys': (
    longjax.Full(causal=False),
    dict(length=3, kv_length=2100, heads=1),
    {},
  ),
}

# Of these, what interpreters compute by default, in seconds each; kernels have
# tests of their own.
INTERPRETED = (
  'length 128',
  'packed, soft cap',
  'start and global keys',
  'segments, detached',
  'positions of each row',
)

# What an implementation may refuse, by name: as in CASES.
FEATURES = {
  'ALiBi': (longjax.Full(), {}, dict(position=longjax.ALiBi())),
  'xPos': (longjax.Full(), {}, dict(position=longjax.XPos())),
  'Transformer-XL': (
    longjax.Full(),
    {},
    lambda size: dict(position=transformer_xl(0, 2, size, -1, 40)),
  ),
  'positions one by one': (
    longjax.Full(),
    {},
    dict(
      q_positions=np.arange(24)[None], kv_positions=np.arange(24)[None, ::-1]
    ),
  ),
  'start keys of documents': (
    longjax.Lambda(5, 2),
    {},
    dict(segment_ids=_packed(24)),
  ),
  'LongNet in documents': (
    longjax.Dilated((8,), (2,)),
    {},
    dict(segment_ids=_packed(24)),
  ),
  'LongNet from a position': (
    longjax.Dilated((8,), (2,)),
    {},
    dict(q_positions=5, kv_positions=5),
  ),
  'dilation by row': (
    longjax.SlidingWindow(5, dilation=2),
    {},
    dict(q_positions=np.array([3])),
  ),
  'another value size': (longjax.Full(), dict(value_size=40), {}),
  'head size 24': (longjax.Full(), dict(size=24), {}),
  'head size 256': (longjax.Full(), dict(size=256, heads=1), {}),
  'float32': (longjax.Full(), dict(dtype=jnp.float32), {}),
  'float16': (longjax.Full(), dict(dtype=jnp.float16), {}),
  'bfloat16': (longjax.Full(), dict(dtype=jnp.bfloat16), {}),
}


# What every Pallas backend refuses, by name, and a part of its reason.
REFUSED_BY_KERNELS = {
  'ALiBi': 'ALiBi changes logits',
  'xPos': 'XPos changes logits',
  'Transformer-XL': 'TransformerXL changes logits',
  'positions one by one': 'keys in any order',
  'start keys of documents': 'segment_ids with Lambda',
  'LongNet in documents': 'segment_ids with Dilated',
  'LongNet from a position': 'known only for a plain 0',
  'dilation by row': 'positions of each batch row',
  'another value size': 'value size 40',
}


class AttentionTests:
  """Subclasses name an implementation.

  Attributes:
    name: of the implementation.
    size, dtype: of heads.
    bounds: of errors; of out and gradients relative to the largest entry.
    refused: reasons, by the name of a feature.
  """

  name: str
  size = 16
  dtype = jnp.float32
  bounds = dict(out=1e-5, lse=1e-5, gradient=2e-5)
  refused: dict[str, str] = {}

  @contextlib.contextmanager
  def running(self):
    """What calls have to be made in."""
    yield

  @pytest.fixture(autouse=True)
  def _run(self, capsys):
    with self.running():
      yield
    # Interpreters say so and go on.
    assert 'RACE DETECTED' not in capsys.readouterr().out

  # --- Calls -----------------------------------------------------------------

  def inputs(self, seed=0, **sizes):
    sizes = dict(batch=1, heads=2, size=self.size, dtype=self.dtype) | sizes
    return qkv(seed, **sizes)

  def compiled(self, pattern, *, gradient=True, name=None, **options):
    """A function of (q, k, v), and of cotangents of (out, lse) if given.

    It returns a dict of numpy arrays: out, lse, and dq, dk, dv with `gradient`.
    """
    name = name or self.name
    arrays = (np.ndarray, np.generic, jax.Array)
    traced = {n: y for n, y in options.items() if isinstance(y, arrays)}
    static = {n: y for n, y in options.items() if n not in traced}

    def call(x, cotangents, traced):
      def attend(*x):
        return longjax.attention(
          *x,
          pattern,
          implementation=name,
          return_lse=True,
          **static,
          **traced,
        )

      if not gradient:
        out, lse = attend(*x)
        return dict(out=out, lse=lse)
      (out, lse), pull = jax.vjp(attend, *x)
      dq, dk, dv = pull((cotangents[0].astype(out.dtype), cotangents[1]))
      return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

    jitted = jax.jit(call, compiler_options=QUICK)

    def run(x, cotangents=None):
      if cotangents is None and gradient:
        q, _, v = x
        shape = q.shape[:3]
        cotangents = normal(98, *shape, v.shape[3]), normal(99, *shape)
      return jax.tree.map(np.asarray, jitted(x, cotangents, traced))

    return run

  def wanted(self, x, pattern, **options):
    """The definition's results, in float32."""
    run = self.compiled(pattern, name='reference', **options)
    return run(tuple(y.astype(jnp.float32) for y in x))

  def assert_close(
    self, got, wanted, dtype=None, *, rotated=False, cancelling=False
  ):
    """Results are near those wanted.

    Args:
      dtype: of the inputs, where it is not the class's.
      rotated: queries and keys are rounded again before their products.
      cancelling: queries may see one key, or few. Next to nothing is then left
        of dq and dk, and what 16 bits round is of the size of dv.
    """
    bounds = self.bounds
    if dtype not in (None, jnp.dtype(self.dtype)):
      bounds = AttentionTests.bounds
      if dtype.itemsize == 2:
        bounds = dict(out=8e-3, lse=1e-4, gradient=2e-2)
    for name, b in wanted.items():
      a = got[name].astype(np.float64)
      b = b.astype(np.float64)
      assert a.shape == b.shape, name
      largest = max(np.abs(b[np.isfinite(b)]).max(initial=0.0), 1e-3)
      if cancelling and name in ('dq', 'dk') and self.dtype != jnp.float32:
        largest = max(largest, np.abs(wanted['dv']).max())
      if name == 'lse':
        np.testing.assert_array_equal(a == -np.inf, b == -np.inf)
        a, b = (np.where(y == -np.inf, 0, y) for y in (a, b))
        largest = 1.0
      assert np.isfinite(a).all(), name
      error = np.abs(a - b).max() / largest
      bound = bounds.get(name, bounds['gradient']) * (1 + rotated)
      if name == 'lse' and rotated and self.dtype != jnp.float32:
        # Of one key it is the logit, and its rounding is not averaged out.
        bound = 1.5e-2 if cancelling else 5e-3
      assert error <= bound, f'{name} is off by {error:.2e}'

  # --- Tests -----------------------------------------------------------------

  @pytest.mark.parametrize('case', CASES)
  def test_against_the_definition(self, case):
    self.check_against_the_definition(case)

  def check_against_the_definition(self, case):
    pattern, sizes, options = CASES[case]
    x = self.inputs(**sizes)
    got = self.compiled(pattern, **options)(x)
    assert got['out'].dtype == self.dtype and got['lse'].dtype == np.float32
    self.assert_close(
      got, self.wanted(x, pattern, **options), rotated='position' in options
    )

  @pytest.mark.full
  @pytest.mark.parametrize('number', range(60))
  def test_the_grid(self, number):
    x, pattern, options = grid.case(number, size=self.size, dtype=self.dtype)
    run = self.compiled(pattern, **options)
    reason = grid.refusal(pattern, options)
    if self.refused and reason is not None:
      with pytest.raises(NotImplementedError, match=reason):
        run(x)
      return
    rotated = options['position'] is not None
    wanted = self.wanted(x, pattern, **options)
    self.assert_close(run(x), wanted, rotated=rotated, cancelling=True)

  def test_cases_have_all_lengths(self):
    lengths = {sizes['length'] for _, sizes, _ in CASES.values()}
    assert lengths >= set(LENGTHS)

  @pytest.mark.parametrize('feature', FEATURES)
  def test_features_are_served_or_refused(self, feature):
    pattern, sizes, options = FEATURES[feature]
    if callable(options):
      options = options(self.size)
    x = self.inputs(**(dict(length=24) | sizes))
    run = self.compiled(pattern, gradient=False, **options)
    if feature in self.refused:
      with pytest.raises(NotImplementedError, match=self.refused[feature]):
        run(x)
      return
    wanted = self.wanted(x, pattern, gradient=False, **options)
    self.assert_close(run(x), wanted, x[0].dtype, rotated='position' in options)

  def test_twice_is_the_same(self):
    """To the last bit, gradients too."""
    run = self.compiled(longjax.Dilated((16, 70), (1, 2)))
    x = self.inputs(length=70, kv_heads=1)
    first, second = run(x), run(x)
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])

  def test_who_sees_nothing_and_who_is_not_seen(self):
    ids = _packed(80)
    nobody = ids[0] < 0
    got = self.compiled(longjax.SlidingWindow(20, 5), segment_ids=ids)(
      self.inputs(length=80)
    )
    assert (got['out'][:, nobody] == 0).all()
    assert (got['lse'][:, nobody] == -np.inf).all()
    for name in ('dq', 'dk', 'dv'):
      assert (got[name][:, nobody] == 0).all(), name
      assert (got[name][:, ~nobody] != 0).any(axis=(0, 2, 3)).all(), name
      assert np.isfinite(got[name]).all(), name

  def test_batch_rows_are_strangers(self):
    """Nothing of one row, not even NaN, reaches another."""
    run = self.compiled(longjax.SlidingWindow(20, 20))
    x = self.inputs(batch=2, length=70)
    other = tuple(y.at[1].set(jnp.nan) for y in x)
    with np.errstate(invalid='ignore'):
      got, wanted = run(other), run(x)
    for name in got:
      np.testing.assert_array_equal(got[name][0], wanted[name][0], name)

  def test_padding_changes_nothing(self):
    pattern, x = longjax.SlidingWindow(30, 4), self.inputs(length=70)
    wanted = self.compiled(pattern)(x)
    ids = np.where(np.arange(100) < 70, 0, -1)[None]
    padded = tuple(
      jnp.pad(y, ((0, 0), (0, 30), (0, 0), (0, 0)), constant_values=9)
      for y in x
    )
    cotangents = normal(98, *x[0].shape), normal(99, *x[0].shape[:3])
    cotangents = tuple(
      jnp.pad(y, ((0, 0), (0, 30), *((0, 0),) * (y.ndim - 2)))
      for y in cotangents
    )
    got = self.compiled(pattern, segment_ids=ids)(padded, cotangents)
    got = {name: y[:, :70] for name, y in got.items()}
    self.assert_close(got, wanted)

  @pytest.mark.parametrize(
    'pattern',
    [longjax.Dilated((32, 80), (1, 4)), longjax.Lambda(20, 9)],
    ids=['LongNet', 'Lambda'],
  )
  def test_the_future_is_not_seen(self, pattern):
    run, now = self.compiled(pattern), 41
    q, k, v = self.inputs(length=80)
    other = (
      q,
      k.at[:, now:].add(3.0),
      v.at[:, now:].multiply(-2.0),
    )
    got, wanted = run(other), run((q, k, v))
    for name in ('out', 'lse', 'dq'):
      np.testing.assert_array_equal(got[name][:, :now], wanted[name][:, :now])
      assert (got[name][:, now:] != wanted[name][:, now:]).any(), name

  def test_dropout_drops_its_share(self):
    """Of equal weights on values of 1, the mean of what is kept is 1."""
    rate, window, length = 0.25, 63, 128
    run = self.compiled(
      longjax.SlidingWindow(window),
      gradient=False,
      dropout_rate=rate,
      dropout_key=KEY,
    )
    q, k, v = self.inputs(length=length)
    got = run((q * 0, k, jnp.ones_like(v)))['out'].astype(np.float64)
    shares = got[:, window:, :, 0]
    # All features of a head are dropped together.
    np.testing.assert_array_equal(got, got[..., :1] + 0 * got)
    spread = math.sqrt(rate / (1 - rate) / (window + 1))
    # Neighbouring rows share no entries: each row's are drawn anew.
    assert abs(shares.mean() - 1) < 4 * spread / math.sqrt(shares.size)
    assert 0.8 * spread < shares.std() < 1.2 * spread


def interpreted_against_the_definition():
  """That test with the other cases left to the whole grid."""
  cases = [
    pytest.param(case, marks=() if case in INTERPRETED else pytest.mark.full)
    for case in CASES
  ]

  @pytest.mark.parametrize('case', cases)
  def test(self, case):
    self.check_against_the_definition(case)

  return test


__all__ = [
  'AttentionTests',
  'CASES',
  'FEATURES',
  'interpreted_against_the_definition',
]
