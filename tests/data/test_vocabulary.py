import numpy as np
import pytest

from longjax.data import vocabulary

EVERY_BYTE = bytes(range(256))


def test_bytes_are_their_own_tokens():
  v = vocabulary.build('bytes', b'')
  tokens = v.encode(EVERY_BYTE)
  assert (v.size, tokens.dtype) == (256, np.uint8)
  np.testing.assert_array_equal(tokens, np.arange(256))
  assert v.decode(tokens) == EVERY_BYTE


def test_a_str_is_utf8():
  v = vocabulary.build('bytes', b'')
  assert v.decode(v.encode('naïve ∑')) == 'naïve ∑'.encode()


def test_letters_are_text8s_27_symbols():
  v = vocabulary.build('letters', b'')
  assert v.size == 27
  np.testing.assert_array_equal(v.encode(b' az'), [0, 1, 26])
  assert v.decode(np.arange(27)) == b' abcdefghijklmnopqrstuvwxyz'


def test_a_symbol_outside_is_named_with_its_place():
  v = vocabulary.build('letters', b'')
  with pytest.raises(ValueError, match=r"b'Q' at byte offset 3 of a\.txt.*abc"):
    v.encode(b'no Quarter', source='a.txt')


def test_compact_holds_the_training_values_and_one_unknown():
  v = vocabulary.build('compact', b'banana')
  assert v.size == 4
  tokens = v.encode(b'abnzz')
  np.testing.assert_array_equal(tokens, [0, 1, 2, 3, 3])
  assert v.decode(tokens) == b'abn' + 2 * vocabulary.UNKNOWN_BYTE


def test_compact_of_every_byte_needs_more_than_a_byte():
  v = vocabulary.build('compact', EVERY_BYTE)
  assert (v.size, v.encode(b'x').dtype) == (257, np.uint16)
  assert v.decode(v.encode(EVERY_BYTE)) == EVERY_BYTE


@pytest.mark.parametrize('token', [-1, 27])
def test_a_token_outside_is_named(token):
  v = vocabulary.build('letters', b'')
  with pytest.raises(ValueError, match=rf'token {token} is not in \[0, 27\)'):
    v.decode([3, token])


def test_an_unknown_vocabulary_is_named():
  with pytest.raises(ValueError, match="'words' is not one of bytes, letters"):
    vocabulary.build('words', b'')
  with pytest.raises(ValueError, match='nor a path to a file such as cl100k'):
    vocabulary.check('words')
