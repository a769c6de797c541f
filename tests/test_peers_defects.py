"""Defects seen in other projects, which must not happen here.

Each test is named for the number of the defect in the project's fact sheet on
its peers.
"""

import ast
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.evaluation import bits_per_character
from tests.ops.helpers import forward, qkv

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPLEMENTATIONS = ('xla', 'reference')
# Five parts and twelve heads, as the paper has; lengths made short.
LONGNET = longjax.Dilated((8, 16, 32, 64, 96), (1, 2, 4, 6, 12))


def attend(implementation, *inputs, pattern=LONGNET, **options):
  return forward(implementation, inputs, pattern, **options)[0]


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_s1_longnet_outputs_before_t_ignore_values_from_t_on(implementation):
  """A division by a sum over the sequence would let the future in."""
  q, k, v = qkv(0, 1, 96, 12)
  base = attend(implementation, q, k, v)
  changed = attend(implementation, q, k, v.at[:, 40:].add(10.0))
  np.testing.assert_array_equal(changed[:, :40], base[:, :40])
  assert np.abs(changed[:, 40:] - base[:, 40:]).max() > 1
  # Rows are weighted means, of any length of text.
  ones = attend(implementation, q, k, jnp.ones_like(v))
  np.testing.assert_allclose(ones, 1, rtol=1e-5)


def test_s2_every_head_takes_part_in_every_part_and_dropout_is_used():
  """Twelve heads cut into five slices had heads twice and heads never."""
  i = np.arange(96)
  for w, r in zip(LONGNET.segment_lengths, LONGNET.ratios, strict=True):
    part = longjax.Dilated((w,), (r,))
    pairs = [
      part.multiplicity(i[:, None], i, head, 12).sum() for head in range(12)
    ]
    assert min(pairs) > 0
    # As many pairs each, but for what the segment's length leaves over.
    assert max(pairs) <= 2 * min(pairs)
  inputs = qkv(1, 1, 96, 12)
  base = attend('xla', *inputs)
  dropped = attend(
    'xla', *inputs, dropout_rate=0.5, dropout_key=jax.random.key(0)
  )
  # In each head.
  assert (np.abs(dropped - base).max(axis=(0, 1, 3)) > 0.1).all()


def test_s3_longnet_rows_come_back_where_they_were():
  """As long as the input, and masked by keys rather than by output rows."""
  inputs = qkv(2, 1, 50, 4)
  out = attend('xla', *inputs, pattern=longjax.Dilated((50,), (4,)))
  assert out.shape == (1, 50, 4, 8)
  for head in range(4):
    rows = slice(head, None, 4)
    alone = attend(
      'xla',
      *(x[:, rows, head : head + 1] for x in inputs),
      pattern=longjax.Full(),
    )
    np.testing.assert_allclose(out[:, rows, head], alone[:, :, 0], atol=2e-6)
    assert (np.abs(out[:, rows, head]).max(axis=(0, 2)) > 0).all()
    rest = np.arange(50) % 4 != head
    np.testing.assert_array_equal(out[:, rest, head], 0)


@pytest.mark.parametrize('causal', [True, False])
def test_s5_longnet_padding_takes_no_part(causal):
  """Neither the caller's padding nor what fills a segment up."""
  pattern = longjax.Dilated((16, 64), (1, 4), causal)
  inputs = qkv(3, 2, 70, 4)  # no multiple of either segment
  ids = jnp.asarray([[0] * 70, [0] * 51 + [-1] * 19])
  base = attend('xla', *inputs, pattern=pattern, segment_ids=ids)
  noise = tuple(x.at[1, 51:].set(7.0) for x in inputs)
  other = attend('xla', *noise, pattern=pattern, segment_ids=ids)
  np.testing.assert_array_equal(other, base)
  np.testing.assert_array_equal(base[1, 51:], 0)
  # A zero key that took part would add exp(0) to the denominator.
  shorter = tuple(x[1:, :51] for x in inputs)
  alone = attend('xla', *shorter, pattern=pattern)
  np.testing.assert_allclose(base[1:, :51], alone, atol=2e-6)
  ones = attend('xla', *inputs[:2], jnp.ones_like(inputs[2]), pattern=pattern)
  np.testing.assert_allclose(ones, 1, rtol=1e-5)


def test_s5_every_import_of_the_readme_exists():
  readme = (ROOT / 'README.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
  assert blocks
  names = set()
  for node in ast.walk(ast.parse('\n'.join(blocks))):
    if isinstance(node, ast.Import):
      names |= {(alias.name, None) for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {(node.module, alias.name) for alias in node.names}
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == 'longjax':
        names.add(('longjax', node.attr))
  assert ('longjax', None) in names or any(m == 'longjax' for m, _ in names)
  for module, name in names:
    found = importlib.import_module(module)
    if name is not None and not hasattr(found, name):
      importlib.import_module(f'{module}.{name}')  # a module, or an error


def test_s6_lambda_respects_padding_and_grouped_heads():
  pattern = longjax.Lambda(12, start=4)
  q, k, v = qkv(4, 2, 40, 4, kv_heads=2)
  # Padding on the left: start keys are the text's own.
  ids = jnp.asarray([[-1] * 9 + [0] * 31, [0] * 40])
  options = dict(pattern=pattern, position=longjax.RoPE())
  base = attend('xla', q, k, v, segment_ids=ids, **options)
  noise = (x.at[0, :9].set(5.0) for x in (q, k, v))
  other = attend('xla', *noise, segment_ids=ids, **options)
  np.testing.assert_array_equal(other, base)
  alone = attend('xla', q[:1, 9:], k[:1, 9:], v[:1, 9:], **options)
  np.testing.assert_allclose(base[:1, 9:], alone, atol=2e-6)
  each = attend(
    'xla',
    q,
    jnp.repeat(k, 2, axis=2),
    jnp.repeat(v, 2, axis=2),
    segment_ids=ids,
    **options,
  )
  np.testing.assert_allclose(base, each, atol=2e-6)


def test_s6_the_lambda_cache_is_bounded_and_never_rotated_again():
  model = longjax.DecoderLM(
    11,
    1,
    16,
    2,
    num_kv_heads=1,
    patterns=longjax.Lambda(6, start=2),
    position='rope',
    rngs=nnx.Rngs(0),
  )
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 30)))
  cache = model.init_cache(2)
  graph, state = nnx.split(model)

  @jax.jit
  def step(state, token, cache):
    return nnx.merge(graph, state)(token, cache=cache)

  whole = model(tokens)
  shapes = jax.tree.map(jnp.shape, cache)
  start_keys = None
  for t in range(30):
    logits, cache = step(state, tokens[:, t : t + 1], cache)
    np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=2e-5)
    # Window and start slots, whatever the length.
    assert jax.tree.map(jnp.shape, cache) == shapes
    (layer,) = cache.layers
    assert layer.keys.shape == (2, 6 + 2, 1, 8)
    if t == 1:
      start_keys = np.asarray(layer.keys[:, :2])
    elif t > 1:
      np.testing.assert_array_equal(layer.keys[:, :2], start_keys)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_s7_a_one_sided_window_never_sees_the_other_side(implementation):
  """(L, 0) leaks no future, and (0, R) needs no causal flag."""
  q, k, v = qkv(5, 1, 40, 2)
  left, right = longjax.SlidingWindow(7, 0), longjax.SlidingWindow(0, 7)
  for pattern, sign in ((left, 1), (right, -1)):
    base = attend(implementation, q, k, v, pattern=pattern)
    other = attend(
      implementation,
      q,
      k.at[:, 20].add(5.0),
      v.at[:, 20].add(5.0),
      pattern=pattern,
    )
    changed = np.any(base != other, axis=(0, 2, 3))
    distance = sign * (np.arange(40) - 20)
    np.testing.assert_array_equal(changed, (distance >= 0) & (distance <= 7))
  # The one is the other backwards.
  mirrored = attend(
    implementation, *(x[:, ::-1] for x in (q, k, v)), pattern=right
  )
  forwards = attend(implementation, q, k, v, pattern=left)
  np.testing.assert_allclose(mirrored[:, ::-1], forwards, atol=2e-6)


def test_s12_evaluation_is_of_the_whole_text_in_bits_and_repeatable():
  """No random crops, no nats."""
  text = np.random.default_rng(0).integers(0, 8, 1001).astype(np.uint8)
  seen = []

  def score_by(losses_fn, text):
    return bits_per_character(
      losses_fn, text, vocab_size=8, length=32, stride=7, batch_size=5
    )

  def uniform(tokens, targets):
    seen.append(np.asarray(tokens))
    return np.full(targets.shape, np.log(8))

  def score():
    return score_by(uniform, text)

  result = score()
  # A uniform guess among 8 symbols is 3 bits, or 2.079 nats.
  np.testing.assert_allclose(result.bits_per_character, 3.0, rtol=1e-6)
  assert result.characters == text.size
  first = list(seen)
  seen.clear()
  assert score() == result
  for a, b in zip(first, seen, strict=True):
    np.testing.assert_array_equal(a, b)

  # Every single character counts, and as much as any other.
  def sure_of_zero(tokens, targets):
    del tokens
    return np.log(7 + np.exp(5.0)) - 5.0 * (targets == 0)

  def total(text):
    result = score_by(sure_of_zero, text)
    return result.bits_per_character * result.characters

  zeros = np.zeros(200, np.uint8)
  base = total(zeros)
  for place in (1, 31, 32, 33, 38, 39, 40, 150, 199):
    other = zeros.copy()
    other[place] = 1
    np.testing.assert_allclose(total(other) - base, 5 / np.log(2), rtol=1e-4)
