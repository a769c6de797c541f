"""Summaries of long papers by an encoder-decoder: the task of a run.

Longformer-Encoder-Decoder on arXiv (arXiv 2004.05150, section 7): the first
token is global, the decoder is taught with the true summary before it, and
evaluation decodes with beams and scores ROUGE.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from longjax import generation, interop
from longjax.data import bpe, summaries
from longjax.data.buckets import FILLER, BucketedBatches
from longjax.data.pairs import Pairs, Spans, Special, collate
from longjax.evaluation import rouge
from longjax.evaluation.summaries import (
  OWN,
  Outputs,
  Written,
  report,
  score,
  table,
)
from longjax.interop.tokenizers import JSONTokenizer
from longjax.models import LED
from longjax.training.forward import Apply
from longjax.training.metrics import say, track
from longjax.training.stages import Stage, make_stages
from longjax.training.state import split
from longjax.training.tasks.base import Task
from longjax.training.tasks.summarization_settings import (
  SPECIAL,
  Settings,
  led_keywords,
)
from longjax.training.tasks.summarization_settings import (
  sources as find_sources,
)

OBJECTIVES = ('summary', 'opening', 'span')
_SPECIAL_ORDER = ('bos', 'pad', 'eos', 'decoder_start')


class Summarization(Task):
  """See `longjax.training.tasks.base.Task`.

  A batch is {'tokens' [rows, source length], 'decoder_tokens' [rows, target
  length], 'labels' likewise}, int32; labels are `pad_token` where nothing is to
  be predicted, and their rows of zero labels do not count. The decoder is given
  its start token and the labels but the last (as BART is).

  A stage's objective is 'summary'; or to write again a part of each piece of
  the training articles, its 'opening', or a 'span' from anywhere in it, to be
  found by what was written before. Both teach a decoder that begins from
  nothing to read what the encoder has read.

  Attributes:
    tokenizer: see `longjax.interop.load_tokenizer`.
    prepared: the papers, a `longjax.data.summaries.Prepared`.
    tests: of the further files, by name.
  """

  Settings = Settings
  scores = ('loss', *rouge.KINDS)
  # The decoder's side is whole on all devices of a sequence.
  sequences = ('tokens',)

  def __init__(self, settings: Settings, workdir: pathlib.Path | None = None):
    super().__init__(settings, workdir)
    if workdir is None:
      raise ValueError(
        'summarization keeps its papers in a run: give a workdir'
      )
    self._keywords = led_keywords(settings)
    self._check_lengths()
    sources = find_sources(settings.data)
    self._prepare(sources, pathlib.Path(workdir))
    self._finish_keywords()
    self.title = settings.data.name
    self.description = '; tests: '.join(
      [self.prepared.describe(), *(p.describe() for p in self.tests.values())]
    )
    self._special = Special(
      *(self._keywords[f'{name}_token'] for name in _SPECIAL_ORDER)
    )
    # One object each, by which `Apply` knows what it has compiled.
    evaluation = settings.evaluation
    self._decodes = {
      beams: functools.partial(self._decode, beams=beams)
      for beams in (evaluation.num_beams, evaluation.validation_beams)
    }

  # Model.

  def _finish_keywords(self):
    """The vocabulary and special tokens: the tokenizer's, or they must fit."""
    size = self.tokenizer.vocab_size
    numbers = {k: self.tokenizer.token(name) for k, name in SPECIAL.items()}
    if self.settings.pretrained:
      for name, number in numbers.items():
        if self._keywords[name] != number:
          raise ValueError(
            f'the tokenizer has {SPECIAL[name]} as {number}, the model '
            f'{self.settings.pretrained} has {self._keywords[name]}'
          )
      if size > self._keywords['vocab_size']:
        raise ValueError(
          f'the tokenizer has {size} tokens, the model '
          f'{self.settings.pretrained} {self._keywords["vocab_size"]}'
        )
      return
    self._keywords |= {'vocab_size': size, **numbers}
    self._keywords['decoder_start_token'] = numbers['eos_token']

  def _check_lengths(self):
    evaluation = self.settings.evaluation
    longest = self._keywords['max_positions']
    targets = self._keywords['max_target_positions']
    asked = [
      *(('config.evaluation.lengths', n, longest) for n in evaluation.lengths),
      # The last token is never read.
      ('config.evaluation.max_length', evaluation.max_length, targets + 1),
      ('config.target_length', self.settings.target_length, targets),
    ]
    for number, stage in enumerate(make_stages(self.settings.stages)):
      if stage.objective not in (None, *OBJECTIVES):
        raise ValueError(
          f'stage {number}: objective {stage.objective!r} is not one of '
          f'{OBJECTIVES}'
        )
      asked.append((f'stage {number}: length', stage.length, longest))
      if stage.target_length is not None:
        name = f'stage {number}: target_length'
        asked.append((name, stage.target_length, targets))
    for name, length, limit in asked:
      if not 3 <= length <= limit:
        raise ValueError(
          f'{name} {length} must lie in 3 ... {limit}: <s>, a token and </s>, '
          'and no more than the positions of the model'
        )

  def make_model(
    self, stage: Stage, rngs: nnx.Rngs, patterns=None
  ) -> nnx.Module:
    """An LED; a stage's windows count keys on either side."""
    if patterns is None and stage.windows is None:
      patterns = self._keywords.get('patterns')
    if patterns is None:
      layers = self._keywords['num_encoder_layers']
      patterns = stage.layer_patterns('sliding_window', layers, causal=False)
    return LED(**self._keywords | {'patterns': patterns}, rngs=rngs)

  def pretrained(self) -> dict[str, Any]:
    folder = self.settings.pretrained
    if not folder:
      return {}
    model = interop.load_pretrained(folder, dtype='float32')
    return split(model)[1]

  # Data.

  def _prepare(self, sources, workdir):
    """Trains the tokenizer and tokenizes: once in a run, in one process."""
    wanted = self.settings.data
    trained = workdir / 'tokenizer' / 'tokenizer.json'
    place = wanted.tokenizer or self.settings.pretrained

    needed = ['train', 'test']
    if self.settings.evaluation.every:
      needed.append('validation')

    def prepare():
      if not place and not trained.exists():
        say(f'training a byte-level BPE of {wanted.vocab_size} tokens')
        texts = summaries.training_texts(sources['test'], wanted.opening)
        bpe.train(texts, wanted.vocab_size, trained)
      self.tokenizer = interop.load_tokenizer(place or trained)
      if not isinstance(self.tokenizer, JSONTokenizer):
        raise ValueError(
          f'{place} is no tokenizer.json, nor vocab.json with merges.txt'
        )
      return {
        name: summaries.prepare(
          workdir / 'papers' / name,
          source,
          opening=wanted.opening if name == 'test' else 0,
          encode=self.tokenizer.encode_plain,
          vocab_size=self.tokenizer.vocab_size,
          tokenizer=self.tokenizer.digest(),
          needed=needed if name == 'test' else ('test',),
          say=say,
        )
        for name, source in sources.items()
      }

    if jax.process_index() == 0:
      self.tests = prepare()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('papers are prepared')
      self.tests = prepare()
    self.prepared = self.tests.pop('test')

  def make_batches(self, stage: Stage, number: int) -> BucketedBatches:
    """Every article once in an epoch, by length, cut off at stage.length.

    Raises:
      ValueError: sequences are to be split over processes.
    """
    self.check_whole_rows()
    objective = stage.objective or 'summary'
    target_length = stage.target_length or self.settings.target_length
    train = self.prepared.train
    if objective == 'summary':
      pairs = Pairs(train.article, train.summary)
    else:
      pairs = Spans(
        train.article,
        stage.length - 2,
        target_length - 2,
        seed=self.settings.seed if objective == 'span' else None,
      )
    return self._batches(
      pairs,
      stage.length,
      target_length,
      batch_size=stage.batch_size,
      seed=self.settings.seed + number,
      process_index=self.place.row,
      process_count=self.place.rows,
      loader=self.settings.data.loader,
      identity=[
        self.prepared.about['ids_sha256']['train'],
        self.tokenizer.digest(),
        objective,
        target_length,
      ],
    )

  def _batches(self, pairs, length, target_length, *, rows=False, **options):
    def make(numbers, bucket):
      batch = collate(pairs, numbers, bucket, target_length, self._special)
      return batch | {'rows': numbers} if rows else batch

    shorter = [n for n in self.settings.data.buckets if n < length]
    return BucketedBatches(
      np.minimum(pairs.lengths + 2, length),
      make,
      buckets=(*shorter, length),
      **options,
    )

  # Training.

  def loss(self, model: nnx.Module, batch: Mapping, dropout_key):
    """Mean over the labels, smoothed; weighs as many as there are."""
    losses, real = self._label_losses(
      model, batch, dropout_key, self.settings.label_smoothing
    )
    weight = real.sum()
    return losses.sum() / jnp.maximum(weight, 1), weight

  def _label_losses(self, model, batch, dropout_key=None, smoothing=0.0):
    """(loss of each label, whether it counts), [rows, target length]."""
    logits = model(
      batch['tokens'], batch['decoder_tokens'], dropout_key=dropout_key
    )
    labels = batch['labels']
    log_p = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    if smoothing:
      losses = (1 - smoothing) * losses - smoothing * log_p.mean(axis=-1)
    real = labels != self._special.pad
    return jnp.where(real, losses, 0.0), real

  def tokens(self, batch: Mapping) -> int:
    """Of both sides, without padding."""
    return sum(
      int((batch[name] != self._special.pad).sum())
      for name in ('tokens', 'labels')
    )

  # Evaluation.

  def _sums(self, model, batch):
    losses, real = self._label_losses(model, batch)
    return losses.sum(axis=1), real.sum(axis=1)

  def _decode(self, model, tokens, *, beams):
    wanted = self.settings.evaluation
    texts, _ = generation.decode(
      model,
      tokens,
      num_beams=beams,
      max_length=wanted.max_length,
      min_length=wanted.min_length,
      length_penalty=wanted.length_penalty,
      no_repeat_ngram=wanted.no_repeat_ngram,
      early_stopping=wanted.early_stopping,
    )
    return texts

  def _write(
    self, apply: Apply, pairs: Pairs, length: int, beams: int, what: str
  ) -> Written:
    """The model's summaries of sources cut off at `length`, and its loss."""
    batches = self._batches(
      pairs,
      length,
      self.settings.target_length,
      rows=True,
      batch_size=self.settings.evaluation.batch_size,
      seed=0,
      shuffle=False,
      loader='numpy',
    )
    texts = [''] * len(pairs.lengths)
    total = count = 0
    for _ in track(
      range(batches.batches_per_epoch),
      f'{what}, {length} tokens',
      enabled=jax.process_index() == 0,
    ):
      batch = next(batches)
      rows = batch.pop('rows')
      sums, counts = apply(self._sums)(batch)
      total, count = total + float(sums.sum()), count + int(counts.sum())
      written = np.asarray(apply(self._decodes[beams])(batch['tokens']))
      for row, tokens in zip(rows, written, strict=True):
        if row != FILLER:
          texts[row] = self._text(tokens)
    return Written(texts, total / count)

  def _text(self, tokens) -> str:
    # A model's vocabulary may be filled up beyond its tokenizer's.
    known = tokens[tokens < self.tokenizer.vocab_size]
    return self.tokenizer.decode(known).strip()

  def _lengths(self):
    last = make_stages(self.settings.stages)[-1].length
    return tuple(sorted(self.settings.evaluation.lengths)) or (last,)

  def validate(self, apply: Apply) -> dict[str, Any]:
    """Loss and ROUGE of the validation split, at the last length."""
    wanted = self.settings.evaluation
    split = self.prepared.validation
    pairs = Pairs(split.article, split.summary, count=wanted.validation_papers)
    written = self._write(
      apply,
      pairs,
      self._lengths()[-1],
      wanted.validation_beams,
      'validation',
    )
    papers = self.prepared.texts('validation')[: len(pairs.lengths)]
    scores = rouge.scores(
      written.predictions, [paper['summary'] for paper in papers]
    )
    means = {kind: float(values.mean()) for kind, values in scores.items()}
    return {'loss': written.loss, **means}

  def test(self, apply: Apply, folder: pathlib.Path) -> dict[str, Any]:
    """Every set of papers beside the baselines; see `evaluation.summaries`.

    The test split at every length, further files at the last one; each also
    with the papers' texts exchanged among them.
    """
    wanted, lengths = self.settings.evaluation, self._lengths()
    sets = {}
    for name, prepared in {'test': self.prepared, **self.tests}.items():
      sets[name] = self._outputs(
        apply, prepared, name, lengths if name == 'test' else lengths[-1:]
      )
    decoding = {
      key: value
      for key, value in dataclasses.asdict(wanted).items()
      if not key.startswith('validation') and key not in ('every', 'batch_size')
    }
    about = {
      'data': self.settings.data.name,
      'description': self.description,
      'split_sha256': self.prepared.about['ids_sha256']['test'],
      'decoding': decoding,
    }
    if jax.process_index() == 0:
      results = report(sets, folder, seed=wanted.seed, about=about)
      say(table(results))
    else:
      results = score(sets, seed=wanted.seed)
    own = next(
      row
      for row in reversed(results['test']['systems'])
      if row['system'] == OWN
    )
    return {
      'loss': own['loss'],
      **{kind: own[kind]['mean'] for kind in rouge.KINDS},
      **about,
      'sets': results,
    }

  def _outputs(self, apply, prepared, name, lengths) -> Outputs:
    wanted, split = self.settings.evaluation, prepared.test
    pairs = Pairs(split.article, split.summary, count=wanted.test_papers)
    count = len(pairs.lengths)

    def write(pairs, length, what=name):
      return self._write(apply, pairs, length, wanted.num_beams, what)

    own = {length: write(pairs, length) for length in lengths}
    others = another = None
    if count > 1:
      others = rouge.derangement(count, wanted.seed)
      exchanged = Pairs(split.article, split.summary, others)
      another = write(exchanged, lengths[-1], f'{name}, exchanged')
    return Outputs(
      prepared.describe(), prepared.texts('test')[:count], own, others, another
    )
