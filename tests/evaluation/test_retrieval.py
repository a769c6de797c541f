"""Retrieval: the prompts, and what counts as found."""

import json
import re

import numpy as np
import pytest

from longjax import MiddleKeys
from longjax.evaluation import retrieval


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
def test_passkey_prompts(length, depth):
  tokenizer = Words()
  question = retrieval.passkey(np.random.default_rng(0))
  tokens = retrieval.make_prompt(tokenizer, question, length, depth)
  filler = len(tokenizer.encode('The grass is green.' * 5)) + 10
  assert length - filler < len(tokens) <= length
  text = tokenizer.decode(tokens)
  (key,) = set(re.findall(r'\d+', text))
  assert text.count(key) == 2 and 1 <= int(key) < 10**7
  before, after = text.split(f'The pass key is {key}')
  fillers = [part.count('grass') for part in (before, after)]
  assert abs(fillers[0] - depth * sum(fillers)) <= 0.5
  assert question.answered(f' {key}.') and question.answered(f'It is {key}')
  for wrong in (f'{key}1', f'5 or {key}', 'no idea', ''):
    assert not question.answered(wrong)


@pytest.mark.parametrize('depth', [0.0, 0.4, 1.0])
def test_key_value_prompts(depth):
  tokenizer = Words()
  question = retrieval.key_value(np.random.default_rng(0))
  tokens = retrieval.make_prompt(tokenizer, question, 200, depth)
  assert 190 < len(tokens) <= 200
  text = tokenizer.decode(tokens)
  pairs = json.loads(text[text.index('{') : text.index('}') + 1])
  key = re.search('Key: "(.+)"', text)[1]
  place = list(pairs).index(key)
  assert abs(place - depth * (len(pairs) - 1)) <= 0.5
  assert question.answered(f' "{pairs.pop(key)}"')
  assert not any(map(question.answered, pairs.values()))


def test_accuracy_is_the_share_answered(monkeypatch):
  tokenizer = Words()
  answers = iter((' {key}.', ' {key}1', ' 5 or {key}', ' no idea', ' is {key}'))
  asked = set()

  middle = MiddleKeys(5, 4)

  def sample(model, prompt, num_tokens, temperature, middle_keys):
    assert num_tokens == 7 and temperature == 0 and middle_keys is middle
    key = re.search(r'key is (\d+)', tokenizer.decode(prompt))[1]
    asked.add(key)
    return tokenizer.encode(next(answers).format(key=key))

  monkeypatch.setattr(retrieval, 'sample', sample)
  share = retrieval.accuracy(
    None,
    tokenizer,
    retrieval.passkey,
    length=200,
    depth=0.5,
    samples=5,
    middle_keys=middle,
  )
  assert share == 2 / 5 and len(asked) == 5


def test_the_picture(tmp_path):
  grid = {'512,0.1': 1.0, '512,0.9': 0.5, '1024,0.1': 0.0, '1024,0.9': 0.25}
  path = tmp_path / 'passkey.png'
  retrieval.draw({'a': grid, 'b': grid}, path)
  assert path.read_bytes().startswith(b'\x89PNG')


def test_errors():
  tokenizer = Words()
  question = retrieval.passkey(np.random.default_rng(0))
  with pytest.raises(ValueError, match='has at least .* length is 20'):
    retrieval.make_prompt(tokenizer, question, 20, 0.5)
  with pytest.raises(ValueError, match=r'depth must lie in 0 ... 1, got 1\.5'):
    retrieval.make_prompt(tokenizer, question, 200, 1.5)
  with pytest.raises(ValueError, match='samples must be at least 1, got 0'):
    retrieval.accuracy(
      None, tokenizer, retrieval.passkey, length=200, depth=0.5, samples=0
    )
