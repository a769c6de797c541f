"""What travels between devices: operands of every collective, in bytes.

Names prove nothing, since compilers turn one collective into another; sizes do:
whatever it is called, no operand may hold the sequence.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longjax
from longjax.sharding import make_mesh, sharded_attention

pytestmark = pytest.mark.usefixtures('optimised')

DEVICES, SHARD, HEADS, KV_HEADS, SIZE = 8, 32, 4, 2, 8
LENGTH = DEVICES * SHARD
ROW = KV_HEADS * SIZE * 4  # bytes of one key, or one value
WIDE_ROW = HEADS * SIZE * 4  # of one per query head

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'reduce-scatter',
)
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'pred': 1}


def compiled_collectives(text):
  """(kind, bytes of its largest operand or result) of each in compiled HLO."""
  for line in text.splitlines():
    found = re.search(rf'= (.*?) ({"|".join(KINDS)})(-start)?\(', line)
    if found:
      shapes = re.findall(r'(\w+)\[([\d,]*)\]', found[1])
      yield found[2], max(_bytes(*shape) for shape in shapes)


def lowered_collectives(text):
  """The same of the StableHLO that JAX hands to the compiler."""
  names = '|'.join(kind.replace('-', '_') for kind in KINDS)
  # The types follow the operation, those of a reduction after its body.
  pattern = rf'stablehlo\.({names})"?\(.*? : \((tensor[^)]*)\) -> ([^\n]*)'
  for found in re.finditer(pattern, text, re.DOTALL):
    shapes = re.findall(r'tensor<((?:\d+x)*)(\w+)>', found[2] + found[3])
    sizes = [
      math.prod(map(int, dims.split('x')[:-1])) * _width(kind)
      for dims, kind in shapes
    ]
    yield found[1].replace('_', '-'), max(sizes)


def _width(kind):
  return max(1, int(re.sub(r'\D', '', kind)) // 8)


def _bytes(kind, dims):
  return BYTES[kind] * math.prod(int(n) for n in dims.split(',') if n)


def programs(pattern, gradient, **options):
  """The lowered and the compiled text of one layer's attention."""
  mesh = make_mesh({'seq': DEVICES})
  along = P(None, 'seq')

  def attend(q, k, v):
    return sharded_attention(
      q, k, v, pattern, axis_name='seq', position=longjax.RoPE(), **options
    )

  run = jax.shard_map(attend, mesh=mesh, in_specs=along, out_specs=along)

  def loss(q, k, v):
    return (run(q, k, v) ** 2).sum()

  def array(heads):
    return jax.ShapeDtypeStruct(
      (1, LENGTH, heads, SIZE),
      jnp.float32,
      sharding=NamedSharding(mesh, along),
    )

  function = jax.grad(loss, (0, 1, 2)) if gradient else run
  lowered = jax.jit(function).lower(
    array(HEADS), array(KV_HEADS), array(KV_HEADS)
  )
  return lowered.as_text(), lowered.compile().as_text()


GLOBALS = jnp.asarray([[0, 200, 9]])

# name -> pattern, options, what may travel at once (bytes), how many
# collectives there are forward.
CASES = {
  # One hop each for k and v, of 20 rows.
  'window': (longjax.SlidingWindow(20), {}, 20 * ROW, 2),
  # Three hops; the furthest brings 6 rows.
  'window over three shards': (longjax.SlidingWindow(70), {}, SHARD * ROW, 6),
  'two-sided': (longjax.SlidingWindow(20, 20), {}, 20 * ROW, 4),
  'dilated': (longjax.SlidingWindow(10, 0, 2), {}, 20 * ROW, 2),
  # The start keys besides.
  'lambda': (longjax.Lambda(20, 4), {}, 19 * ROW, 4),
  # k, v and whether the row is there at all.
  'globals': (
    longjax.SlidingWindow(20),
    {'global_tokens': GLOBALS},
    20 * ROW,
    5,
  ),
  'segments in a shard': (longjax.Dilated((16, 32), (1, 2)), {}, 0, 0),
  # Groups of two and of eight devices gather 32 rows for every query head.
  'LongNet': (
    longjax.Dilated((32, 64, 256), (1, 2, 8)),
    {},
    32 * WIDE_ROW,
    4,
  ),
  # Half shards are dealt out (2 each of q, k, v) and back (out), then k and v
  # hop in a loop, whose body counts once. Nobody asked for lse.
  'full': (longjax.Full(), {}, SHARD * WIDE_ROW, 10),
}


def grid():
  usual = ('lambda', 'globals', 'LongNet', 'full')
  for name in CASES:
    yield pytest.param(name, False, id=f'{name}, forward')
    marks = () if name in usual else pytest.mark.full
    yield pytest.param(name, True, id=f'{name}, gradient', marks=marks)


@pytest.mark.parametrize(('name', 'gradient'), list(grid()))
def test_nothing_larger_travels(name, gradient):
  pattern, options, limit, count = CASES[name]
  lowered, compiled = programs(pattern, gradient, **options)
  seen = {
    'lowered': list(lowered_collectives(lowered)),
    'compiled': list(compiled_collectives(compiled)),
  }
  for text, collectives in seen.items():
    for kind, size in collectives:
      assert size <= limit, (text, kind, size, limit)
  if not gradient:
    assert len(seen['lowered']) == count, seen
    # The compiler may join collectives, never add to them.
    assert len(seen['compiled']) <= count, seen
  # A device's own rows are less than what would be the sequence.
  assert limit < LENGTH * ROW


def test_the_sizes_are_read():
  """A path that does gather the sequence is caught by the same reading."""
  mesh = make_mesh({'seq': DEVICES})
  along = P(None, 'seq')

  def gather(x):
    return jax.lax.all_gather(x, 'seq', axis=1, tiled=True).sum(1)

  run = jax.jit(
    jax.shard_map(
      gather, mesh=mesh, in_specs=along, out_specs=P(), check_vma=False
    )
  )
  lowered = run.lower(jnp.zeros((1, LENGTH, KV_HEADS, SIZE)))
  whole = LENGTH * ROW
  assert [s for _, s in lowered_collectives(lowered.as_text())] == [whole]
  compiled = lowered.compile().as_text()
  assert [s for _, s in compiled_collectives(compiled)] == [whole]


def test_what_is_gathered_does_not_grow_with_the_length():
  """With ratios that grow as segments do, a pattern's bytes are constant."""
  sizes = []
  for segment, ratio in ((64, 2), (128, 4), (256, 8)):
    pattern = longjax.Dilated((segment,), (ratio,))
    lowered, _ = programs(pattern, gradient=False)
    sizes.append([size for _, size in lowered_collectives(lowered)])
  assert sizes[0] == sizes[1] == sizes[2] == [32 * WIDE_ROW] * 2
