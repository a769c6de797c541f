"""LM-Infinite on loaded models, past the first evictions.

The identities are numbered as in the project's fact sheet on the paper (B11);
`tests/ops/test_lm_infinite_identities.py` has them all for attention alone.
"""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import longjax
from longjax.generation.sample import sample
from longjax.interop import load_pretrained
from longjax.nn.cache import LAST_LIMIT
from tests.interop.helpers import compiled, golden, logits, write_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
L, G = 8, 3
PATTERN = longjax.Lambda(L, G)
LENGTH = 3 * L + G + 4
# Rows of a ragged batch; the last is the first to leave anything out.
LENGTHS = np.array([LENGTH, 2 * L + 1, L + 2])
IDS = np.where(np.arange(LENGTH) < LENGTHS[:, None], 0, -1)

# Grouped heads and scaled RoPE; partial, interleaved RoPE; ALiBi.
NAMES = ('llama_llama3', 'gptj', 'mpt')


class Loaded:
  """A golden model with LM-Infinite, and what the definition makes of it."""

  def __init__(self, folder, name):
    self.folder = folder
    write_folder(folder, golden(name))
    self.model = load_pretrained(folder, patterns=PATTERN)
    rng = np.random.default_rng(0)
    self.tokens = rng.integers(0, self.model.vocab_size, (3, LENGTH))
    self.dense = load_pretrained(
      folder, patterns=PATTERN, implementation='reference'
    )
    self.wanted = logits(self.dense, self.tokens, IDS)
    self._steps = {}

  def check(self, got):
    for row, length in enumerate(LENGTHS):
      np.testing.assert_allclose(
        got[row, :length],
        self.wanted[row, :length],
        atol=2e-5 * max(1, np.abs(self.wanted).max()),
        err_msg=f'row {row}',
      )

  def step(self, tokens, ids, cache):
    """(logits, cache) of one call, compiled once for a length of chunk."""
    tokens, ids = (np.asarray(x, np.int32) for x in (tokens, ids))
    if tokens.shape not in self._steps:

      def run(tokens, ids, cache):
        return self.model(tokens, segment_ids=ids, cache=cache)

      self._steps[tokens.shape] = compiled(run, tokens, ids, cache)
    return self._steps[tokens.shape](tokens, ids, cache)

  def stream(self, chunk):
    """(logits [3, LENGTH, vocabulary], cache) of a text read in chunks."""
    missing = [(0, 0), (0, -LENGTH % chunk)]
    tokens = np.pad(self.tokens, missing)
    ids = np.pad(IDS, missing, constant_values=-1)
    cache, out = self.model.init_cache(3), []
    assert {layer.keys.shape[1] for layer in cache.layers} == {L + G}
    for first in range(0, LENGTH, chunk):
      rows = slice(first, first + chunk)
      got, cache = self.step(tokens[:, rows], ids[:, rows], cache)
      out.append(got)
    return np.concatenate(out, axis=1), cache


@pytest.fixture(scope='module', params=NAMES)
def loaded(request, tmp_path_factory):
  return Loaded(tmp_path_factory.mktemp(request.param), request.param)


def test_b11_07_blocks_are_the_dense_definition(loaded):
  """Of a length that is no multiple of anything, in a ragged batch."""
  loaded.check(logits(loaded.model, loaded.tokens, IDS))
  # ... which leaves something out.
  full = load_pretrained(loaded.folder, patterns=longjax.Full())
  other = np.abs(logits(full, loaded.tokens, IDS) - loaded.wanted)
  assert other[0, : L + 1].max() < 1e-3 < 1e-2 < other[0, L + 1 :].max()


@pytest.mark.parametrize('chunk', [1, 5, LENGTH])
def test_b11_09_10_any_chunks_are_the_dense_definition(loaded, chunk):
  """Token by token (decoding), in chunks, at once: ragged rows, bounded."""
  got, cache = loaded.stream(chunk)
  loaded.check(got)
  np.testing.assert_array_equal(cache.lengths, LENGTHS)


def test_b11_11_a_step_at_position_2_30_is_the_same(loaded):
  """All recent positions shifted: rotations and ring go on as before."""
  _, cache = loaded.stream(1)
  token, ids = loaded.tokens[:, :1], np.zeros((3, 1))
  wanted, _ = loaded.step(token, ids, cache)
  shift = (LAST_LIMIT - 2 * LENGTH) // L * L
  moved = dataclasses.replace(
    cache,
    lengths=cache.lengths + shift,
    layers=tuple(
      dataclasses.replace(
        layer,
        positions=jnp.where(
          layer.positions < G, layer.positions, layer.positions + shift
        ),
      )
      for layer in cache.layers
    ),
  )
  assert int(moved.lengths.max()) > 2**30 - 3 * LENGTH
  got, moved = loaded.step(token, ids, moved)
  scale = max(1, np.abs(wanted).max())
  np.testing.assert_allclose(got, wanted, atol=2e-4 * scale)
  past = dataclasses.replace(moved, lengths=jnp.full(3, LAST_LIMIT, jnp.int32))
  got, _ = loaded.step(token, ids, past)
  assert np.isnan(got).all()


def test_sampling_from_ragged_prompts_is_the_dense_definition(loaded):
  """Each token is the definition's likeliest after those before it."""
  count = LENGTH - L - 2
  prompts = [
    row[:length]
    for row, length in zip(loaded.tokens, (L + 2, 2, 5), strict=True)
  ]
  new = sample(loaded.model, prompts, count, temperature=0, prefill_chunk=4)
  tokens, ids = np.zeros_like(loaded.tokens), np.full_like(IDS, -1)
  for row, prompt in enumerate(prompts):
    end = len(prompt) + count
    tokens[row, :end] = np.concatenate([prompt, new[row]])
    ids[row, :end] = 0
  wanted = logits(loaded.dense, tokens, ids)
  for row, prompt in enumerate(prompts):
    rows = slice(len(prompt) - 1, len(prompt) + count - 1)
    np.testing.assert_array_equal(wanted[row, rows].argmax(-1), new[row])


def test_the_readme_on_a_folder(tmp_path):
  """What README.md defines, called as it says."""
  write_folder(tmp_path, golden('llama_gqa'))
  symbols = 'abcdefghijklmnopqrstuvwxyz .,'
  vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  blocks = re.findall(
    r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S
  )
  (block,) = (block for block in blocks if 'def continue_far' in block)
  names = {}
  exec(compile(block, 'README.md', 'exec'), names)
  text = names['continue_far'](tmp_path, 'once upon a time')
  assert len(text) == 200 and set(text) <= set(symbols)
