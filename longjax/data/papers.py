"""Papers and their summaries, and which of them to learn from.

Either the catalogue's `scientific_papers` (arXiv and PubMed, 2018), through
tensorflow-datasets, or a local file of JSON lines whose keys `Fields` names; or
Python's own modules with their docstrings, which are on every machine. A
`Source` goes through the papers of all splits as often as asked, one paper in
memory at a time.
"""

import ast
import dataclasses
import hashlib
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from longjax.data import jsonl, optional, python_source
from longjax.data.splits import NAMES

CATALOGUE = ('arxiv', 'pubmed')

# How scientific_papers marks the sentences of an abstract.
_MARKS = re.compile(r'</?S>')
_NOT_LETTERS = re.compile(r'[\W_]+')


@dataclasses.dataclass(frozen=True)
class Fields:
  """The keys of a JSON line; a text, or lists (of lists ...) of texts.

  Attributes:
    id, article, summary: these every line must have.
    abstract: where it is not the summary; '' for none. Looked at only to leave
      out papers, see `Sieve`.
    title: '' for none. A summary's first line that is the title is dropped.
  """

  id: str = 'article_id'
  article: str = 'article_text'
  summary: str = 'abstract_text'
  abstract: str = ''
  title: str = ''


class Paper(NamedTuple):
  """A paper; `abstract` is the summary itself unless it has its own field."""

  id: str
  article: str
  summary: str
  abstract: str


class Source(NamedTuple):
  """Where papers come from.

  Attributes:
    description: a sentence.
    identity: what JSON can hold and tells this source from others.
    papers: () -> iterator of (name of the split, paper).
  """

  description: str
  identity: dict
  papers: Callable[[], Iterator[tuple[str, Paper]]]


def local(path, fields: Fields, held_out: tuple[float, float]) -> Source:
  """A .jsonl file, plain, .xz, .gz or .zip.

  Args:
    path: of the file.
    fields: its keys.
    held_out: the shares of validation and test. A paper's split follows from
      the sha256 of its id alone, so it stays when papers are added.

  Raises:
    FileNotFoundError, ValueError: no such file, or shares that cannot be; in
      `papers()` also a line that is no paper, named.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no such file: {path}')
  if min(held_out) < 0 or sum(held_out) > 1:
    raise ValueError(
      f'held_out={tuple(held_out)} must be shares of validation and test'
    )
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()

  def papers():
    for where, record in jsonl.read(path):
      paper = _paper(record, fields, where)
      yield split_of(paper.id, held_out), paper

  return Source(
    f'{path.name} (sha256 {digest[:16]}), split by the hash of ids',
    {
      'sha256': digest,
      'fields': dataclasses.asdict(fields),
      'held_out': list(held_out),
    },
    papers,
  )


def catalogue(name: str, data_dir=None) -> Source:
  """scientific_papers/arxiv or /pubmed with their own splits.

  Args:
    name: 'arxiv' or 'pubmed'.
    data_dir: where tensorflow-datasets keeps its sets; None is its default.

  Raises:
    ValueError: another name.
    ModuleNotFoundError: tensorflow-datasets is not installed, or the set is
      not prepared yet and TensorFlow, with which the catalogue downloads, is
      not installed.
  """
  if name not in CATALOGUE:
    raise ValueError(
      f'scientific_papers has {" and ".join(CATALOGUE)}, not {name!r}'
    )
  name = f'scientific_papers/{name}'
  tfds = optional.require('tensorflow_datasets', f'{name} without a path')
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  if not builder.is_prepared():
    optional.require(
      'tensorflow', f"the catalogue's own download of {name}", extra='tfds'
    )
    builder.download_and_prepare()

  def papers():
    for split in NAMES:
      for number, record in enumerate(builder.as_data_source(split=split)):
        article, abstract = (
          text_of(record[key].decode(), key) for key in ('article', 'abstract')
        )
        yield split, Paper(f'{split}/{number}', article, abstract, abstract)

  return Source(
    f'{name}: the full set, its official splits',
    {'name': name, 'version': str(builder.version)},
    papers,
  )


def python_modules(held_out: tuple[float, float]) -> Source:
  """The standard library's modules; a summary is a module's docstring.

  No papers, but on every machine: for trying things out.

  Args:
    held_out: as of `local`.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  files = python_source.paths(root)
  digest = hashlib.sha256()
  for path in files:
    digest.update(path.read_bytes())

  def papers():
    for path in files:
      text = path.read_text(encoding='utf-8')
      module = ast.parse(text)
      summary = ast.get_docstring(module)
      if summary is None:
        continue
      lines, node = text.splitlines(), module.body[0]
      del lines[node.lineno - 1 : node.end_lineno]
      name = path.relative_to(root).as_posix()
      article = '\n'.join(lines).strip()
      yield (
        split_of(name, held_out),
        Paper(name, article, summary.strip(), summary),
      )

  version = f'{platform.python_implementation()} {platform.python_version()}'
  return Source(
    f"modules of {version}'s standard library and their docstrings "
    f'(sha256 {digest.hexdigest()[:16]}), split by the hash of ids',
    {'sha256': digest.hexdigest(), 'held_out': list(held_out)},
    papers,
  )


def split_of(id: str, held_out: tuple[float, float]) -> str:
  """'train', 'validation' or 'test', by the sha256 of an id."""
  digest = hashlib.sha256(id.encode()).digest()
  place = int.from_bytes(digest[:8]) / 2**64
  validation, test = held_out
  if place < test:
    return 'test'
  return 'validation' if place < test + validation else 'train'


def text_of(value, where: str) -> str:
  """A text, or (nested) lists of texts as lines, without the catalogue's marks.

  Raises:
    ValueError: anything else.
  """
  if value is None:
    return ''
  if isinstance(value, list):
    lines = (text_of(part, where) for part in value)
    return '\n'.join(line for line in lines if line)
  if not isinstance(value, str):
    raise ValueError(
      f'{where} is {type(value).__name__}: a text or lists of texts are wanted'
    )
  return _MARKS.sub('', value).strip()


def _paper(record: dict, fields: Fields, where: str) -> Paper:
  texts = {}
  for name, key in dataclasses.asdict(fields).items():
    if key and key not in record:
      raise ValueError(
        f'{where} has no {key!r} (the field {name}), but {", ".join(record)}'
      )
    texts[name] = text_of(record[key], f'{where}: {key!r}') if key else ''
  if not texts['id']:
    raise ValueError(f'{where} has an empty {fields.id!r}')
  title = texts.pop('title')
  first, _, rest = texts['summary'].partition('\n')
  if title and letters(first) == letters(title):
    texts['summary'] = rest.strip()
  if not fields.abstract:
    texts['abstract'] = texts['summary']
  return Paper(**texts)


def letters(text: str) -> str:
  """Letters and digits only, in lower case: what noise in a PDF leaves."""
  return _NOT_LETTERS.sub('', text.lower())


class Sieve:
  """Lets papers through, and counts those that it holds back, by the reason.

  Attributes:
    counts: {reason: papers}, every reason there is.
  """

  def __init__(self, opening: int = 0):
    """
    Args:
      opening: leave out papers whose article contains the first so many letters
        and digits of the summary or the abstract, as noisy extractions do; 0
        keeps them.
    """
    self._opening = opening
    self._seen = set()
    self.counts = dict.fromkeys(
      (
        'empty article',
        'empty summary or abstract',
        'same article as an earlier paper',
        'summary or abstract within the article',
      ),
      0,
    )

  def _reason(self, paper: Paper) -> str | None:
    article = letters(paper.article)
    others = [letters(paper.summary), letters(paper.abstract)]
    if not article:
      return 'empty article'
    if not all(others):
      return 'empty summary or abstract'
    digest = hashlib.sha256(article.encode()).digest()
    if digest in self._seen:
      return 'same article as an earlier paper'
    self._seen.add(digest)
    if self._opening and any(x[: self._opening] in article for x in others):
      return 'summary or abstract within the article'
    return None

  def __call__(
    self, papers: Iterable[tuple[str, Paper]]
  ) -> Iterator[tuple[str, Paper]]:
    for split, paper in papers:
      reason = self._reason(paper)
      if reason is None:
        yield split, paper
      else:
        self.counts[reason] += 1
