"""Labelled examples from files of one JSON object a line.

What a line must hold depends on the task; a line that lacks it, or holds
something else, is refused by its number.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator

from longjax.data import jsonl
from longjax.data.papers import split_of

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Classified:
  """A text, or a pair of texts, and its label."""

  id: str
  text: str
  pair: str | None
  label: str | int


@dataclasses.dataclass(frozen=True)
class Question:
  """A question on a text; `answers` are (text, first character).

  No answers: the text does not answer it.
  """

  id: str
  question: str
  context: str
  answers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Tagged:
  """Words, with a tag each."""

  id: str
  words: tuple[str, ...]
  tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A question with choices, of which number `label` is right."""

  id: str
  question: str
  choices: tuple[str, ...]
  label: int


Example = Classified | Question | Tagged | Choice


class Line:
  """A line of a file, whose fields are taken out with complaints."""

  def __init__(self, where: str, record: dict):
    self.where = where
    self._record = record

  def fail(self, complaint: str):
    raise ValueError(f'{self.where}: {complaint}')

  def get(self, name: str, *kinds: type):
    """The field called so, which is one of `kinds`."""
    if name not in self._record:
      self.fail(f'there is no {name!r}, only {sorted(self._record)}')
    value = self._record[name]
    if not isinstance(value, kinds) or (
      isinstance(value, bool) and bool not in kinds
    ):
      names = ' or '.join(kind.__name__ for kind in kinds)
      self.fail(f'{name!r} is {_short(value)}, not a {names}')
    return value

  def text(self, name: str) -> str:
    """The field called so, which is a text that is not empty."""
    value = self.get(name, str)
    if not value.strip():
      self.fail(f'{name!r} is empty')
    return value

  def texts(self, name: str) -> tuple[str, ...]:
    """The field called so, which is a list of texts, at least one."""
    values = self.get(name, list)
    if not values or not all(isinstance(v, str) and v for v in values):
      self.fail(f'{name!r} is {_short(values)}, not a list of texts')
    return tuple(values)

  def id(self, name: str) -> str:
    """The field called so, or else a digest of the line."""
    if name in self._record:
      return str(self.get(name, str, int))
    text = json.dumps(self._record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _short(value) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


@dataclasses.dataclass(frozen=True)
class Fields:
  """The keys of a file; those that its task does not use do not matter.

  Attributes:
    id: of every example; where a line has none, it is a digest of the line.
    text, pair, label: of a classified text; `pair` is '' for single texts.
    question, context, answers: of a question; `answers` hold
      {'text': [...], 'answer_start': [...]} as SQuAD's in its flat form.
    words, tags: of a tagged text.
    choices: of a question with choices, besides `question` and `label`, which
      is the number of the right one.
  """

  id: str = 'id'
  text: str = 'text'
  pair: str = ''
  label: str = 'label'
  question: str = 'question'
  context: str = 'context'
  answers: str = 'answers'
  words: str = 'tokens'
  tags: str = 'tags'
  choices: str = 'choices'


def classified(line: Line, fields: Fields) -> Classified:
  return Classified(
    line.id(fields.id),
    line.text(fields.text),
    line.text(fields.pair) if fields.pair else None,
    line.get(fields.label, str, int),
  )


def question(line: Line, fields: Fields) -> Question:
  context = line.text(fields.context)
  answers = Line(line.where, line.get(fields.answers, dict))
  texts = answers.get('text', list)
  starts = answers.get('answer_start', list)
  if len(texts) != len(starts):
    line.fail(f'{len(texts)} answers have {len(starts)} starts')
  for text, start in zip(texts, starts, strict=True):
    if not isinstance(text, str) or not text.strip():
      line.fail(f'an answer is {_short(text)}, not a text')
    if not isinstance(start, int) or not (
      start >= 0 and context[start : start + len(text)] == text
    ):
      line.fail(f'the context has no {_short(text)} at character {start!r}')
  return Question(
    line.id(fields.id),
    line.text(fields.question),
    context,
    tuple(zip(texts, starts, strict=True)),
  )


def tagged(line: Line, fields: Fields) -> Tagged:
  words, tags = line.texts(fields.words), line.texts(fields.tags)
  if len(words) != len(tags):
    line.fail(f'{len(words)} words have {len(tags)} tags')
  return Tagged(line.id(fields.id), words, tags)


def choice(line: Line, fields: Fields) -> Choice:
  choices, label = line.texts(fields.choices), line.get(fields.label, int)
  if not 0 <= label < len(choices):
    line.fail(f'the label {label} is none of {len(choices)} choices, from 0')
  return Choice(line.id(fields.id), line.text(fields.question), choices, label)


def read(
  path, parse: Callable, fields: Fields, repeated: list[str]
) -> Iterator[tuple[str, Example]]:
  """(where it stands, the example) of each line of a file.

  A line without an id that is there again is the same example, and given once;
  `repeated` gets where the others stand.

  Raises:
    FileNotFoundError, ValueError: no such file, or a line that is not as it
      should be, by its number.
  """
  seen = {}
  for where, record in jsonl.read(path):
    example = parse(Line(where, record), fields)
    if example.id in seen:
      if fields.id not in record:
        repeated.append(where)
        continue
      raise ValueError(
        f'{where}: the id {example.id!r} is that of {seen[example.id]}, too'
      )
    seen[example.id] = where
    yield where, example


def splits(
  paths: dict[str, str],
  parse: Callable,
  fields: Fields,
  held_out: tuple[float, float],
) -> tuple[dict[str, list[tuple[str, Example]]], list[str]]:
  """The examples of training, validation and test; `repeated` of `read`.

  Args:
    paths: file of each split, '' for none; there must be one for 'train'.
    parse: `classified`, `question`, `tagged` or `choice`.
    fields: keys of the lines.
    held_out: the shares of 'validation' and 'test' of the training file, where
      they have no file of their own, by the sha256 of the id.

  Raises:
    ValueError: a split with no example.
  """
  if not paths['train']:
    raise ValueError('config.data.train names no file')
  if min(held_out) < 0 or sum(held_out) >= 1:
    raise ValueError(
      f'held_out={tuple(held_out)} must be shares of validation and test'
    )
  shares = tuple(
    0.0 if paths[name] else share
    for name, share in zip(SPLITS[1:], held_out, strict=True)
  )
  found, repeated = {name: [] for name in SPLITS}, []
  for where, example in read(paths['train'], parse, fields, repeated):
    found[split_of(example.id, shares)].append((where, example))
  for name in SPLITS[1:]:
    if paths[name]:
      found[name] = list(read(paths[name], parse, fields, repeated))
  for name, examples in found.items():
    if not examples:
      raise ValueError(
        f'the split {name} has no example: give config.data.{name}, or a '
        f'larger config.data.held_out than {tuple(held_out)}'
      )
  return found, repeated
