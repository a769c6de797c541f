"""What a run of summarization is asked for, and where its papers come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from longjax import interop
from longjax.data import papers
from longjax.interop import led as interop_led
from longjax.training import settings as settings_lib
from longjax.training.settings import nearest
from longjax.training.tasks.language_modelling import model_keywords

# LED's names of tokens that a tokenizer has, and theirs.
SPECIAL = {'bos_token': '<s>', 'pad_token': '<pad>', 'eos_token': '</s>'}
# What LED cannot do without.
SIZES = (
  'num_encoder_layers',
  'num_decoder_layers',
  'features',
  'num_encoder_heads',
  'num_decoder_heads',
  'max_positions',
  'max_target_positions',
)


@dataclasses.dataclass(frozen=True)
class Data:
  """What to read.

  Attributes:
    name: 'arxiv' or 'pubmed', the catalogue's scientific_papers; 'papers', a
      local file; or 'python_modules', which are on every machine.
    path: of that file, JSON lines, also .xz or .gz.
    data_dir: of the catalogue's sets; '' for its default.
    fields: the file's keys, see `longjax.data.papers.Fields`.
    held_out: shares of validation and test, but of the catalogue's.
    opening: leave out papers whose article contains so many first letters of
      the summary or the abstract; 0 keeps them.
    tokenizer: a file or folder; '' for the pretrained model's, or else a
      byte-level BPE that is trained on the training split and kept in the run.
    vocab_size: of a BPE that is trained.
    buckets: lengths to which articles are padded, besides the stage's own.
    tests: further local files to evaluate on: mappings with a 'name', a 'path'
      and 'fields'.
    loader: 'grain', or 'numpy' where grain is not installed.
  """

  name: str = 'papers'
  path: str = ''
  data_dir: str = ''
  fields: papers.Fields = dataclasses.field(default_factory=papers.Fields)
  held_out: tuple[float, float] = (0.1, 0.1)
  opening: int = 0
  tokenizer: str = ''
  vocab_size: int = 8192
  buckets: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
  tests: tuple[Mapping[str, Any], ...] = ()
  loader: str = 'grain'


@dataclasses.dataclass(frozen=True)
class Evaluation(settings_lib.Evaluation):
  """How summaries are decoded and scored.

  Attributes:
    lengths: of the input, in tokens, each evaluated on the test split; empty
      for the last stage's. The last is the one that counts.
    num_beams, max_length, min_length, length_penalty, no_repeat_ngram,
      early_stopping: of `longjax.generation.generate`.
    validation_beams: beams of validation; 1 for greedy decoding.
    validation_papers, test_papers: evaluate on so many first papers; 0 for all.
    seed: of bootstrap intervals, random sentences and exchanged papers.
  """

  lengths: tuple[int, ...] = ()
  num_beams: int = 4
  max_length: int = 512
  min_length: int = 0
  length_penalty: float = 1.0
  no_repeat_ngram: int = 3
  early_stopping: bool = False
  validation_beams: int = 1
  validation_papers: int = 0
  test_papers: int = 0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """A run of summarization.

  Attributes:
    data, evaluation: see the classes above.
    model: keyword arguments of `longjax.LED` besides vocab_size, patterns, rngs
      and special tokens; of a pretrained model those that differ.
    pretrained: a folder to begin from, see `longjax.interop.load_pretrained`.
    target_length: tokens of a summary, with <s> and </s>; what is longer is
      cut off.
    label_smoothing: e in (1 - e) -log p(y) + e mean over v of -log p(v).
  """

  task: str = 'summarization'
  data: Data = dataclasses.field(default_factory=Data)
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
  pretrained: str = ''
  target_length: int = 512
  label_smoothing: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(
        f'config.label_smoothing must lie in [0, 1), got {self.label_smoothing}'
      )


def led_keywords(settings: Settings) -> dict:
  """LED's arguments, as far as settings say them."""
  set_here = (*SPECIAL, 'decoder_start_token', 'vocab_size', 'patterns', 'rngs')
  if not settings.pretrained:
    for name in SIZES:
      if name not in settings.model:
        raise ValueError(
          f'config.model lacks the key {name}, and config.pretrained is empty'
        )
    return model_keywords(settings.model, set_here)
  given = model_keywords(settings.model, (*set_here, *SIZES))
  config = interop.read_config(settings.pretrained)
  if config.get('model_type') not in ('led', 'bart'):
    raise ValueError(
      f'{settings.pretrained} has model_type {config.get("model_type")!r}: '
      "'led' or 'bart' is needed"
    )
  return interop_led.read(config) | given


def sources(wanted: Data) -> dict[str, papers.Source]:
  """Where papers come from, by name; 'test' is the one with a training split.

  Raises:
    ValueError, FileNotFoundError, ModuleNotFoundError: what is asked for cannot
      be; see also `longjax.data.papers`.
  """
  found = {'test': _source(wanted)}
  for number, further in enumerate(wanted.tests):
    where = f'config.data.tests[{number}]'
    name, source = _further(further, where)
    if name in found:
      raise ValueError(f'{where}: a second {name!r}')
    found[name] = source
  return found


def _source(wanted: Data) -> papers.Source:
  names = ('papers', 'python_modules', *papers.CATALOGUE)
  if wanted.name not in names:
    raise ValueError(f'config.data.name {wanted.name!r} is not one of {names}')
  if wanted.name == 'papers':
    if not wanted.path:
      raise ValueError('config.data.path is empty: name a .jsonl file')
    return papers.local(wanted.path, wanted.fields, wanted.held_out)
  if wanted.path:
    raise ValueError(
      f'config.data.path={wanted.path} is of no use to {wanted.name}: the name '
      "of a file's is 'papers'"
    )
  if wanted.name == 'python_modules':
    return papers.python_modules(wanted.held_out)
  return papers.catalogue(wanted.name, wanted.data_dir or None)


def _further(wanted: Mapping, where: str) -> tuple[str, papers.Source]:
  """A file of papers to test on: (name, source)."""
  fields = wanted.get('fields', {})
  for given, known in (
    (wanted, ('name', 'path', 'fields')),
    (fields, [field.name for field in dataclasses.fields(papers.Fields)]),
  ):
    for key in given:
      if key not in known:
        raise ValueError(
          f'unknown key {key!r} in {where}: {nearest(key, known)}'
        )
  for key in ('name', 'path'):
    if not wanted.get(key):
      raise ValueError(f'{where} lacks the key {key!r}')
  if not wanted['name'].isidentifier():
    raise ValueError(f'{where}.name {wanted["name"]!r} must be a plain word')
  return wanted['name'], papers.local(
    wanted['path'], papers.Fields(**fields), (0.0, 1.0)
  )
