"""`load`: any of the texts, by name."""

import logging

from longjax.data import (
  corpus,
  optional,
  pg19,
  python_source,
  text,
  vocabulary,
  wikipedia,
)
from longjax.data import splits as splits_lib

NAMES = ('enwik8', 'text8', 'python_source', 'text', 'pg19')
_WIKIPEDIA = {'enwik8': wikipedia.ENWIK8, 'text8': wikipedia.TEXT8}

_log = logging.getLogger(__name__)


def load(
  name: str,
  path=None,
  *,
  vocab: str | None = None,
  data_dir=None,
  min_document_bytes: int = 0,
) -> corpus.Corpus:
  """Loads a text: tokens of its training, validation and test splits.

  | name          | without a path                    | path                |
  |---------------|-----------------------------------|---------------------|
  | enwik8, text8 | the official set, downloaded once | raw, .zip, .xz, .gz |
  | python_source | this Python's standard library    | (none)              |
  | text          | (a path is wanted)                | a file or a folder  |
  | pg19          | tensorflow-datasets' own          | .jsonl, .xz, .gz    |

  A path is read as it is, with numpy alone. The official sets are downloaded
  and prepared once by tensorflow-datasets (the extra longjax[data]) and read
  from there afterwards; so are a path's enwik8 or text8 and python_source
  when `data_dir` is given. Only the full enwik8 and text8 get their standard
  90M/5M/5M split; the description of anything else says that its figures are
  not comparable with published ones. Where several processes share a
  `data_dir`, prepare it once before starting them.

  Args:
    name: one of 'enwik8', 'text8', 'python_source', 'text', 'pg19'.
    path: a local file (or, for 'text', folder) to read instead.
    vocab: 'bytes' (256 symbols), 'letters' (space and a-z, 27 symbols),
      'compact' (the training split's byte values and one unknown symbol), or
      one of tiktoken's (`longjax.data.subwords`): 'cl100k_base', or a path to
      cl100k_base.tiktoken. None: 'letters' for text8, 'bytes' for the others.
    data_dir: where tensorflow-datasets keeps prepared sets. None: its own
      default, and only for the official sets.
    min_document_bytes: leave shorter files out, of python_source or a folder.

  Returns:
    The corpus.

  Raises:
    ValueError: an unknown name or vocabulary, a text that is empty, damaged,
      too short to split, not what it should be, or with a symbol outside the
      vocabulary.
    FileNotFoundError: no such file.
    ConnectionError: a download failed.
    ModuleNotFoundError: a package is wanted that is not installed.
  """
  if name not in NAMES:
    raise ValueError(f'data name {name!r} is not one of {", ".join(NAMES)}')
  if vocab is None:
    vocab = vocabulary.LETTERS if name == 'text8' else vocabulary.BYTES
  vocabulary.check(vocab)
  loaded = corpus.build(
    name, _read(name, path, data_dir, min_document_bytes), vocab
  )
  _log.info(
    '%s: %s; %s tokens, %d symbols',
    name,
    loaded.description,
    '/'.join(f'{len(getattr(loaded, key)):,}' for key in splits_lib.NAMES),
    loaded.vocab_size,
  )
  return loaded


def _read(name: str, path, data_dir, min_bytes) -> splits_lib.Splits:
  if name == 'python_source' and path is not None:
    raise ValueError(f"python_source takes no path ({path}); use name='text'")
  if name == 'text' and path is None:
    raise ValueError("name='text' wants a path: a text file or a folder")
  if name in ('text', 'pg19') and path is not None and data_dir is not None:
    raise ValueError(
      f'data_dir={str(data_dir)!r} has no use with the path of a {name}: it is'
      ' read as it is'
    )
  if min_bytes and (name not in ('python_source', 'text') or data_dir):
    raise ValueError(
      f'min_document_bytes={min_bytes}: only documents of python_source, or of '
      f'the folder of a text, can be left out, not of '
      + (f'data_dir={str(data_dir)!r}' if data_dir else name)
    )
  if name == 'text':
    return text.read(path, min_bytes)
  if name == 'pg19':
    return pg19.read_prepared(data_dir) if path is None else pg19.read(path)
  if data_dir is not None or (path is None and name in _WIKIPEDIA):
    purpose = f'{name} from data_dir' if data_dir else f'{name} without a path'
    optional.require('tensorflow_datasets', purpose)
    from longjax.data import builders

    return builders.load(name, path, data_dir)
  if name == 'python_source':
    return python_source.read(min_bytes)
  return wikipedia.read(_WIKIPEDIA[name], path)
