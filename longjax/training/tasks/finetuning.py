"""What the tasks of labelled examples share: files, batches, evaluation.

arXiv 2004.05150, section 6: Longformer fine-tuned on classification and
question answering. The global tokens are those of the model's head.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.data import examples as examples_lib
from longjax.data.buckets import FILLER, BucketedBatches, bucket_of
from longjax.data.examples import Example, Fields
from longjax.training.forward import Apply
from longjax.training.metrics import track
from longjax.training.stages import Stage
from longjax.training.tasks import encoders

PREDICTIONS = 'predictions.jsonl'


@dataclasses.dataclass(frozen=True)
class Data:
  """What to read; see `longjax.data.examples`.

  Attributes:
    train, validation, test: files of JSON lines, also .xz or .gz.
    held_out: shares of the training file for validation and test, where these
      have no file.
    fields: keys of the lines.
    tokenizer: a file or folder; '' for the pretrained model's, or else a
      byte-level BPE that is trained on the training split and kept in the run.
    vocab_size: of a BPE that is trained.
    buckets: lengths to which rows are padded, besides the stage's own, which is
      the longest: what goes beyond is cut off.
    loader: 'grain', or 'numpy' where grain is not installed.
  """

  train: str = ''
  validation: str = ''
  test: str = ''
  held_out: tuple[float, float] = (0.1, 0.1)
  fields: Fields = dataclasses.field(default_factory=Fields)
  tokenizer: str = ''
  vocab_size: int = 8192
  buckets: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
  loader: str = 'grain'


@dataclasses.dataclass(frozen=True)
class Settings(encoders.Settings):
  """A run on labelled examples; see the class above."""

  data: Data = dataclasses.field(default_factory=Data)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An example as the model sees it.

  Attributes:
    example: what it was made of.
    length: tokens of its longest row.
    arrays: by name; 'tokens' among them.
    learned: whether there is something to learn from it; what was cut off
      cannot be found.
  """

  example: Example
  length: int
  arrays: Mapping[str, Any]
  learned: bool = True


class FineTuning(encoders.EncoderTask):
  """See `longjax.training.tasks.base.Task`; the rest is up to each task.

  Attributes:
    parse: of `longjax.data.examples`, makes an example of a line.
    examples: {'train': [(where it stands, example), ...], ...}.
    tokenizer: see `longjax.interop.load_tokenizer`.
    special: numbers of special tokens.
  """

  Settings = Settings
  parse: Callable
  curves = ('loss',)

  def __init__(self, settings: Settings, workdir=None):
    super().__init__(settings, workdir)
    where = settings.data
    self.examples, repeated = examples_lib.splits(
      {name: getattr(where, name) for name in examples_lib.SPLITS},
      type(self).parse,
      where.fields,
      tuple(where.held_out),
    )
    self.title = pathlib.Path(where.train).name
    counts = ', '.join(f'{len(x)} {name}' for name, x in self.examples.items())
    self.description = f'{self.title}: {counts}'
    if repeated:
      self.description += f'; {len(repeated)} lines that are there twice, once'
    self.tokenizer = encoders.find_tokenizer(
      where.tokenizer,
      settings,
      where.vocab_size,
      lambda: (
        text
        for _, example in self.examples['train']
        for text in self.texts(example)
      ),
      workdir,
    )
    self.special = encoders.special_tokens(self.tokenizer)
    self.set_sizes(self.special, self.tokenizer.vocab_size, **self.sizes())
    self._encoded = {}
    self.check()

  # What each task says.

  def texts(self, example: Example) -> Sequence[str]:
    """All of its text, to train a tokenizer on."""
    raise NotImplementedError

  def sizes(self) -> dict[str, int]:
    """Keywords of the model that follow from the examples."""
    return {}

  def check(self) -> None:
    """Refuses examples that do not fit the model."""

  def encode(self, example: Example, length: int) -> Encoded:
    """The example in `length` tokens at most."""
    raise NotImplementedError

  def collate(
    self, encoded: Sequence[Encoded | None], length: int
  ) -> dict[str, np.ndarray]:
    """Rows of equal length, 'tokens' among them; None is a row of padding."""
    raise NotImplementedError

  def outputs(self, model: nnx.Module, batch: Mapping, dropout_key=None):
    """(losses, weights of equal shape, rows of what `predict` reads)."""
    raise NotImplementedError

  def predict(self, encoded: Encoded, output) -> dict[str, Any]:
    """What a row of outputs says: JSON, 'prediction' and 'label' among it."""
    raise NotImplementedError

  def measure(self, predictions: Sequence[Mapping]) -> dict[str, Any]:
    """Figures of what `predict` returned for each example of a split."""
    raise NotImplementedError

  # What is the same for all.

  def encode_split(self, split: str, length: int) -> list[Encoded]:
    """All of a split; made once."""
    if (split, length) not in self._encoded:
      self._encoded[split, length] = [
        self.encode(example, length) for _, example in self.examples[split]
      ]
    return self._encoded[split, length]

  def make_batches(self, stage: Stage, number: int) -> BucketedBatches:
    self.check_whole_rows()
    encoded = self.encode_split('train', stage.length)
    encoded = [e for e in encoded if e.learned]
    if not encoded:
      raise ValueError(
        f'stage {number} has length {stage.length}: no example of '
        f'{len(self.examples["train"])} has its answer in so few tokens'
      )

    def collate(numbers, length):
      rows = [None if n == FILLER else encoded[n] for n in numbers]
      return self.collate(rows, length)

    ids = '\n'.join(e.example.id for e in encoded)
    return BucketedBatches(
      [e.length for e in encoded],
      collate,
      buckets=self.buckets(stage.length),
      batch_size=stage.batch_size,
      seed=self.settings.seed + number,
      process_index=self.place.row,
      process_count=self.place.rows,
      loader=self.settings.data.loader,
      identity=hashlib.sha256(ids.encode()).hexdigest(),
    )

  def buckets(self, length: int) -> tuple[int, ...]:
    """Lengths of rows where `length` is the longest."""
    shorter = {b for b in self.settings.data.buckets if b < length}
    return (*sorted(shorter), length)

  def loss(self, model: nnx.Module, batch: Mapping, dropout_key):
    losses, weights, _ = self.outputs(model, batch, dropout_key)
    weight = weights.sum()
    return (losses * weights).sum() / jnp.maximum(weight, 1), weight

  def tokens(self, batch: Mapping) -> int:
    return int((batch['tokens'] != self.special['<pad>']).sum())

  def score(
    self, apply: Apply, split: str, progress=None
  ) -> tuple[dict, list[dict]]:
    """(figures, predictions in the order of the file) of a split."""
    length = self.settings.stages[-1]['length']
    encoded = self.encode_split(split, length)
    buckets = self.buckets(length)
    bucket = bucket_of([e.length for e in encoded], buckets)
    size = self.settings.evaluation.batch_size
    batches = [
      (mine[at : at + size], edge)
      for number, edge in enumerate(buckets)
      for mine in [np.flatnonzero(bucket == number)]
      for at in range(0, len(mine), size)
    ]
    found, total, weight = [None] * len(encoded), 0.0, 0.0
    for numbers, edge in progress(batches) if progress else batches:
      rows = [encoded[n] for n in numbers] + [None] * (size - len(numbers))
      results = apply(self.outputs)(self.collate(rows, edge))
      losses, weights, outputs = jax.tree.map(np.asarray, results)
      total += float((losses * weights).sum())
      weight += float(weights.sum())
      for row, number in enumerate(numbers):
        output = jax.tree.map(lambda x, row=row: x[row], outputs)
        e = encoded[number]
        found[number] = {'id': e.example.id, **self.predict(e, output)}
    figures = {'loss': total / max(weight, 1.0), **self.measure(found)}
    return figures | {'examples': len(encoded), 'length': length}, found

  def validate(self, apply: Apply) -> dict:
    return self.score(apply, 'validation')[0]

  def test(self, apply: Apply, folder: pathlib.Path) -> dict:
    """The figures; predictions beside labels go to predictions.jsonl."""
    first = jax.process_index() == 0
    figures, found = self.score(
      apply, 'test', lambda batches: track(batches, 'test', enabled=first)
    )
    if first:
      lines = (json.dumps(line, ensure_ascii=False) for line in found)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / PREDICTIONS).write_text('\n'.join(lines) + '\n')
    train = self.encode_split('train', self.settings.stages[-1]['length'])
    return {
      **figures,
      'split': 'test',
      'data': self.title,
      'counts': {name: len(x) for name, x in self.examples.items()},
      'not_learned_from': sum(not e.learned for e in train),
    }

  def plain(self, *texts: str) -> list[list[int]]:
    """Tokens of texts, without special ones."""
    return self.tokenizer.encode_plain(texts)

  def pad(self, rows: Sequence, length: int, value: int) -> np.ndarray:
    """int32 [rows, length], filled up with `value`."""
    out = np.full((len(rows), length), value, np.int32)
    for row, values in zip(out, rows, strict=True):
      row[: len(values)] = values
    return out

  def pad_tokens(self, encoded, length: int) -> np.ndarray:
    """'tokens' of rows, padded; a row that is None is all padding."""
    rows = [() if e is None else e.arrays['tokens'] for e in encoded]
    return self.pad(rows, length, self.special['<pad>'])
