"""Ring buffers: what stays in them, whatever the sizes of the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longjax import (
  Dilated,
  Full,
  Lambda,
  MiddleKeys,
  RoPE,
  SelfExtend,
  SlidingWindow,
)
from longjax.nn.cache import (
  LAST_LIMIT,
  Cache,
  LayerCache,
  init_layer_cache,
  layout,
)

append = jax.jit(LayerCache.append)
SIZES = dict(batch_size=2, num_heads=2, num_kv_heads=1, head_dim=1)


@pytest.mark.parametrize(
  ('pattern', 'max_length', 'expected'),
  [
    (SlidingWindow(5), None, (0, 6, None)),
    (SlidingWindow(5, dilation=(1, 3)), None, (0, 16, None)),
    (SlidingWindow(0), None, (0, 1, None)),
    (Lambda(window=6, start=3), None, (3, 6, None)),
    (Dilated((4, 16), (1, 2)), None, (0, 16, None)),
    (Full(), 20, (0, 20, 20)),
    (SelfExtend(window=4, group=2), 20, (0, 20, 20)),
    # A maximum that cuts nothing off sets no limit.
    (SlidingWindow(5), 6, (0, 6, None)),
    (SlidingWindow(5), 4, (0, 4, 4)),
    (Lambda(window=6, start=3), 5, (3, 2, 5)),
    (Lambda(window=6, start=3), 2, (2, 0, 2)),
  ],
)
def test_layout(pattern, max_length, expected):
  assert layout(pattern, 2, max_length) == expected


@pytest.mark.parametrize('chunks', [[1] * 20, [3, 1, 9, 7], [20], [2, 18]])
@pytest.mark.parametrize('pattern', [SlidingWindow(4), Lambda(5, start=3)])
def test_append_keeps_exactly_what_the_pattern_can_still_see(pattern, chunks):
  cache = init_layer_cache(pattern, **SIZES)
  start = getattr(pattern, 'start', 0)
  seen = 0
  for size in chunks:
    # Row 1 starts with two tokens of padding, so it is always two behind.
    positions = np.arange(seen, seen + size) - np.array([[0], [2]])
    positions = np.where(positions < 0, -1, positions).astype(np.int32)
    # A key whose value says where it is.
    values = positions.astype(np.float32)[..., None, None]
    cache = append(cache, values, 10 * values, positions)
    seen += size
    for row, end in enumerate((seen, seen - 2)):
      held, keys, values = (
        np.asarray(x)[row] for x in (cache.positions, cache.keys, cache.values)
      )
      # Each once: a start key is not in the ring too.
      expected = [p for p in range(end) if p < start or p >= end - 5]
      assert sorted(held[held >= 0]) == expected
      keys, values = keys[held >= 0, 0, 0], values[held >= 0, 0, 0]
      np.testing.assert_array_equal(keys, held[held >= 0])
      np.testing.assert_array_equal(values, 10 * held[held >= 0])


def test_a_chunk_attends_to_what_it_overwrites():
  cache = init_layer_cache(SlidingWindow(1), **SIZES)

  def ones(positions):
    return jnp.ones((2, len(positions), 1, 1))

  for positions in ([0, 1], [2, 3]):
    array = jnp.asarray([positions] * 2, jnp.int32)
    cache, keys, values, seen = cache.extend(
      ones(positions), ones(positions), array
    )
  # Query 2 sees key 1, which the chunk's own keys push out of the ring.
  assert set(np.asarray(seen[0])) == {0, 1, 2, 3}
  assert keys.shape == values.shape == (2, 4, 1, 1)
  assert set(np.asarray(cache.positions[0])) == {2, 3}


@pytest.mark.parametrize(
  ('pattern', 'middle', 'rotated'),
  [
    (Full(), None, True),
    (Lambda(4, start=2, ceiling=False), None, True),
    # What is told of a start key's distance is not its distance.
    (Lambda(4, start=2), None, False),
    # Middle keys are all told one distance.
    (Lambda(4, start=2, ceiling=False), MiddleKeys(1, 0), False),
  ],
)
def test_keys_are_rotated_once_where_that_is_final(pattern, middle, rotated):
  sizes = SIZES | {'head_dim': 4}
  cache = init_layer_cache(pattern, max_length=9, middle=middle, **sizes)
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(2, 5, h, 4))) for h in (2, 1))
  positions = jnp.asarray([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
  _, cache = cache.attend(
    q,
    k,
    k,
    positions,
    pattern=pattern,
    position=RoPE(),
    implementation='reference',
  )
  turned = RoPE().rotate(k, positions[..., None]) if rotated else k
  for row, first in ((0, 0), (1, 2)):
    held = dict(
      zip(np.asarray(cache.positions[row]), cache.keys[row], strict=True)
    )
    for token in range(first, 5):
      np.testing.assert_array_equal(held[token - first], turned[row, token])


def test_next_positions_skip_padding_anywhere():
  cache = Cache((), jnp.asarray([4, 0]), None)
  valid = jnp.asarray([[False, True, True], [True, False, True]])
  positions, lengths = cache.next_positions(valid)
  np.testing.assert_array_equal(positions, [[-1, 4, 5], [0, -1, 1]])
  np.testing.assert_array_equal(lengths, [6, 2])


def test_positions_end_where_rotations_are_no_longer_exact():
  cache = Cache((), jnp.asarray([LAST_LIMIT - 1, 0]), None)
  _, lengths = cache.next_positions(jnp.ones((2, 1), bool))
  assert not cache.overflowed(lengths).any()
  with pytest.raises(
    ValueError, match=f'has {2**30 + 1} tokens, .* 1073741824'
  ):
    cache.next_positions(jnp.ones((2, 2), bool))
  # Inside of jit the caller marks the row.
  overflowed = jax.jit(
    lambda valid: cache.overflowed(cache.next_positions(valid)[1])
  )(jnp.ones((2, 2), bool))
  np.testing.assert_array_equal(overflowed, [True, False])


def test_a_window_larger_than_the_cache_ends_with_the_cache():
  """It would evict what it still sees; until then nothing is wrong."""
  start, ring, limit = layout(Lambda(6, start=3), 2, 5)
  assert (start, ring, limit) == (3, 2, 5)
  cache = Cache((), jnp.zeros(1, jnp.int32), limit)
  positions, lengths = cache.next_positions(jnp.ones((1, 5), bool))
  np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4]])
  cache = Cache((), lengths, limit)
  with pytest.raises(ValueError, match='holds max_length=5 .* now has 6: call'):
    cache.next_positions(jnp.ones((1, 1), bool))


def test_errors():
  with pytest.raises(ValueError, match=r'Full\(.*sees every earlier key'):
    layout(Full(), 2)
  with pytest.raises(ValueError, match='max_length must be at least 1, got 0'):
    layout(SlidingWindow(3), 2, 0)
  with pytest.raises(ValueError, match='not causal'):
    layout(SlidingWindow(3, 3), 2)
