"""Tokenizers against the libraries that made their files."""

import pytest
import sentencepiece
import tokenizers

from longjax.interop import load_tokenizer

TEXT = 'The pass key is 4711. Remember it. 4711 is the pass key.'


def of_bytes():
  """A tokenizers.Tokenizer of single bytes, which puts <s> first."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(['<s>'])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', tokenizer.token_to_id('<s>'))]
  )
  return tokenizer


def test_json(tmp_path):
  theirs = of_bytes()
  theirs.save(str(tmp_path / 'tokenizer.json'))
  ours = load_tokenizer(tmp_path)  # the folder's
  assert ours.vocab_size == 257
  tokens = ours.encode(TEXT)
  assert tokens == theirs.encode(TEXT).ids
  assert tokens[0] == 256 and len(tokens) == len(TEXT) + 1
  # BOS is no text.
  assert ours.decode(tokens) == TEXT
  assert ours.encode_plain([TEXT, '']) == [tokens[1:], []]
  theirs.add_special_tokens(['<pad>'])
  theirs.save(str(tmp_path / 'other.json'))
  others = load_tokenizer(tmp_path / 'other.json')
  assert ours.digest() == load_tokenizer(tmp_path).digest() != others.digest()
  for wrong in (-1, 257):
    with pytest.raises(ValueError, match=rf'token {wrong} is outside .* 256'):
      ours.decode([0, wrong])


def test_json_that_would_cut_long_texts(tmp_path):
  """Settings of the model's training, which files carry along."""
  theirs = of_bytes()
  theirs.enable_truncation(16)
  theirs.enable_padding(length=16)
  path = tmp_path / 'tokenizer.json'
  theirs.save(str(path))
  assert len(theirs.encode(TEXT).ids) == len(theirs.encode('a').ids) == 16
  ours = load_tokenizer(path)
  assert len(ours.encode(TEXT)) == len(TEXT) + 1
  assert len(ours.encode('a')) == 2


@pytest.mark.parametrize('bos', [1, -1])
def test_sentencepiece(tmp_path, bos):
  text = tmp_path / 'text.txt'
  text.write_text(
    '\n'.join(f'{TEXT} The grass is green, {n}.' for n in range(40))
  )
  sentencepiece.SentencePieceTrainer.Train(
    input=str(text),
    model_prefix=str(tmp_path / 'tokenizer'),
    vocab_size=40,
    bos_id=bos,
    eos_id=2 if bos > 0 else 1,
    minloglevel=2,
  )
  theirs = sentencepiece.SentencePieceProcessor()
  theirs.Load(str(tmp_path / 'tokenizer.model'))
  ours = load_tokenizer(tmp_path)
  assert ours.vocab_size == 40
  tokens = ours.encode(TEXT)
  assert tokens == [bos] * (bos > 0) + theirs.EncodeAsIds(TEXT)
  assert ours.decode(tokens) == TEXT
  with pytest.raises(ValueError, match='token 40 is outside'):
    ours.decode([40])


def test_wrong_files(tmp_path):
  with pytest.raises(FileNotFoundError, match='neither tokenizer.json nor'):
    load_tokenizer(tmp_path)
  with pytest.raises(FileNotFoundError, match='does not exist'):
    load_tokenizer(tmp_path / 'a.json')
  for name, message in (
    ('a.txt', 'is none of'),
    ('a.json', 'is no tokenizer.json'),
    ('a.bin', 'is no llama2.c tokenizer'),
    ('a.model', 'is no sentencepiece model'),
  ):
    (tmp_path / name).write_bytes(b'nonsense, and long enough')
    with pytest.raises(ValueError, match=message):
      load_tokenizer(tmp_path / name)
