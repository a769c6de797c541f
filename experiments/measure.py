"""Measures a model far beyond its trained length (LM-Infinite).

Run by `main.py --mode=measure` with one of configs/*lm_infinite_*.py. The model
(a folder in Hugging Face's format, a llama2.c .bin, or the workdir of a run of
ours) is measured as it is and with each variant of its attention; nothing is
trained. The workdir gets

  loss_by_position.json, .png   figures 3 to 5: nats by position in long texts;
                                table 1: perplexity at milestones
  streaming.json, .png          figure 4: one text without end, by chunks
  passkey.json, .png            table 2: a number hidden in a text, asked for
  key_value.json, .png          the same with one of many pairs
  overlap.json, .png            table 3: continuations after milestones

Measurements that are finished are kept, and not done again; `streaming`, which
may take days, goes on where it was.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import longjax
from experiments import stamp
from experiments.subject import Subject
from longjax.evaluation import length as evaluation
from longjax.evaluation import overlap, retrieval
from longjax.ops.middle import MiddleKeys
from longjax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Afresh:
  """In place of a pattern: the plain model, begun anew every `stride` tokens.

  Each time it reads the trained length, of which the last `stride` are scored.
  """

  stride: int


def variants(length: int, start: int) -> dict:
  """{label: pattern, or Afresh} for a model trained at `length`."""
  return {
    'vanilla': longjax.Full(),
    'window only': longjax.SlidingWindow(length - 1),
    'mask only': longjax.Lambda(length, start, ceiling=False),
    'ceiling only': longjax.DistanceCeiling(length),
    'LM-Infinite': longjax.Lambda(length, start),
    'StreamingLLM': longjax.AttentionSinks(length - start, start),
    # Tells up to length // 2 as it is, and eight times that by groups.
    'Self-Extend': longjax.SelfExtend(length // 2, 8),
    'truncation': Afresh(max(length // 2, 1)),
    # Each token is scored once, with 0 to length - 1 tokens before it.
    'independent blocks': Afresh(length),
  }


def measure(config: ConfigDict, workdir: str) -> dict:
  """Does what the config asks for; returns the means, by measurement.

  Raises:
    ValueError, FileNotFoundError: a path or number that cannot be; before
      anything is computed where that can be seen.
  """
  run = _Run(config, pathlib.Path(workdir))
  asked = {
    run.loss_by_position: config.loss_by_position.length,
    run.streaming: config.streaming.length,
    run.passkey: config.passkey.samples,
    run.key_value: config.key_value.samples,
    run.overlap: config.overlap.documents,
  }
  return {done.__name__: done() for done, size in asked.items() if size}


class _Run:
  """One model and text, and where results go."""

  def __init__(self, config, workdir):
    model = config.model
    self.config, self.workdir = config, workdir
    if not 0 <= model.start < model.trained_length:
      raise ValueError(
        f'config.model.start={model.start} must lie in 0 ... '
        f'{model.trained_length - 1} (below the trained length)'
      )
    known = variants(model.trained_length, model.start)
    if unknown := set(config.variants) - set(known):
      raise ValueError(
        f'config.variants {sorted(unknown)} are not in {list(known)}'
      )
    self.known = known
    self.variants = {label: known[label] for label in config.variants}
    self.subject = Subject(config)
    self._models = {}
    # Of the code that runs: the repository may move on meanwhile.
    self._stamp = stamp.stamp(stamp.command('experiments.main'))
    workdir.mkdir(parents=True, exist_ok=True)

  def model(self, label):
    # One at a time: a real model fills the memory.
    if label not in self._models:
      pattern = self.known[label]
      if isinstance(pattern, Afresh):
        pattern = longjax.Full()
      self._models.clear()
      self._models[label] = self.subject.load(pattern)
    return self._models[label]

  def patterns(self):
    """The labels of variants that can read a prompt and go on."""
    return [k for k, v in self.variants.items() if not isinstance(v, Afresh)]

  def finished(self, name) -> dict:
    """{label: result} of an earlier run of this very measurement."""
    path = self.workdir / f'{name}.json'
    if not path.exists():
      return {}
    record = json.loads(path.read_text())
    if record['settings'] != self._settings(name):
      raise ValueError(
        f'{path} was measured with other settings: choose another workdir'
      )
    return record['results']

  def _settings(self, name):
    asked = {**self.subject.names(), name: self.config[name].to_dict()}
    # Tuples become lists, as in what is read.
    return json.loads(json.dumps(asked))

  def write(self, name, results):
    record = {
      'settings': self._settings(name),
      **self._stamp,
      'results': results,
    }
    path = self.workdir / f'{name}.json'
    path.with_suffix('.tmp').write_text(json.dumps(record, indent=2) + '\n')
    path.with_suffix('.tmp').replace(path)

  # The measurements.

  def loss_by_position(self):
    """Figures 3 to 5: mean nats by position, over `documents` texts."""
    settings = self.config.loss_by_position
    trained = self.config.model.trained_length
    length, documents = settings.length, settings.documents
    if length <= trained:
      raise ValueError(
        f'config.loss_by_position.length={length} must exceed the trained '
        f'length {trained}'
      )
    texts = self.subject.texts(documents, length)
    results = self.finished('loss_by_position')
    for label in self.variants:
      if label in results:
        continue
      started = time.perf_counter()
      losses = self._losses(label, texts, settings.chunk)
      curve = evaluation.loss_by_position(losses, _edges(trained, length))
      results[label] = {
        'pattern': str(self.variants[label]),
        'beyond_trained_length': float(
          losses[:, trained:].mean(dtype=np.float64)
        ),
        'beyond_by_document': [
          float(row[trained:].mean(dtype=np.float64)) for row in losses
        ],
        'octaves': _octaves_of(losses, trained),
        'perplexity_at': evaluation.perplexity_at(
          losses, _doublings(trained, length), max(trained // 4, 1)
        ),
        'seconds': time.perf_counter() - started,
        **vars(curve),
      }
      self.write('loss_by_position', results)
    fields = ('edges', 'mean', 'low', 'high', 'documents')
    curves = {
      label: evaluation.LossByPosition(*(result[f] for f in fields))
      for label, result in results.items()
    }
    evaluation.draw(
      curves,
      self.workdir / 'loss_by_position.png',
      trained_length=trained,
      title=f'{pathlib.Path(self.config.model.path).stem}, {documents} text'
      + 's' * (documents > 1),
      limit=min(min(curve.mean) for curve in curves.values()) + 3,
    )
    return {k: r['beyond_trained_length'] for k, r in results.items()}

  def _losses(self, label, texts, chunk):
    model, trained = self.model(label), self.config.model.trained_length
    variant = self.variants[label]
    if isinstance(variant, Afresh):
      return evaluation.truncated_losses(
        model, texts, length=trained, stride=variant.stride
      )
    count = -(-(texts.shape[1] - 1) // chunk)
    # One text at a time: vanilla attention to all of it needs the memory.
    return np.concatenate(
      [
        evaluation.streamed_losses(
          model,
          row[None],
          chunk=chunk,
          progress=lambda chunks: tqdm(
            chunks, desc=label, total=count, unit='chunk'
          ),
        )
        for row in texts
      ]
    )

  def streaming(self):
    """Figure 4: loss, time and memory along one text, with LM-Infinite."""
    label = 'LM-Infinite'
    results = self.finished('streaming')
    if not results.get(label, {}).get('finished'):
      self._stream(label)
      results = self.finished('streaming')
    result = results[label]
    evaluation.draw_stream(result, self.workdir / 'streaming.png')
    half = len(result['nats']) // 2
    return {
      name: [
        float(np.nanmean(np.array(part, float)))
        for part in (result[name][:half], result[name][half:])
      ]
      for name in _POINT[1:]
    }

  def _stream(self, label):
    """Writes a hundred points, going on after those there are."""
    length, chunk = self.config.streaming.length, self.config.streaming.chunk
    tokens = self.subject.up_to(length)
    text = np.resize(tokens, (1, length))
    model = self.model(label)
    chunks = -(-(length - 1) // chunk)
    # A point is the mean loss and the median time of its chunks, and the memory
    # held at its end.
    ends = np.cumsum(
      [len(g) for g in np.array_split(np.arange(chunks), min(100, chunks))]
    )
    cache = model.init_cache(1, max_length=length - 1)
    done = 0
    result = {
      'pattern': str(self.known[label]),
      'repeats_of_text': length / len(tokens),
      'cache_bytes': sum(x.nbytes for x in jax.tree.leaves(cache)),
      'begun_at': [],
      **{name: [] for name in _POINT},
    }
    folder = self.workdir / 'streaming_checkpoints'
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
      if restored := checkpoints.restore({'cache': cache}):
        done, result = restored.step, restored.run['result']
        cache = restored.state['cache']
      first = done * chunk
      result['begun_at'].append(first)
      pieces = evaluation.stream(
        model, text[:, first:], chunk=chunk, cache=cache
      )
      losses, seconds, processor, compiles = [], [], [], True
      used = time.process_time()
      for piece in tqdm(
        pieces, desc='streaming', initial=done, total=chunks, unit='chunk'
      ):
        losses.append(piece.losses.mean())
        if not compiles:
          seconds.append(piece.seconds)
          processor.append(time.process_time() - used)
        compiles, done = False, done + 1
        used = time.process_time()
        if done not in ends:
          continue
        point = (
          1 + (done - len(losses)) * chunk,
          float(np.mean(losses)),
          float(np.median(seconds)) if seconds else None,
          float(np.median(processor)) if seconds else None,
          _resident_bytes(),
        )
        for name, value in zip(_POINT, point, strict=True):
          result[name].append(value)
        result['finished'] = done == chunks
        self.write('streaming', {label: result})
        checkpoints.save(done, {'cache': piece.cache}, {'result': result})
        losses, seconds, processor = [], [], []
        used = time.process_time()
    shutil.rmtree(folder)

  def passkey(self):
    """Table 2: share of hidden numbers found, by length and depth."""
    return self._retrieval('passkey')

  def key_value(self):
    """The same of values, of one key among many."""
    return self._retrieval('key_value')

  def _retrieval(self, name):
    settings, results = self.config[name], self.finished(name)
    middles = dict.fromkeys(self.patterns())
    if settings.middle_keys:
      middles[f'LM-Infinite, top {settings.middle_keys}'] = MiddleKeys(
        settings.middle_keys, settings.middle_first_layer
      )
    for label, middle_keys in middles.items():
      if label in results:
        continue
      model = self.model('LM-Infinite' if middle_keys else label)
      found = {}
      grid = list(itertools.product(settings.lengths, settings.depths))
      for length, depth in tqdm(grid, desc=f'{name}, {label}'):
        found[f'{length},{depth}'] = retrieval.accuracy(
          model,
          self.subject.tokenizer,
          retrieval.TASKS[name],
          length=length,
          depth=depth,
          samples=settings.samples,
          seed=self.config.seed,
          middle_keys=middle_keys,
        )
      mean = float(np.mean([*found.values()]))
      results[label] = {'found': found, 'mean': mean}
      self.write(name, results)
    retrieval.draw(
      {label: result['found'] for label, result in results.items()},
      self.workdir / f'{name}.png',
    )
    return {label: result['mean'] for label, result in results.items()}

  def overlap(self):
    """Table 3: BLEU and ROUGE-L of continuations after each milestone."""
    settings, results = self.config.overlap, self.finished('overlap')
    length = max(settings.milestones) + settings.tokens
    texts = self.subject.texts(settings.documents, length)
    for label in self.patterns():
      if label in results:
        continue
      results[label] = {}
      for milestone in tqdm(settings.milestones, desc=f'overlap, {label}'):
        new = overlap.continuations(
          self.model(label), texts, milestone, settings.tokens
        )
        true = texts[:, milestone : milestone + settings.tokens]
        generated, true = (
          [self.subject.tokenizer.decode(row) for row in rows]
          for rows in (new, true)
        )
        results[label][str(milestone)] = {
          **overlap.scores(generated, true),
          # What was written, to be read.
          'first': generated[0],
        }
      self.write('overlap', results)
    overlap.draw(results, self.workdir / 'overlap.png')
    return {
      label: {milestone: row['rouge_l'] for milestone, row in rows.items()}
      for label, rows in results.items()
    }


# What is told of each point of a stream.
_POINT = (
  'position',
  'nats',
  'seconds_per_chunk',
  # Of all cores, whatever else they do: what a busy machine leaves flat.
  'processor_seconds_per_chunk',
  'resident_bytes',
)


def _edges(trained: int, length: int) -> list[int]:
  """Edges: four bins an octave from a sixteenth of the trained length on."""
  edges, step = [1], max(trained / 16, 2)
  while round(step) < length:
    if round(step) > edges[-1]:
      edges.append(round(step))
    step *= 2**0.25
  return [*edges, length]


def _doublings(trained: int, length: int) -> list[int]:
  """The trained length, twice, four times, ... up to `length`."""
  count = int(np.log2(length / trained)) + 1
  return [trained * 2**i for i in range(count)]


def _octaves_of(losses: np.ndarray, trained: int) -> dict[str, float]:
  """Mean nats from half the trained length on, each time twice as far."""
  last = losses.shape[1] + 1
  edges = [max(trained // 2, 1)]
  while edges[-1] < last:
    edges.append(min(2 * edges[-1], last))
  means = evaluation.loss_by_position(losses, edges).mean
  return {
    f'{a}-{b}': mean
    for a, b, mean in zip(edges, edges[1:], means, strict=False)
  }


def _resident_bytes() -> int:
  """Memory the program holds now; 0 where the system does not tell."""
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return 0
  return pages * os.sysconf('SC_PAGE_SIZE')
