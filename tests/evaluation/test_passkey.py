"""Passkey retrieval: the prompts, and what counts as found."""

import re

import numpy as np
import pytest

from longjax.evaluation import passkey


class Words:
  """A tokenizer of words, each with the space before it."""

  vocab_size = 10**6

  def __init__(self):
    self._words = {}

  def encode(self, text):
    words = re.findall(r'\s*\S+', text)
    return [self._words.setdefault(w, len(self._words)) for w in words]

  def decode(self, tokens):
    words = list(self._words)
    return ''.join(words[token] for token in tokens)


@pytest.mark.parametrize('length', [120, 300, 999, 5000])
@pytest.mark.parametrize('depth', [0.0, 0.3, 1.0])
def test_prompts(length, depth):
  tokenizer = Words()
  tokens = passkey.make_prompt(tokenizer, 12345, length, depth)
  filler = len(tokenizer.encode(passkey.FILLER))
  assert length - filler < len(tokens) <= length
  text = tokenizer.decode(tokens)
  assert text.startswith(passkey.TASK) and text.endswith(passkey.QUESTION)
  assert text.count('12345') == 2
  before, after = text.split('The pass key is 12345')
  fillers = [part.count('grass') for part in (before, after)]
  assert abs(fillers[0] - depth * sum(fillers)) <= 0.5


def test_accuracy_takes_the_first_number(monkeypatch):
  tokenizer = Words()
  answers = iter((' {key}.', ' {key}1', ' 5 or {key}', ' no idea', ' is {key}'))
  asked = []

  def sample(model, prompt, num_tokens, temperature):
    assert num_tokens == passkey.NEW_TOKENS and temperature == 0
    key = re.search(r'key is (\d+)', tokenizer.decode(prompt))[1]
    asked.append(int(key))
    return tokenizer.encode(next(answers).format(key=key))

  monkeypatch.setattr(passkey, 'sample', sample)
  options = dict(length=200, depth=0.5, samples=5)
  assert passkey.accuracy(None, tokenizer, **options) == 2 / 5
  assert len(set(asked)) == 5
  assert all(1 <= key <= passkey.LARGEST for key in asked)


def test_the_picture(tmp_path):
  grid = {'512,0.1': 1.0, '512,0.9': 0.5, '1024,0.1': 0.0, '1024,0.9': 0.25}
  path = tmp_path / 'passkey.png'
  passkey.draw({'a': grid, 'b': grid}, path)
  assert path.read_bytes().startswith(b'\x89PNG')


def test_errors():
  tokenizer = Words()
  with pytest.raises(ValueError, match='has at least .* length is 20'):
    passkey.make_prompt(tokenizer, 1, 20, 0.5)
  with pytest.raises(ValueError, match=r'depth must lie in 0 ... 1, got 1\.5'):
    passkey.make_prompt(tokenizer, 1, 200, 1.5)
  with pytest.raises(ValueError, match='samples must be at least 1, got 0'):
    passkey.accuracy(
      None, tokenizer, length=200, depth=np.float64(0), samples=0
    )
