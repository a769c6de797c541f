"""Measures a pretrained model far beyond its trained length (LM-Infinite).

Run by `main.py --mode=measure` with one of configs/lm_infinite_*.py. The model
(a folder in Hugging Face's format, or a llama2.c .bin) is measured as it is and
with each variant of its attention; nothing is trained. The workdir gets

  loss_by_position.json, .png   figures 3 to 5: nats by position in long texts
  streaming.json, .png          figure 4: one text without end, by chunks
  passkey.json, .png            table 2: a number hidden in a text, asked for
  key_value.json, .png          the same with one of many pairs
  overlap.json                  table 3: continuations after milestones

Measurements that are finished are kept, and not done again.
"""

import itertools
import json
import lzma
import os
import pathlib
import platform
import subprocess
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import longjax
from longjax.evaluation import length as evaluation
from longjax.evaluation import overlap, retrieval
from longjax.interop import load_llama2c, load_pretrained, load_tokenizer


def variants(length: int, start: int) -> dict:
  """{label: pattern} for a model trained at `length`; None: truncation."""
  return {
    'vanilla': longjax.Full(),
    'window only': longjax.SlidingWindow(length - 1),
    'mask only': longjax.Lambda(length, start, ceiling=False),
    'ceiling only': longjax.DistanceCeiling(length),
    'LM-Infinite': longjax.Lambda(length, start),
    'StreamingLLM': longjax.AttentionSinks(length - start, start),
    # Tells up to length // 2 as it is, and eight times that by groups.
    'Self-Extend': longjax.SelfExtend(length // 2, 8),
    'truncation': None,
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
  """One model, its tokenizer and text, and where results go."""

  def __init__(self, config, workdir):
    model = config.model
    self.config, self.workdir = config, workdir
    if not model.path:
      raise ValueError('config.model.path is empty: name a pretrained model')
    for name in ('path', 'tokenizer'):
      if model[name] and not pathlib.Path(model[name]).exists():
        raise FileNotFoundError(
          f'config.model.{name}={model[name]} does not exist'
        )
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
    self.variants = {label: known[label] for label in config.variants}
    self.tokenizer = load_tokenizer(model.tokenizer or model.path)
    self._models = {}
    workdir.mkdir(parents=True, exist_ok=True)

  def model(self, label):
    pattern, path = self.variants[label], pathlib.Path(self.config.model.path)
    # One at a time: a real model fills the memory.
    if label not in self._models:
      options = {} if pattern is None else {'patterns': pattern}
      if self.config.model.dtype:
        options['dtype'] = self.config.model.dtype
      load = load_llama2c if path.suffix == '.bin' else load_pretrained
      self._models = {label: load(path, **options)}
    return self._models[label]

  def tokens(self, count: int) -> np.ndarray:
    """The first `count` tokens of the text."""
    tokens = self._read_tokens(count)
    if len(tokens) < count:
      raise ValueError(
        f'{count} tokens are needed, config.text.path={self.config.text.path} '
        f'has {len(tokens)}'
      )
    return tokens

  def _read_tokens(self, count: int) -> np.ndarray:
    """`count` tokens of the documents, one after another, or all there are."""
    text = self.config.text
    if not text.path:
      raise ValueError('config.text.path is empty: name a text file')
    path = pathlib.Path(text.path)
    opened = lzma.open if path.suffix == '.xz' else open
    with opened(path, 'rt', encoding='utf-8') as file:
      documents = file.read().split(text.separator)
    tokens = []
    for document in filter(None, map(str.strip, documents)):
      tokens += self.tokenizer.encode(document)
      if len(tokens) >= count:
        break
    if not tokens:
      raise ValueError(f'config.text.path={path} has no tokens')
    return np.array(tokens[:count], np.int32)

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
    model, text = self.config.model, self.config.text
    return json.loads(
      json.dumps(
        {
          # Names only: where files lay is of no interest.
          'model': {
            **model.to_dict(),
            'path': pathlib.Path(model.path).name,
            'tokenizer': pathlib.Path(model.tokenizer).name,
          },
          'text': {
            **text.to_dict(),
            'path': pathlib.Path(text.path).name,
          },
          name: self.config[name].to_dict(),
        }
      )
    )

  def write(self, name, results):
    record = {
      'settings': self._settings(name),
      'commit': _commit(),
      'device': f'{jax.devices()[0].device_kind}, {platform.machine()}, '
      f'{os.cpu_count()} cores',
      'versions': {'python': platform.python_version(), 'jax': jax.__version__},
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
    texts = self.tokens(length * documents).reshape(documents, length)
    results = self.finished('loss_by_position')
    for label in self.variants:
      if label in results:
        continue
      started = time.perf_counter()
      losses = self._losses(label, texts, settings.chunk)
      curve = evaluation.loss_by_position(losses, _octaves(trained, length))
      results[label] = {
        'pattern': str(self.variants[label]),
        'beyond_trained_length': float(
          losses[:, trained:].mean(dtype=np.float64)
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
      title=f'{pathlib.Path(self.config.model.path).stem}, {documents} texts',
      limit=min(min(curve.mean) for curve in curves.values()) + 3,
    )
    return {k: r['beyond_trained_length'] for k, r in results.items()}

  def _losses(self, label, texts, chunk):
    model, trained = self.model(label), self.config.model.trained_length
    if self.variants[label] is None:
      return evaluation.truncated_losses(
        model, texts, length=trained, stride=max(trained // 2, 1)
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
    settings = self.config.streaming
    label = 'LM-Infinite'
    trained, start = self.config.model.trained_length, self.config.model.start
    self.variants.setdefault(label, variants(trained, start)[label])
    results = self.finished('streaming')
    if label not in results:
      tokens = self._read_tokens(settings.length)
      text = np.resize(tokens, (1, settings.length))
      chunks = evaluation.stream(self.model(label), text, chunk=settings.chunk)
      count = -(-(settings.length - 1) // settings.chunk)
      rows = [
        (c.first, float(c.losses.mean()), c.seconds, _resident_bytes())
        for c in tqdm(chunks, desc='streaming', total=count, unit='chunk')
      ]
      # A hundred points: the mean loss and time of each, memory at its end.
      groups = np.array_split(np.arange(len(rows)), min(100, len(rows)))
      columns = [np.array(column) for column in zip(*rows, strict=True)]
      first, losses, seconds, memory = columns
      results[label] = {
        'position': [int(first[g[0]]) for g in groups],
        'nats': [float(losses[g].mean()) for g in groups],
        # The first chunk compiles.
        'seconds_per_chunk': [
          float(np.median(seconds[g[g > 0]])) for g in groups if (g > 0).any()
        ],
        'resident_bytes': [int(memory[g[-1]]) for g in groups],
        'repeats_of_text': settings.length / len(tokens),
      }
      self.write('streaming', results)
    result = results[label]
    evaluation.draw_stream(result, self.workdir / 'streaming.png')
    half = len(result['nats']) // 2
    return {
      name: [float(np.mean(part)) for part in (values[:half], values[half:])]
      for name, values in result.items()
      if name in ('nats', 'seconds_per_chunk', 'resident_bytes')
    }

  def passkey(self):
    """Table 2: share of hidden numbers found, by length and depth."""
    return self._retrieval('passkey')

  def key_value(self):
    """The same of values, of one key among many."""
    return self._retrieval('key_value')

  def _retrieval(self, name):
    settings, results = self.config[name], self.finished(name)
    for label in self.variants:
      if label in results or self.variants[label] is None:
        continue
      model, found = self.model(label), {}
      grid = list(itertools.product(settings.lengths, settings.depths))
      for length, depth in tqdm(grid, desc=f'{name}, {label}'):
        found[f'{length},{depth}'] = retrieval.accuracy(
          model,
          self.tokenizer,
          retrieval.TASKS[name],
          length=length,
          depth=depth,
          samples=settings.samples,
          seed=self.config.seed,
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
    texts = self.tokens(length * settings.documents)
    texts = texts.reshape(settings.documents, length)
    for label in self.variants:
      if label in results or self.variants[label] is None:
        continue
      results[label] = {}
      for milestone in tqdm(settings.milestones, desc=f'overlap, {label}'):
        new = overlap.continuations(
          self.model(label), texts, milestone, settings.tokens
        )
        true = texts[:, milestone : milestone + settings.tokens]
        generated, true = (
          [self.tokenizer.decode(row) for row in rows] for rows in (new, true)
        )
        results[label][str(milestone)] = {
          **overlap.scores(generated, true),
          # What was written, to be read.
          'first': generated[0],
        }
      self.write('overlap', results)
    return {
      label: {milestone: row['rouge_l'] for milestone, row in rows.items()}
      for label, rows in results.items()
    }


def _octaves(trained: int, length: int) -> list[int]:
  """Edges: four bins an octave from a sixteenth of the trained length on."""
  edges, step = [1], max(trained / 16, 2)
  while round(step) < length:
    if round(step) > edges[-1]:
      edges.append(round(step))
    step *= 2**0.25
  return [*edges, length]


def _resident_bytes() -> int:
  """Memory the program holds now; 0 where the system does not tell."""
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return 0
  return pages * os.sysconf('SC_PAGE_SIZE')


def _commit() -> str | None:
  done = subprocess.run(
    ['git', 'rev-parse', 'HEAD'],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent,
  )
  return done.stdout.strip() or None
