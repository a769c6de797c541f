"""tensorflow-datasets builders for enwik8, text8 and python_source.

They need no TensorFlow. A set is kept as raw bytes (array_record files of
1 MB records, in order), one version a source: `full` is the official set, a
local file or a standard library has the start of its sha256 in its config's
name, so that one text is never taken for another.

    builder = Enwik8(data_dir='...')            # downloads the official set
    builder = Enwik8(path='enwik8.first4M.xz')  # or prepares a local file
    builder.download_and_prepare()
    splits = read(builder)                      # digests are checked

Importing this module registers the names, so `tfds.builder('enwik8')` works.
"""

import abc
import hashlib

import numpy as np
import tensorflow_datasets as tfds

from longjax.data import corpus, files, python_source, wikipedia
from longjax.data import splits as splits_lib

_RECORD_BYTES = 1_000_000


class _TextBuilder(tfds.core.GeneratorBasedBuilder):
  """What the builders share: splits of raw bytes, cut into records."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, file_format='array_record', **kwargs):
    # Other formats cannot be read back without TensorFlow.
    super().__init__(file_format=file_format, **kwargs)

  @abc.abstractmethod
  def _splits(self) -> splits_lib.Splits:
    """The raw splits; called once, when the set is prepared."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {'offset': np.int64, 'text': tfds.features.Text()}
      ),
      metadata=tfds.core.MetadataDict(),
      # The records of a split are consecutive pieces of one text.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    splits = self._splits()
    self.info.metadata['description'] = splits.description
    self.info.metadata['sha256'] = corpus.digests(splits)
    return {
      name: self._generate_examples(getattr(splits, name))
      for name in splits_lib.NAMES
    }

  def _generate_examples(self, text: bytes):
    for offset in range(0, len(text), _RECORD_BYTES):
      piece = text[offset : offset + _RECORD_BYTES]
      yield offset, {'offset': offset, 'text': piece}


class _WikipediaBuilder(_TextBuilder):
  """The official set, or with `path` a local file in its place."""

  SOURCE: wikipedia.Source

  def __init__(self, *, path=None, config=None, **kwargs):
    if path is not None:
      digest = hashlib.sha256(files.read_bytes(path)).hexdigest()
      config = tfds.core.BuilderConfig(name=f'file_{digest[:16]}')
    self._path = path
    super().__init__(config=config, **kwargs)

  def _splits(self):
    if self._path is not None:
      return wikipedia.read(self.SOURCE, self._path)
    # data_path is data_dir/name/config/version.
    downloads = self.data_path.parents[2] / 'downloads' / 'longjax'
    return wikipedia.fetch(self.SOURCE, downloads)


class Enwik8(_WikipediaBuilder):
  """enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006."""

  SOURCE = wikipedia.ENWIK8
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='full')]


class Text8(_WikipediaBuilder):
  """text8: 10^8 characters, a-z and space, of cleaned English Wikipedia."""

  SOURCE = wikipedia.TEXT8
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='full')]


class PythonSource(_TextBuilder):
  """python_source: the .py files of this Python's standard library."""

  def __init__(self, *, config=None, **kwargs):
    self._read = python_source.read()
    digest = corpus.digests(self._read)['train']
    config = tfds.core.BuilderConfig(name=f'stdlib_{digest[:16]}')
    super().__init__(config=config, **kwargs)

  def _splits(self):
    return self._read


def read(builder: _TextBuilder) -> splits_lib.Splits:
  """The raw splits of a prepared set.

  Raises:
    ValueError: a split's bytes differ from those that were prepared.
  """
  splits = splits_lib.Splits(
    *(
      b''.join(record['text'] for record in builder.as_data_source(split=name))
      for name in splits_lib.NAMES
    ),
    description=builder.info.metadata['description'],
  )
  for name, found in corpus.digests(splits).items():
    expected = builder.info.metadata['sha256'][name]
    if found != expected:
      raise ValueError(
        f'{builder.data_path} is damaged: its {name} split has sha256 {found},'
        f' expected {expected}; delete the folder to prepare it again'
      )
  return splits


def load(name: str, path=None, data_dir=None) -> splits_lib.Splits:
  """Prepares the set of that name if it is not yet, and reads it."""
  builders = {'enwik8': Enwik8, 'text8': Text8, 'python_source': PythonSource}
  arguments = {} if path is None else {'path': path}
  builder = builders[name](data_dir=data_dir, **arguments)
  builder.download_and_prepare()
  return read(builder)
