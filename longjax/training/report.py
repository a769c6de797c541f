"""What `config.report` adds to a language model: is it any good?

Bits per character before and after on a fixed slice of the validation split,
beside Markov models counted on the same training split; a sample; pictures.
"""

import hashlib
import pathlib

from longjax.data import markov
from longjax.training.forward import Apply
from longjax.training.stages import Stage

SLICE = 64 * 1024
ORDERS = (0, 1, 2)
# Larger pictures of patterns show nothing more.
PICTURE_LENGTH = 256


def report(
  task,
  stage: Stage,
  before: Apply,
  after: Apply,
  workdir: pathlib.Path,
) -> dict:
  """Prints the comparison, the sample and where the pictures are.

  Args:
    task: the language modelling.
    stage: the last one, whose patterns are drawn.
    before, after: the model at its first and at its last step.
    workdir: where the pictures go.

  Returns:
    The bits per character: {'before', 'after', 'markov_0', ...}.
  """
  corpus = task.corpus
  tokens = corpus.validation[:SLICE]
  digest = hashlib.sha256(corpus.decode(tokens)).hexdigest()
  rows = {}
  for order in ORDERS:
    rows[f'markov_{order}'] = markov.bits_per_character(
      corpus.train, tokens, order, vocab_size=corpus.vocab_size
    )
  scores = {
    'before': task.score(before, tokens),
    'after': task.score(after, tokens),
  }
  rows |= {name: score.bits_per_character for name, score in scores.items()}

  print(f'\nBits per character on the first {len(tokens):,} characters of the')
  print(f'validation split of {corpus.name} (sha256 {digest}),')
  print(
    f'in windows of {scores["after"].length}, stride {scores["after"].stride}; '
    'lower is better:\n'
  )
  for order in ORDERS:
    print(f'  order-{order} Markov model     {rows[f"markov_{order}"]:.3f}')
  print(f'  model before training    {rows["before"]:.3f}')
  print(f'  model after training     {rows["after"]:.3f}')

  prompt, continuation = task.sample(after.model)
  text = (prompt + continuation).decode(errors='replace')
  print(f'\nA sample of {task.settings.sampling.num_tokens} characters:\n')
  print('\n'.join(f'  | {line}' for line in text.splitlines()))

  pictures = [workdir / 'loss.png']
  try:
    pictures.append(_draw_patterns(task.settings, stage, workdir))
  except ImportError:
    print('\nmatplotlib is not installed: no pictures')
  else:
    print('\nPictures:')
    for path in pictures:
      print(f'  {path}')
  return rows


def _draw_patterns(settings, stage, workdir) -> pathlib.Path:
  from matplotlib import pyplot as plt

  from longjax.patterns.draw import draw_layers

  figure = draw_layers(
    stage.layer_patterns(settings.pattern, settings.model['num_layers']),
    min(stage.length, PICTURE_LENGTH),
    num_heads=settings.model['num_heads'],
    title='Who sees whom, layer by layer',
  )
  path = workdir / 'patterns.png'
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path
