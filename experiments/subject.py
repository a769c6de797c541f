"""What `measure.py` measures: a model under any pattern, its tokenizer, a text.

Three kinds of model, by what `config.model.path` is: a folder in Hugging Face's
format, a llama2.c .bin, or the workdir of a run of ours.
"""

import json
import lzma
import pathlib

import numpy as np
from ml_collections import ConfigDict

from longjax import training
from longjax.interop import load_llama2c, load_pretrained, load_tokenizer


class Subject:
  """A model and a text as a config names them.

  Args:
    config: with the parts `model` and `text` of
      `configs.common.measurements`.

  Attributes:
    tokenizer: with `encode` and `decode`; of a run of ours its vocabulary.

  Raises:
    ValueError, FileNotFoundError: a path that is empty or leads nowhere.
  """

  def __init__(self, config: ConfigDict):
    model = config.model
    if not model.path:
      raise ValueError(
        'config.model.path is empty: name a pretrained model, or the workdir '
        'of a run'
      )
    for name in ('path', 'tokenizer'):
      if model[name] and not pathlib.Path(model[name]).exists():
        raise FileNotFoundError(
          f'config.model.{name}={model[name]} does not exist'
        )
    self._config, self._path = config, pathlib.Path(model.path)
    self._run, self._corpus = None, None
    if (self._path / 'checkpoints').is_dir():
      for name in ('tokenizer', 'dtype'):
        if model[name]:
          raise ValueError(
            f'config.model.{name}={model[name]}: {self._path} is a run, which '
            'has its own'
          )
      self._run = json.loads((self._path / 'config.json').read_text())
      self._corpus = training.load(self._run, self._path).task.corpus
      self.tokenizer = _Characters(self._corpus)
    else:
      self.tokenizer = load_tokenizer(model.tokenizer or model.path)

  def load(self, pattern=None):
    """The model with a pattern in every layer; None: as it was trained."""
    if self._run:
      return training.load(self._run, self._path, patterns=pattern).model
    options = {} if pattern is None else {'patterns': pattern}
    if self._config.model.dtype:
      options['dtype'] = self._config.model.dtype
    load = load_llama2c if self._path.suffix == '.bin' else load_pretrained
    return load(self._path, **options)

  def texts(self, count: int, length: int) -> np.ndarray:
    """int32 [count, length]: one after another, or `text.stride` apart.

    Raises:
      ValueError: there are not as many tokens.
    """
    stride = self._config.text.stride
    if stride < 0:
      raise ValueError(f'config.text.stride={stride} must not be negative')
    if stride:
      rows = [self._tokens(length, stride * row) for row in range(count)]
    else:
      rows = self._tokens(count * length)
    return np.reshape(rows, (count, length))

  def _tokens(self, count, first=0):
    tokens = self.up_to(count, first)
    if len(tokens) < count:
      text = self._config.text.path or "the run's test split"
      beyond = f' from document {first} on' if first else ''
      raise ValueError(
        f'{count} tokens are needed, config.text.path={text} has '
        f'{len(tokens)}{beyond}'
      )
    return tokens

  def up_to(self, count: int, first: int = 0) -> np.ndarray:
    """`count` tokens, or all there are, of documents `first`, ... in order."""
    text = self._config.text
    if not text.path and self._corpus is not None:
      if first:
        raise ValueError(
          f'config.text.stride={text.stride}: the test split of a run is one '
          'document'
        )
      return np.asarray(self._corpus.test[:count], np.int32)
    if not text.path:
      raise ValueError('config.text.path is empty: name a text file')
    path = pathlib.Path(text.path)
    opened = lzma.open if path.suffix == '.xz' else open
    with opened(path, 'rt', encoding='utf-8') as file:
      documents = file.read().split(text.separator)
    tokens = []
    for document in [d for d in map(str.strip, documents) if d][first:]:
      tokens += self.tokenizer.encode(document)
      if len(tokens) >= count:
        break
    if not tokens and not first:
      raise ValueError(f'config.text.path={path} has no tokens')
    return np.array(tokens[:count], np.int32)

  def names(self) -> dict:
    """The config of model and text; of paths the names only.

    Where files lay is of no interest. A run adds what it says of itself.
    """
    names = {
      part: {
        key: pathlib.Path(value).name if key in ('path', 'tokenizer') else value
        for key, value in self._config[part].to_dict().items()
      }
      for part in ('model', 'text')
    }
    if self._corpus is not None:
      names['run'] = {
        'data': self._corpus.name,
        'description': self._corpus.description,
        'test_sha256': self._corpus.sha256['test'],
      }
    return names


class _Characters:
  """The vocabulary of a corpus as a tokenizer."""

  def __init__(self, corpus):
    self._corpus = corpus
    self.vocab_size = corpus.vocab_size

  def encode(self, text):
    return self._corpus.encode(text).tolist()

  def decode(self, tokens):
    return self._corpus.decode(np.asarray(tokens)).decode(errors='replace')
