import pytest

from longjax.data import bpe
from longjax.interop import load_tokenizer

TEXTS = ['the cat sat on the mat\nand the dog', 'a cat, naïve — the “cat”'] * 9


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'new folder' / 'tokenizer.json'
  bpe.train(iter(TEXTS), 300, path)
  return load_tokenizer(path.parent)


@pytest.mark.parametrize(
  'text', [*TEXTS[:2], '', ' x', 'no such letters: 日本 \0']
)
def test_any_text_comes_back(tokenizer, text):
  tokens = tokenizer.encode(text)
  assert tokens[0] == 0 and tokens[-1] == 2
  assert tokenizer.decode(tokens) == text


def test_frequent_words_are_one_token(tokenizer):
  assert len(tokenizer.encode(' the cat')) == 2 + 2
  assert 261 < tokenizer.vocab_size <= 300


def test_special_tokens_have_barts_numbers(tokenizer):
  numbers = [tokenizer.token(name) for name in bpe.SPECIAL]
  assert numbers == [0, 1, 2, 3, 4]
  pair = tokenizer.encode('a', 'b')
  assert pair[0] == 0 and pair[2:4] == [2, 2] and pair[-1] == 2


def test_the_same_texts_make_the_same_file(tokenizer, tmp_path):
  paths = [tmp_path / name for name in ('a.json', 'b.json')]
  for path in paths:
    bpe.train(TEXTS, 300, path)
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_mistakes_are_named(tmp_path):
  with pytest.raises(ValueError, match='vocab_size=100 must be at least 261'):
    bpe.train(TEXTS, 100, tmp_path / 't.json')
  with pytest.raises(ValueError, match='no text to train'):
    bpe.train(['', ''], 300, tmp_path / 't.json')
  assert not list(tmp_path.iterdir())
