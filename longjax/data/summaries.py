"""Papers tokenized once: a folder of token files, and the texts to evaluate on.

`prepare` goes through a source of papers (`longjax.data.papers`) and writes

    about.json                  what was read, kept and held back, and how
    SPLIT.article.*             tokens, `longjax.data.ragged`
    SPLIT.summary.*
    validation.jsonl, test.jsonl    {id, article, summary}, for ROUGE

A folder that was prepared from the same source in the same way is taken as it
is; the file about.json is written last, so half a folder is none.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from longjax.data import jsonl
from longjax.data.papers import Paper, Sieve, Source
from longjax.data.ragged import Ragged, RaggedWriter
from longjax.data.splits import NAMES

ABOUT = 'about.json'
FIELDS = ('article', 'summary')
EVALUATED = ('validation', 'test')
# Papers tokenized at a time.
_AT_A_TIME = 64
# How often it is said how many.
_SAID = 10_000

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Summaries:
  """A split's papers as tokens.

  Attributes:
    article, summary: tokens of paper i, without special ones.
  """

  article: Ragged
  summary: Ragged

  def __len__(self) -> int:
    return len(self.article)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """A prepared folder.

  Attributes:
    folder: where it is.
    about: what about.json says: 'description', 'papers' by split, 'held_back'
      by reason, 'ids_sha256' by split, 'dtype', 'identity'.
    train, validation, test: the splits.
  """

  folder: pathlib.Path
  about: dict
  train: Summaries
  validation: Summaries
  test: Summaries

  def texts(self, split: str) -> list[dict]:
    """{id, article, summary} of each paper of 'validation' or 'test'."""
    return [r for _, r in jsonl.read(self.folder / f'{split}.jsonl')]

  def describe(self) -> str:
    """A sentence: the source, papers of the splits, and what is left out."""
    papers = self.about['papers']
    text = f'{self.about["description"]}: ' + ', '.join(
      f'{papers[name]:,} {name}' for name in NAMES
    )
    held_back = [f'{n} {r}' for r, n in self.about['held_back'].items() if n]
    return text + ('; left out: ' + ', '.join(held_back) if held_back else '')


def training_texts(source: Source, opening: int) -> Iterable[str]:
  """Articles and summaries of the training split, for a tokenizer."""
  for split, paper in Sieve(opening)(source.papers()):
    if split == 'train':
      yield paper.article
      yield paper.summary


def prepare(
  folder: str | os.PathLike,
  source: Source,
  *,
  opening: int,
  encode: Encode,
  vocab_size: int,
  tokenizer: str,
  needed: Sequence[str] = (),
  say: Callable[[str], None] = lambda line: None,
) -> Prepared:
  """Tokenizes a source into a folder, unless that is done already.

  Args:
    folder: made where it is missing.
    source: of papers.
    opening: of `Sieve`.
    encode: texts -> their tokens, without special ones.
    vocab_size: says in which dtype tokens are kept.
    tokenizer: tells this tokenizer from others, such as a digest.
    needed: splits that must not be empty.
    say: takes lines on how far it is.

  Raises:
    ValueError: papers that cannot be read; no papers left in a split that is
      needed; a folder that was prepared otherwise.
  """
  folder = pathlib.Path(folder)
  identity = {
    **source.identity,
    'opening': opening,
    'tokenizer': tokenizer,
    'vocab_size': vocab_size,
  }
  if (folder / ABOUT).exists():
    return load(folder, identity)
  folder.mkdir(parents=True, exist_ok=True)
  say(f'tokenizing {source.description}')
  dtype = np.min_scalar_type(vocab_size - 1)
  sieve = Sieve(opening)
  papers = dict.fromkeys(NAMES, 0)
  ids = {name: hashlib.sha256() for name in NAMES}
  with contextlib.ExitStack() as files:
    writers = {
      (name, field): files.enter_context(
        RaggedWriter(folder / f'{name}.{field}', dtype)
      )
      for name in NAMES
      for field in FIELDS
    }
    texts = {
      name: files.enter_context(
        open(folder / f'{name}.jsonl', 'w', encoding='utf-8')
      )
      for name in EVALUATED
    }
    kept = sieve(source.papers())
    while some := list(itertools.islice(kept, _AT_A_TIME)):
      for field in FIELDS:
        encoded = encode([getattr(paper, field) for _, paper in some])
        for (name, _), tokens in zip(some, encoded, strict=True):
          writers[name, field].append(tokens)
      for name, paper in some:
        papers[name] += 1
        ids[name].update(f'{paper.id}\n'.encode())
        if name in texts:
          texts[name].write(json.dumps(_text(paper)) + '\n')
        if not sum(papers.values()) % _SAID:
          say(f'tokenized {sum(papers.values()):,} papers')
  held_back = {reason: n for reason, n in sieve.counts.items() if n}
  for name in needed:
    if not papers[name]:
      raise ValueError(
        f'{source.description}: no papers are left for {name} (kept {papers}, '
        f'held back {held_back})'
      )
  about = {
    'description': source.description,
    'papers': papers,
    'held_back': sieve.counts,
    'ids_sha256': {name: digest.hexdigest() for name, digest in ids.items()},
    'dtype': dtype.name,
    'identity': identity,
  }
  scratch = folder / f'{ABOUT}.tmp'
  scratch.write_text(json.dumps(about, indent=2) + '\n')
  scratch.replace(folder / ABOUT)
  return load(folder, identity)


def load(folder: str | os.PathLike, identity: dict | None = None) -> Prepared:
  """A folder that `prepare` has made.

  Args:
    folder: where.
    identity: what it must have been prepared from; None for anything.

  Raises:
    ValueError: it was prepared from something else, named.
  """
  folder = pathlib.Path(folder)
  about = json.loads((folder / ABOUT).read_text())
  wanted = json.loads(json.dumps(identity))
  for key in wanted or ():
    if about['identity'].get(key) != wanted[key]:
      raise ValueError(
        f'{folder} was prepared with {key}={about["identity"].get(key)}, and '
        f'{key}={wanted[key]} is asked for: choose another workdir'
      )
  splits = {
    name: Summaries(
      *(Ragged(folder / f'{name}.{f}', about['dtype']) for f in FIELDS)
    )
    for name in NAMES
  }
  return Prepared(folder, about, **splits)


def _text(paper: Paper) -> dict:
  return {'id': paper.id, 'article': paper.article, 'summary': paper.summary}
