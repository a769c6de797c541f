"""LongNet's cache: what it streams equals the dense reference, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax import DecoderLM, Dilated
from longjax.generation import sample
from longjax.nn.cache import init_layer_cache
from longjax.nn.dilated_cache import DilatedCache

HEADS, SIZE = 4, 4
PATTERNS = {
  'doubling': Dilated((4, 8, 16), (1, 2, 4)),
  # Ratios that do not divide their segments, segments that do not divide each
  # other, a ratio above the number of heads.
  'uneven': Dilated((5, 7, 13), (2, 3, 6)),
  # The same segment twice: every key counts double.
  'twice': Dilated((6, 6), (1, 1)),
}
SCHEMES = {
  'rope': longjax.RoPE(),
  'xpos': longjax.XPos(),
  'alibi': longjax.ALiBi(),
  'none': None,
}


def arrays(batch, length, kv_heads):
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    np.asarray(jax.random.normal(key, (batch, length, heads, SIZE)))
    for key, heads in zip(keys, (HEADS, kv_heads, kv_heads), strict=True)
  ]


def with_offsets(name, offsets):
  pattern = PATTERNS[name]
  return Dilated(pattern.segment_lengths, pattern.ratios, offsets=offsets)


def wanted(qkv, pattern, position):
  return np.asarray(
    longjax.attention(
      *qkv, pattern, position=position, implementation='reference'
    )
  )


def empty(pattern, batch, kv_heads, **options):
  cache = init_layer_cache(
    pattern,
    batch_size=batch,
    num_heads=HEADS,
    num_kv_heads=kv_heads,
    head_dim=SIZE,
    **options,
  )
  assert isinstance(cache, DilatedCache)
  return cache


def check_single_queries(name, offsets, kv_heads, position, **options):
  """A jitted loop over single queries, past three of the longest segments."""
  pattern = with_offsets(name, offsets)
  length = 3 * max(pattern.segment_lengths) + 2
  if 'max_length' in options:
    length = options['max_length']
  qkv = arrays(1, length, kv_heads)

  def step(cache, row):
    *one, at = row
    out, cache = cache.attend(
      *(x[None, None] for x in one),
      at[None, None],
      pattern=pattern,
      position=position,
      implementation='xla',
    )
    return cache, out[0, 0]

  @jax.jit
  def loop(cache):
    rows = *(x[0] for x in qkv), np.arange(length, dtype=np.int32)
    return jax.lax.scan(step, cache, rows)[1]

  np.testing.assert_allclose(
    loop(empty(pattern, 1, kv_heads, **options)),
    wanted(qkv, pattern, position)[0],
    atol=2e-5 if isinstance(position, longjax.XPos) else 3e-6,
  )


@pytest.mark.parametrize(
  ('name', 'offsets', 'kv_heads', 'position', 'options'),
  [
    ('uneven', 'torchscale', 2, 'alibi', {}),
    ('doubling', 'paper', 4, 'rope', {}),
    # No more than there will be: the longest segments are not kept whole.
    ('doubling', 'torchscale', 1, 'none', {'max_length': 11}),
  ],
)
def test_single_queries_equal_the_reference(
  name, offsets, kv_heads, position, options
):
  check_single_queries(name, offsets, kv_heads, SCHEMES[position], **options)


@pytest.mark.full
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('offsets', ['paper', 'torchscale'])
@pytest.mark.parametrize('position', SCHEMES)
@pytest.mark.parametrize('name', PATTERNS)
def test_single_queries_full(name, offsets, kv_heads, position):
  check_single_queries(name, offsets, kv_heads, SCHEMES[position])


def check_chunks(name, offsets, kv_heads, position, size):
  """Chunks of ragged rows, with padding before, between and after tokens."""
  pattern = with_offsets(name, offsets)
  lengths = (29, 24, 17)
  qkv = arrays(3, max(lengths), kv_heads)
  # Where each token stands among the padding: row 1 skips every fourth place.
  places = [
    np.arange(29),
    np.flatnonzero(np.arange(40) % 4 != 1)[:24],
    np.arange(17) + 9,
  ]
  total = -(-max(p[-1] + 1 for p in places) // size) * size
  positions = np.full((3, total), -1, np.int32)
  spread = [np.ones((3, total, *x.shape[2:]), np.float32) for x in qkv]
  for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
    positions[row, place] = np.arange(length)
    for new, x in zip(spread, qkv, strict=True):
      new[row, place] = x[row, :length]

  @jax.jit
  def step(cache, q, k, v, positions):
    return cache.attend(
      q,
      k,
      v,
      positions,
      pattern=pattern,
      position=position,
      implementation='xla',
    )

  cache, out = empty(pattern, 3, kv_heads), []
  for at in range(0, total, size):
    part = slice(at, at + size)
    new, cache = step(cache, *(x[:, part] for x in spread), positions[:, part])
    out.append(new)
  out = np.concatenate(out, axis=1)
  expected = wanted(qkv, pattern, position)
  for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
    np.testing.assert_allclose(
      out[row, place],
      expected[row, :length],
      atol=2e-5 if isinstance(position, longjax.XPos) else 3e-6,
      err_msg=str(row),
    )


@pytest.mark.parametrize(
  ('name', 'offsets', 'kv_heads', 'position', 'size'),
  [
    ('uneven', 'paper', 2, 'rope', 5),
    # Longer than any segment.
    ('doubling', 'torchscale', 4, 'alibi', 18),
  ],
)
def test_chunks_equal_the_reference(name, offsets, kv_heads, position, size):
  check_chunks(name, offsets, kv_heads, SCHEMES[position], size)


@pytest.mark.full
@pytest.mark.parametrize('size', [2, 4, 7, 16])
@pytest.mark.parametrize('kv_heads', [4, 1])
@pytest.mark.parametrize('offsets', ['paper', 'torchscale'])
@pytest.mark.parametrize('position', SCHEMES)
@pytest.mark.parametrize('name', PATTERNS)
def test_chunks_full(name, offsets, kv_heads, position, size):
  check_chunks(name, offsets, kv_heads, SCHEMES[position], size)


def test_what_is_kept():
  """w / r rows a head; a kv head's rows once for all heads at one offset."""
  cache = empty(PATTERNS['uneven'], 2, 1)
  shapes = [segment.keys.shape for segment in cache.segments]
  assert shapes == [(2, 2, 3, SIZE), (2, 3, 3, SIZE), (2, 4, 3, SIZE)]
  cache = empty(Dilated((8, 32), (1, 8)), 1, 2, max_length=17)
  shapes = [segment.keys.shape for segment in cache.segments]
  assert shapes == [(1, 2, 8, SIZE), (1, 4, 3, SIZE)]
  # The paper's schedule: 11,606 keys a step, of the heads that take part.
  paper = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
  cache = jax.eval_shape(lambda: empty(paper, 1, 4))
  rows = [segment.keys.shape[2] for segment in cache.segments]
  assert rows == [2048, 2048, 2048, 2731, 2731]
  # With 12 heads, 12, 6, 3, 2 and 1 of them at each position.
  thinnings = [
    jax.eval_shape(
      lambda: init_layer_cache(
        paper, batch_size=1, num_heads=12, num_kv_heads=12, head_dim=1
      )
    )
    .segments[i]
    .thinning
    for i in range(5)
  ]
  assert [x.heads_at.shape[1] for x in thinnings] == [12, 6, 3, 2, 1]


def primitives(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for parameter in equation.params.values():
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        yield from primitives(inner)


def test_a_step_costs_what_the_active_heads_see():
  """Multiplications of a step: 2 * size for each key of an active head."""
  pattern = Dilated((64, 256), (1, 4))
  cache = empty(pattern, 1, HEADS)
  q, k, v = (x[:, :1] for x in arrays(1, 1, HEADS))

  def step(q, k, v):
    return cache.attend(
      q,
      k,
      v,
      jnp.zeros((1, 1), jnp.int32),
      pattern=pattern,
      position=None,
      implementation='xla',
    )[0]

  products = 0
  for equation in primitives(jax.make_jaxpr(step)(q, k, v).jaxpr):
    if equation.primitive.name == 'dot_general':
      a, b = (x.aval for x in equation.invars)
      (contracted, _), (batch, _) = equation.params['dimension_numbers']
      shared = [a.shape[i] for i in (*contracted, *batch)]
      products += a.size * b.size // int(np.prod(shared))
  # Four heads of 64 rows, and one of the four of 256 / 4.
  assert products == 2 * SIZE * (HEADS * 64 + 1 * 64)


MODEL = dict(
  vocab_size=7,
  num_layers=1,
  features=16,
  num_heads=2,
  patterns=Dilated((4, 9), (1, 2)),
  scale_embedding=True,
  implementation='reference',
)


def test_stream_of_a_transformer_xl_model():
  """Whose distances are looked up, for the active heads only."""
  model = DecoderLM(**MODEL, position='transformer_xl', rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 23), 0, 7)
  full = jax.jit(model.__call__)(tokens)
  step = jax.jit(lambda cache, tokens: model(tokens, cache=cache))
  cache, out = model.init_cache(2), []
  assert cache.limit is None
  for first, last in [(0, 11), *((i, i + 1) for i in range(11, 23))]:
    logits, cache = step(cache, tokens[:, first:last])
    out.append(logits)
  np.testing.assert_allclose(np.concatenate(out, 1), full, atol=2e-5)


def test_sampling_equals_a_loop_that_recomputes_everything():
  """Ragged prompts in chunks, then a compiled loop, past all segments."""
  model = DecoderLM(**MODEL, rngs=nnx.Rngs(0))
  prompts = [[1, 2, 3, 4, 5, 6, 0, 3, 3, 1], [3], [5, 5, 5, 1]]
  out = sample(model, prompts, 12, temperature=0, prefill_chunk=4)

  @jax.jit
  def next_token(tokens, length):
    ids = jnp.where(jnp.arange(22) < length, 0, -1)
    return model(tokens[None], segment_ids=ids[None])[0, length - 1].argmax()

  for prompt, row in zip(prompts, out, strict=True):
    tokens = np.zeros(22, int)
    tokens[: len(prompt)] = prompt
    for step in range(12):
      length = len(prompt) + step
      tokens[length : length + 1] = token = next_token(tokens, length)
      assert token == row[step]


def test_errors():
  with pytest.raises(ValueError, match='not causal: it cannot be streamed'):
    empty(Dilated((4,), (1,), causal=False), 1, 1)
  with pytest.raises(ValueError, match='max_length must be at least 1, got 0'):
    empty(PATTERNS['twice'], 1, 1, max_length=0)
  with pytest.raises(ValueError, match='MiddleKeys go with Lambda, not with D'):
    empty(PATTERNS['twice'], 1, 1, middle=longjax.MiddleKeys())
