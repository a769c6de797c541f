"""A real pretrained model in llama2.c's format, and its tokenizer."""

import lzma
import struct

import jax
import numpy as np
import pytest

import longjax
from longjax.generation.sample import sample
from longjax.interop import (
  config_of,
  load_llama2c,
  load_pretrained,
  load_tokenizer,
  save_pretrained,
)
from longjax.interop.llama2c import read_llama2c
from longjax.models import llama
from tests.interop.helpers import logits, parameters

BEGINNING = 'Once upon a time, there was a little girl named Lily.'


@pytest.fixture
def stories(shared_data):
  return shared_data / 'stories260k'


def numpy_logits(path, tokens, window=None, start=0):
  """The model's forward pass, written out: one token after the other.

  With a window L, LM-Infinite's: the last L keys and the first `start`, each
  key as it is and the query turned by min(distance, L) for it.
  """
  header, t = read_llama2c(path)
  heads, kv_heads = header['num_heads'], header['num_kv_heads']
  size = header['features'] // heads
  keys = [[] for _ in range(header['num_layers'])]
  values = [[] for _ in range(header['num_layers'])]

  def norm(x, weight):
    return weight * x / np.sqrt((x * x).mean() + 1e-5)

  def rotate(x, position):
    pair = np.arange(size // 2)
    angle = position / 10000 ** (2 * pair / size)
    a, b = x[:, 0::2], x[:, 1::2]
    y = np.empty_like(x)
    y[:, 0::2] = a * np.cos(angle) - b * np.sin(angle)
    y[:, 1::2] = a * np.sin(angle) + b * np.cos(angle)
    return y

  logits = []
  for position, token in enumerate(tokens):
    x = t['embedding'][token].astype(np.float64)
    for layer in range(header['num_layers']):
      w = {name: value[layer] for name, value in t.items() if '.' in name}
      y = norm(x, t['attention_norm'][layer])
      q = (w['attention.query'] @ y).reshape(heads, size)
      k = (w['attention.key'] @ y).reshape(kv_heads, size)
      if window is None:
        k, q = rotate(k, position), rotate(q, position)
      keys[layer].append(k)
      values[layer].append((w['attention.value'] @ y).reshape(kv_heads, size))
      k, v = np.stack(keys[layer], 1), np.stack(values[layer], 1)
      distance = position - np.arange(position + 1)
      seen = distance >= 0
      if window is not None:
        seen = (distance < window) | (np.arange(position + 1) < start)
      out = []
      for h in range(heads):
        g = h * kv_heads // heads
        query = q[h]
        if window is not None:  # one for each key
          query = rotate(
            np.tile(q[h], (position + 1, 1)),
            np.minimum(distance, window)[:, None],
          )
        s = (k[g] * query).sum(-1) / np.sqrt(size)
        p = np.where(seen, np.exp(s - s.max()), 0)
        out.append(p / p.sum() @ v[g])
      x = x + w['attention.output'] @ np.concatenate(out)
      y = norm(x, t['mlp_norm'][layer])
      gate = w['mlp.gate'] @ y
      hidden = gate / (1 + np.exp(-gate)) * (w['mlp.up'] @ y)
      x = x + w['mlp.down'] @ hidden
    logits.append(t['embedding'] @ norm(x, t['final_norm']))
  return np.stack(logits)


def test_greedy_story(stories):
  """200 greedy tokens equal those of the forward pass above."""
  path = stories / 'stories260K.bin'
  model = load_llama2c(path)
  got = sample(model, [1], 200, temperature=0)
  text = load_tokenizer(stories / 'tok512.bin').decode([1, *got])
  assert text.startswith(BEGINNING), text
  logits = numpy_logits(path, [1, *got[:-1]])
  np.testing.assert_array_equal(logits.argmax(-1), got)


def test_lm_infinite_far_past_the_window(stories):
  """Facts B11, 7, 9 and 10 on a real model: at once, in chunks of a ragged
  batch, and token by token it is the forward pass above."""
  path, window, start = stories / 'stories260K.bin', 24, 5
  model = load_llama2c(path, patterns=longjax.Lambda(window, start))
  # Prompts read in chunks of 19; then one token at a time.
  prompts = [np.arange(3, 43), [1], np.arange(300, 325)]
  count = 3 * window + start + 10 - 40
  new = sample(model, prompts, count, temperature=0, prefill_chunk=19)
  ids = np.full((3, 40 + count - 1), -1)
  tokens, wanted = np.zeros_like(ids), []
  for row, prompt in enumerate(prompts):
    text = np.concatenate([prompt, new[row, :-1]])
    tokens[row, : len(text)], ids[row, : len(text)] = text, 0
    wanted.append(numpy_logits(path, text, window, start))
    likeliest = wanted[row].argmax(-1)[len(prompt) - 1 :]
    np.testing.assert_array_equal(new[row], likeliest)
  got = logits(model, tokens, ids)
  for row, expected in enumerate(wanted):
    error = np.abs(got[row, : len(expected)] - expected).max()
    assert error < 2e-5 * np.abs(expected).max()
  # Where something is left out, the plain model says something else.
  plain = numpy_logits(path, tokens[0])
  assert np.abs(plain - wanted[0])[: window + 1].max() < 1e-9
  assert np.abs(plain - wanted[0])[window + 1 :].max() > 1


def test_reordered_for_pairs_of_halves(stories, tmp_path):
  """The same model, in the order of Hugging Face's LLaMA; also from a folder
  of its kind."""
  path = stories / 'stories260K.bin'
  tokens = np.random.default_rng(0).integers(0, 512, (1, 30))
  wanted = logits(load_llama2c(path), tokens)
  model = load_llama2c(path, interleaved=False)
  assert not model.layers[0].attention.position.interleaved
  np.testing.assert_allclose(logits(model, tokens), wanted, atol=2e-4)
  keywords, _ = read_llama2c(path)
  length = keywords.pop('max_length')
  config = config_of(llama(**keywords), max_length=length)
  assert config['max_position_embeddings'] == 512
  save_pretrained(model, tmp_path, config)
  again = parameters(load_pretrained(tmp_path))
  for name, value in parameters(model).items():
    np.testing.assert_array_equal(again[name], value)


def test_loss_on_stories(stories):
  """1.2958 nats over 60 stories, up to the trained length."""
  tokenizer = load_tokenizer(stories / 'tok512.bin')
  text = lzma.open(stories / 'tinystories_sample_2MiB.txt.xz', 'rt').read()
  texts = [t.strip() for t in text.split('<|endoftext|>') if t.strip()][:60]
  model = load_llama2c(stories / 'stories260K.bin')
  length = 512
  tokens = np.zeros((60, length), np.int32)
  real = np.zeros((60, length), bool)
  for row, story in enumerate(texts):
    ids = tokenizer.encode(story)[:length]
    tokens[row, : len(ids)], real[row, : len(ids)] = ids, True

  total = count = 0.0
  score = jax.jit(lambda t, ids: jax.nn.log_softmax(model(t, segment_ids=ids)))
  for first in range(0, 60, 20):
    rows = slice(first, first + 20)
    logp = np.asarray(score(tokens[rows], np.where(real[rows], 0, -1)))
    wanted = tokens[rows, 1:, None]
    nll = -np.take_along_axis(logp[:, :-1], wanted, -1)[..., 0]
    total += nll[real[rows, 1:]].sum()
    count += real[rows, 1:].sum()
  assert abs(total / count - 1.2958) < 0.002


def test_tokenizer(stories):
  tokenizer = load_tokenizer(stories / 'tok512.bin')
  assert tokenizer.vocab_size == 512
  text = BEGINNING + '\n"What?" — é, ☃'
  tokens = tokenizer.encode(text)
  assert tokens[0] == 1 and tokenizer.decode(tokens) == text
  assert len(tokens) < len(text)
  # The merges, done in the plain way.
  pieces = [
    number
    for character in f' {text}'
    for number in (
      [tokenizer._number[character.encode()]]
      if character.encode() in tokenizer._number
      else [byte + 3 for byte in character.encode()]
    )
  ]
  while True:
    scores = {
      i: tokenizer._scores[merged]
      for i in range(len(pieces) - 1)
      if (
        merged := tokenizer._number.get(
          tokenizer._pieces[pieces[i]] + tokenizer._pieces[pieces[i + 1]]
        )
      )
      is not None
    }
    if not scores:
      break
    i = max(scores, key=lambda i: (scores[i], -i))
    joined = tokenizer._pieces[pieces[i]] + tokenizer._pieces[pieces[i + 1]]
    pieces[i : i + 2] = [tokenizer._number[joined]]
  assert tokens[1:] == pieces
  with pytest.raises(ValueError, match='token 512 is outside'):
    tokenizer.decode([512])


def write_model(path, header=(8, 12, 1, 2, 1, 5, 4), words=0):
  path.write_bytes(struct.pack('<7i', *header) + bytes(4 * words))


def test_wrong_files(tmp_path):
  path = tmp_path / 'model.bin'
  with pytest.raises(FileNotFoundError, match='is no file'):
    load_llama2c(path)
  path.write_bytes(b'abc')
  with pytest.raises(ValueError, match='3 bytes: no header'):
    load_llama2c(path)
  write_model(path, (0x616B3432, 1, 1, 1, 1, 1, 1))
  with pytest.raises(ValueError, match='later version'):
    load_llama2c(path)
  write_model(path, (8, 12, 1, 3, 1, 5, 4))
  with pytest.raises(ValueError, match="is no llama2.c model.*'num_heads': 3"):
    load_llama2c(path)
  with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
    write_model(path)
    load_llama2c(path, dtype='int8')
  write_model(path, words=10)
  with pytest.raises(ValueError, match='68 bytes, its header says'):
    load_llama2c(path)


def test_a_read_out_of_its_own(tmp_path):
  """A negative vocabulary, in a model made here."""
  path = tmp_path / 'model.bin'
  width, hidden, vocabulary, length, size = 8, 12, 5, 4, 4
  rng = np.random.default_rng(0)
  count = vocabulary * width * 2 + 3 * width + length * size
  count += width * (2 * width + 2 * size) + 3 * width * hidden
  values = rng.normal(size=count).astype('<f4')
  header = struct.pack('<7i', width, hidden, 1, 2, 1, -vocabulary, length)
  path.write_bytes(header + values.tobytes())
  model = load_llama2c(path)
  wanted = values[-vocabulary * width :].reshape(vocabulary, width)
  np.testing.assert_array_equal(model.output[...], wanted)
