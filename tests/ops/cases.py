"""Random cases over the whole grid of options, by number.

A case is a pure function of its number, so a failure names the case. Patterns,
positions and lengths go around with the number; the rest is drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np

import longjax
from tests.ops.helpers import qkv, transformer_xl

LENGTHS = (300, 1, 129, 7, 128, 127)
SIZE = 8


def _pattern(rng, kind, heads, length):
  def side():
    return int(rng.choice([0, 1, 5, 31, 64, length, length + 50]))

  ratios = tuple(int(r) for r in rng.choice([1, 2, 3, 4, 6], 2))
  segments = tuple(int(w) for w in rng.choice([6, 16, 37, 64, 150, 400], 2))
  if kind == 'causal window':
    return longjax.SlidingWindow(side(), dilation=int(rng.choice([1, 1, 3])))
  if kind == 'two-sided window':
    return longjax.SlidingWindow(side(), side(), int(rng.choice([1, 1, 4])))
  if kind == 'dilation per head':
    dilation = tuple(int(d) for d in rng.choice([1, 3], heads))
    return longjax.SlidingWindow(side(), int(rng.choice([0, 4])), dilation)
  if kind == 'dilated':
    return longjax.Dilated(segments, ratios)
  if kind == 'two-sided dilated':
    return longjax.Dilated(segments, ratios, False, offsets='torchscale')
  if kind == 'detached':
    causal = bool(rng.integers(2))
    return longjax.Dilated(segments, ratios, causal, detach_weights=True)
  if kind == 'lambda':
    return longjax.Lambda(side() + 1, int(rng.choice([0, 1, 4, 40])))
  if kind == 'self-extend':
    return longjax.SelfExtend(side() + 1, int(rng.choice([1, 3, 8])))
  return longjax.Full(causal=bool(rng.integers(2)))


PATTERNS = (
  'causal window',
  'two-sided window',
  'dilation per head',
  'dilated',
  'two-sided dilated',
  'detached',
  'lambda',
  'self-extend',
  'full',
)
POSITIONS = ('none', 'rope', 'alibi', 'xl', 'partial rope', 'xpos', 'slopes')


def _position(rng, kind, heads, span):
  return {
    'none': lambda: None,
    'rope': longjax.RoPE,
    'alibi': longjax.ALiBi,
    'partial rope': lambda: longjax.RoPE(
      base=100.0, fraction=0.5, interleaved=True
    ),
    'xpos': longjax.XPos,
    'slopes': lambda: longjax.ALiBi(
      jnp.asarray(rng.uniform(0, 0.3, heads), jnp.float32)
    ),
    'xl': lambda: transformer_xl(int(rng.integers(99)), heads, SIZE, *span),
  }[kind]()


def _segments(rng, batch, length):
  """Ids [batch, length]: packed or in any order, with padding anywhere."""
  kind = rng.choice(['packed', 'unordered', 'left', 'middle', 'right'])
  if kind == 'unordered':
    return rng.integers(-1, 4, (batch, length))
  ids = np.sort(rng.integers(0, 3, (batch, length)), axis=1)
  # Any numbers in any order will do as ids.
  ids = np.array([7, 2, 5])[ids]
  for row in ids:
    n = int(rng.integers(0, length // 2 + 1))
    start = {'left': 0, 'middle': length // 3, 'right': length - n}.get(kind, 0)
    if kind != 'packed':
      row[start : start + n] = -1
  return ids


def _places(rng, batch, length, kv_length):
  """(q_positions, kv_positions, furthest distance either way)."""
  kind = rng.choice(['zero'] * 3 + ['static', 'scalar', 'rows', 'slots'])
  far = length + kv_length
  start = int(rng.integers(0, 40))
  ahead = max(kv_length - length, 0) + start
  if kind == 'zero':
    return 0, 0, far
  if kind == 'static':
    return ahead, start, far + 40
  if kind == 'scalar':
    return np.int32(ahead), jnp.int32(start), far + 40
  if kind == 'rows':
    queries, keys = jnp.asarray(rng.integers(0, 60, (2, batch)), jnp.int32)
    return queries + kv_length // 2, keys, far + 120
  # A ring buffer: keys in any order, each at most once, some slots empty.
  room = kv_length + 20
  keys = np.stack([rng.permutation(room)[:kv_length] for _ in range(batch)])
  keys[rng.random(keys.shape) < 0.2] = -1
  queries = np.sort(rng.integers(0, room, (batch, length)), axis=1)
  if length > 1:
    queries[rng.random(queries.shape) < 0.1] = -1
  return jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32), room


def draw(number: int, *, length=None):
  """Case `number`: (inputs, pattern, options for `helpers.run`)."""
  rng = np.random.default_rng([number, 2])
  length = length or LENGTHS[(number + number // 6) % 6]
  heads, kv_heads = [(4, 4), (4, 2), (3, 1), (6, 2)][rng.integers(4)]
  kv_length = length
  if rng.random() < 0.25:
    kv_length = max(1, length + int(rng.integers(-20, 30)))
  pattern = _pattern(rng, PATTERNS[number % 9], heads, length)
  batch = 2
  dtype = rng.choice(['float32'] * 6 + ['bfloat16', 'float16'])
  options = {}

  q_positions, kv_positions, far = _places(rng, batch, length, kv_length)
  options.update(q_positions=q_positions, kv_positions=kv_positions)

  if rng.random() < 0.4:
    # Segment ids of queries and keys that are the same texts where they can.
    ids = _segments(rng, batch, max(length, kv_length))
    ids = jnp.asarray(ids, jnp.int32)
    options['segment_ids'] = (ids[:, :length], ids[:, :kv_length])
    if length == kv_length and rng.random() < 0.5:
      options['segment_ids'] = ids

  # A table that knows every distance there can be, or told (Lambda tells far
  # pairs the distance `window`).
  span = (-far, far + getattr(pattern, 'window', 0) + 1)
  kind = POSITIONS[(number + number // 7) % 7]
  if kind == 'xpos' and isinstance(pattern, longjax.SelfExtend):
    kind = 'rope'  # refused with segments
  if kind == 'xpos' and pattern.reach()[1] == np.inf:
    kind = 'rope'  # refused: any key ahead may be seen
  options['position'] = _position(rng, kind, heads, span)

  # Global keys may lie any number of positions ahead: xPos refuses.
  free = kind != 'xpos' or pattern.causal
  if rng.random() < 0.4 and free:
    tokens = rng.integers(-1, kv_length + 20, (batch, int(rng.integers(1, 6))))
    tokens[:, -1] = tokens[:, 0]
    options['global_tokens'] = jnp.asarray(tokens, jnp.int32)
  if rng.random() < 0.3:
    options['dropout_rate'] = float(rng.choice([0.1, 0.5]))
    options['dropout_key'] = jax.random.key(number)
  if rng.random() < 0.3:
    options['logit_soft_cap'] = float(rng.choice([1.5, 20.0]))
  if rng.random() < 0.3:
    options['scale'] = float(rng.choice([0.1, 0.9]))
  inputs = qkv(
    number,
    batch,
    length,
    heads,
    kv_heads,
    SIZE,
    value_size=int(rng.choice([8, 8, 5])),
    kv_length=kv_length,
    dtype=dtype,
  )
  return inputs, pattern, options
