"""Loss by position far beyond the trained length: LM-Infinite's figure 5.

  python -m experiments.length_generalization --model=FOLDER_OR_BIN \
    --text=FILE --trained_length=512 --length=32768 --out=FOLDER

A pretrained model (a folder in Hugging Face's format, or a llama2.c .bin with
--tokenizer) reads texts of `length` tokens, once with each variant: the model
as it is, the Λ-mask's window alone, mask alone, distance ceiling alone, both
(LM-Infinite), truncated input, and the rivals StreamingLLM and Self-Extend. The
texts are cut from FILE, whose documents (split at --separator) follow each
other. Variants that are finished are not run again. FOLDER gets results.json
and loss.png.
"""

import json
import lzma
import os
import pathlib
import platform
import subprocess
import time

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

import longjax
from experiments import cli
from longjax.evaluation import length as evaluation
from longjax.interop import load_llama2c, load_pretrained, load_tokenizer

_MODEL = flags.DEFINE_string('model', None, 'Pretrained folder, or .bin file.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "Its tokenizer, if it is not in the model's folder."
)
_TEXT = flags.DEFINE_string('text', None, 'Text file, plain or .xz.')
_SEPARATOR = flags.DEFINE_string(
  'separator', '<|endoftext|>', 'What stands between the documents of a text.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.')
_RUNS = flags.DEFINE_string(
  'runs', 'runs/length_generalization', 'Folder of what is finished.'
)
_TRAINED = flags.DEFINE_integer(
  'trained_length', None, 'L: tokens of a text that the model was trained on.'
)
_START = flags.DEFINE_integer('start', 10, 'G: first tokens that stay visible.')
_LENGTH = flags.DEFINE_integer('length', 32768, 'Tokens of a text.')
_DOCUMENTS = flags.DEFINE_integer('documents', 3, 'How many texts.')
_CHUNK = flags.DEFINE_integer('chunk', 512, 'Tokens read at a time.')
_VARIANTS = flags.DEFINE_list('variants', None, 'Some of them only.')

flags.mark_flags_as_required(['model', 'text', 'out', 'trained_length'])
flags.register_validator('trained_length', lambda n: n is None or n >= 8)


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


def make_texts(tokenizer, text, separator, length, count) -> np.ndarray:
  """int32 [count, length]: the text's documents, one after the other.

  Raises:
    ValueError: the text has too few tokens.
  """
  tokens, total = [], 0
  for document in filter(None, (d.strip() for d in text.split(separator))):
    tokens += tokenizer.encode(document)
    total = len(tokens)
    if total >= count * length:
      return np.array(tokens[: count * length], np.int32).reshape(count, -1)
  raise ValueError(
    f'{count} texts of {length} tokens need {count * length}, the text has '
    f'{total}'
  )


def load(pattern):
  path = pathlib.Path(_MODEL.value)
  options = {} if pattern is None else {'patterns': pattern}
  if path.suffix == '.bin':
    return load_llama2c(path, **options)
  return load_pretrained(path, **options)


def losses_of(label, pattern, texts) -> np.ndarray:
  model = load(pattern)
  if pattern is None:
    length = _TRAINED.value
    return evaluation.truncated_losses(
      model, texts, length=length, stride=length // 2
    )
  count = -(-(texts.shape[1] - 1) // _CHUNK.value)

  def progress(chunks):
    return tqdm(chunks, desc=label, total=count, unit='chunk')

  # One text at a time: vanilla attention to all of it needs the memory.
  return np.concatenate(
    [
      evaluation.streamed_losses(
        model, row[None], chunk=_CHUNK.value, progress=progress
      )
      for row in texts
    ]
  )


def octaves(trained: int, length: int) -> list[int]:
  """Edges: four bins an octave from a sixteenth of the trained length on."""
  edges, step = [1], trained / 16
  while step < length:
    edges.append(round(step))
    step *= 2**0.25
  return [*edges, length]


def run():
  chosen = variants(_TRAINED.value, _START.value)
  labels = _VARIANTS.value or list(chosen)
  if unknown := set(labels) - set(chosen):
    raise ValueError(f'variants {sorted(unknown)} are not in {list(chosen)}')
  tokenizer = load_tokenizer(_TOKENIZER.value or _MODEL.value)
  path = pathlib.Path(_TEXT.value)
  opened = lzma.open if path.suffix == '.xz' else open
  with opened(path, 'rt', encoding='utf-8') as file:
    text = file.read()
  texts = make_texts(
    tokenizer, text, _SEPARATOR.value, _LENGTH.value, _DOCUMENTS.value
  )
  edges = octaves(_TRAINED.value, _LENGTH.value)
  folder = pathlib.Path(_RUNS.value)
  folder.mkdir(parents=True, exist_ok=True)
  # What the losses depend on is part of the file's name.
  model_name = pathlib.Path(_MODEL.value).stem
  kept = f'{model_name}_{_TRAINED.value}_{_START.value}_{texts.shape[1]}'
  results, curves = [], {}
  for label in labels:
    file = folder / f'{kept}_{len(texts)}_{label.replace(" ", "_")}.npy'
    started = time.perf_counter()
    if file.exists():
      losses, seconds = np.load(file), None
    else:
      losses = losses_of(label, chosen[label], texts)
      seconds = time.perf_counter() - started
      np.save(file, losses)
    curves[label] = evaluation.loss_by_position(losses, edges)
    beyond = losses[:, _TRAINED.value :].mean(dtype=np.float64)
    results.append(
      {
        'variant': label,
        'pattern': str(chosen[label]),
        'mean_beyond_trained_length': float(beyond),
        'seconds': seconds,
        **vars(curves[label]),
      }
    )
    print(f'{label}: {beyond:.4f} nats beyond the trained length', flush=True)
    write(results, curves)


def write(results, curves):
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  record = {
    'command': 'python -m experiments.length_generalization '
    f'--model={pathlib.Path(_MODEL.value).name} '
    f'--text={pathlib.Path(_TEXT.value).name} '
    f'--trained_length={_TRAINED.value} --start={_START.value} '
    f'--length={_LENGTH.value} --documents={_DOCUMENTS.value}',
    'commit': subprocess.run(
      ['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True
    ).stdout.strip(),
    'device': f'{jax.devices()[0].device_kind} ({platform.machine()}), '
    f'{os.cpu_count()} cores',
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'results': results,
  }
  (out / 'results.json').write_text(json.dumps(record, indent=2) + '\n')
  lowest = min(min(curve.mean) for curve in curves.values())
  evaluation.draw(
    curves,
    out / 'loss.png',
    trained_length=_TRAINED.value,
    title=f'{pathlib.Path(_MODEL.value).stem}, {_DOCUMENTS.value} texts',
    limit=lowest + 3,
  )


def main(argv):
  if argv[1:]:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  try:
    run()
  except (ValueError, OSError) as e:
    cli.fail(1, str(e))


if __name__ == '__main__':
  app.run(main)
