"""tiktoken's vocabularies: a small one of our own, and cl100k where it is."""

import base64
import hashlib
import os
import pathlib

import numpy as np
import pytest

from longjax import data
from longjax.data import subwords, vocabulary

openai_public = pytest.importorskip('tiktoken_ext.openai_public')

PIECES = [bytes([value]) for value in range(256)]
PIECES += [b'in', b' in', b'for', b'ex', b'index', b'\xc3\xbc', b'\n\n']


@pytest.fixture
def tiny(tmp_path, monkeypatch):
  """A file of a vocabulary that tiktoken then knows; its path."""
  lines = [
    base64.b64encode(piece) + b' %d' % rank for rank, piece in enumerate(PIECES)
  ]
  path = tmp_path / 'tiny.tiktoken'
  path.write_bytes(b'\n'.join(lines) + b'\n')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()

  def construct():
    return {
      'name': 'tiny',
      'pat_str': r' ?\w+|\s+|[^\w\s]+',
      'mergeable_ranks': openai_public.load_tiktoken_bpe(
        'https://nowhere.invalid/tiny.tiktoken', expected_hash=digest
      ),
      'special_tokens': {'<|endoftext|>': 300},
    }

  monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, 'tiny', construct)
  monkeypatch.setattr(subwords, 'NAMES', (*subwords.NAMES, 'tiny'))
  return path


def test_tokens_of_several_bytes(tiny):
  v = vocabulary.build(str(tiny), b'')
  assert (v.name, v.size, v.dtype) == ('tiny', 301, np.uint16)
  tokens = v.encode('for ü in')
  assert [PIECES[t] for t in tokens] == [b'for', b' ', b'\xc3\xbc', b' in']
  assert v.decode(tokens) == 'for ü in'.encode()
  # No text is a special token.
  assert 300 not in v.encode('<|endoftext|>')


def test_any_bytes_come_back(tiny):
  v = vocabulary.build(str(tiny), b'')
  rng = np.random.default_rng(0)
  for raw in (b'', bytes(range(256)), rng.bytes(2000), b'\xc3 for \xc3\xbc'):
    assert v.decode(v.encode(raw)) == raw
  assert [PIECES[t] for t in v.encode(b'\xc3for')] == [b'\xc3', b'for']


def test_the_library_is_left_as_it_was(tiny):
  before = openai_public.load_tiktoken_bpe
  vocabulary.build(str(tiny), b'')
  assert openai_public.load_tiktoken_bpe is before


def test_a_corpus_of_subwords(tiny, tmp_path):
  text = 'for index in\n\nfor ü in index\n' * 40
  (tmp_path / 'text.txt').write_text(text)
  corpus = data.load('text', tmp_path / 'text.txt', vocab=str(tiny))
  splits = (corpus.train, corpus.validation, corpus.test)
  assert {split.dtype for split in splits} == {np.dtype(np.uint16)}
  whole = b''.join(corpus.decode(split) for split in splits)
  assert whole == text.encode()
  assert len(corpus.train) < 0.9 * len(text.encode()) / 2
  assert corpus.vocab_size == 301


def test_as_a_tokenizer(tiny):
  from longjax.interop import load_tokenizer

  tokenizer = load_tokenizer(tiny)
  tokens = tokenizer.encode('for index')
  assert isinstance(tokens, list) and tokenizer.vocab_size == 301
  assert tokenizer.decode(tokens) == 'for index'
  # A cut character.
  assert tokenizer.decode([0xC3]) == '�'
  with pytest.raises(ValueError, match='token 301 is outside'):
    tokenizer.decode([301])


def test_no_network(tiny, monkeypatch):
  def fail(url, expected_hash=None):
    raise OSError('no route to host')

  monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', fail)
  with pytest.raises(
    ConnectionError, match=r'tiny could not be .* \(.*/tiny\.tiktoken\) instead'
  ):
    vocabulary.build('tiny', b'')


def test_wrong_files(tiny):
  with pytest.raises(FileNotFoundError, match=r'nowhere/tiny\.tiktoken does'):
    vocabulary.build('nowhere/tiny.tiktoken', b'')
  with pytest.raises(ValueError, match="none of tiktoken's cl100k_base"):
    vocabulary.build('nowhere/other.tiktoken', b'')
  tiny.write_bytes(tiny.read_bytes()[:-9])
  with pytest.raises(
    ValueError, match='is not tiny: its sha256 is .* expected'
  ):
    vocabulary.build(str(tiny), b'')
  tiny.write_bytes(b'aGk= 0\nnonsense\n')
  with pytest.raises(ValueError, match='line 2: not enough values'):
    subwords._read_ranks(pathlib.Path(tiny), None)


@pytest.mark.parametrize('token', [-1, 280, 301, 2**40])
def test_a_token_that_there_is_not(tiny, token):
  with pytest.raises(ValueError, match='is not in tiny'):
    vocabulary.build(str(tiny), b'').decode([0, token])


def test_cl100k():
  """The paper's vocabulary itself, where LONGJAX_CL100K names its file."""
  path = os.environ.get('LONGJAX_CL100K')
  if not path:
    pytest.skip('LONGJAX_CL100K names no cl100k_base.tiktoken')
  v = vocabulary.build(path, b'')
  assert (v.size, v.dtype) == (100_277, np.uint32)
  # tiktoken's own example.
  np.testing.assert_array_equal(
    v.encode('tiktoken is great!'), [83, 1609, 5963, 374, 2294, 0]
  )
  raw = np.random.default_rng(0).bytes(5000)
  assert v.decode(v.encode(raw)) == raw
