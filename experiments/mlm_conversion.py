"""A masked language model made longer: Longformer's Table 5, small.

  python -m experiments.mlm_conversion --data=PATH --out=FOLDER

Trains configs/text8_mlm.py, makes it longer with its positions tiled and with
random ones, scores both on the same masked tokens, trains each on, and a tiled
one with nothing trained but its positions. FOLDER gets results.json and
bits.png.

Runs that are finished are not run again, and one that was stopped goes on where
it was.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx

from configs import text8_mlm
from experiments import stamp
from longjax import interop, training

_DATA = flags.DEFINE_string('data', None, 'text8, or a prefix of it.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the record.')
_RUNS = flags.DEFINE_string(
  'runs', 'runs/text8_mlm', 'Folder of the runs themselves.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of everything.')
_RUNLOCAL = flags.DEFINE_bool('runlocal', False, 'A test, not a result.')

TILED, RANDOM = 'tiled', 'random'


def main(argv):
  del argv
  logging.set_verbosity(logging.FATAL)
  runs = pathlib.Path(_RUNS.value)
  rows, curves = [], {}

  def add(name, updates, length, scores):
    row = {'row': name, 'updates': updates, 'length': length}
    for key in ('bits_per_token', 'bits_per_character', 'masked', 'data'):
      row[key] = scores[key]
    rows.append(row)

  short = make_config()
  scores = train(short, runs / 'short')
  add('the short model', 0, text8_mlm.LENGTH, scores)
  convert(short, runs)
  for kind in (RANDOM, TILED):
    config = make_config(pretrained=str(runs / kind))
    add(f'{kind} positions', 0, text8_mlm.LONGER, score(config, runs))
  for kind, only in ((RANDOM, False), (TILED, False), (TILED, True)):
    config = make_config(pretrained=str(runs / kind), positions=only)
    name = f'{kind} positions' + (', only they trained' if only else '')
    workdir = runs / (kind + '_trained' + ('_positions' if only else ''))
    scores = train(config, workdir)
    early = config.checkpoint_every
    first = training.evaluate(
      config, workdir, workdir / 'checkpoints' / str(early)
    )
    add(name, early, text8_mlm.LONGER, first)
    add(name, scores['step'], text8_mlm.LONGER, scores)
    curves[name] = [
      (line['step'], line['validation/bits_per_token'])
      for line in training.read_metrics(workdir)
      if 'validation/bits_per_token' in line
    ]

  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  record = {
    **stamp.stamp(stamp.command('experiments.mlm_conversion')),
    'seed': _SEED.value,
    'config': stamp.without_places(short.to_dict()),
    'rows': rows,
    'curves': curves,
  }
  text = json.dumps(record, indent=2)
  (out / 'results.json').write_text(text + '\n')
  draw(rows, out / 'bits.png')
  for row in rows:
    print(f'{row["row"]:40} {row["updates"]:6} {row["bits_per_token"]:.3f}')
  print(f'{out}/results.json\n{out}/bits.png')


def make_config(pretrained: str = '', positions: bool = False):
  """The config of the short model, or of a longer one that is trained on."""
  arg = f'seed={_SEED.value}' + (',runlocal' if _RUNLOCAL.value else '')
  if pretrained:
    arg += ',pretrained=...' + (',positions' if positions else '')
  config = text8_mlm.get_config(arg)
  # Not in the argument: a path may have a comma.
  config.pretrained = pretrained
  if _DATA.value and not _RUNLOCAL.value:
    config.data.path = _DATA.value
  return config


def train(config, workdir: pathlib.Path) -> dict:
  """The result of a run, from its folder if it is finished."""
  finished = workdir / 'result.json'
  if not finished.exists():
    training.train_and_evaluate(config, workdir)
  return json.loads(finished.read_text())


def convert(config, runs: pathlib.Path):
  """Folders of the short model and of the two longer ones."""
  if not (runs / 'short_model' / 'config.json').exists():
    model = training.load(config, runs / 'short').model
    interop.save_pretrained(
      model, runs / 'short_model', interop.config_of_longformer(model)
    )
  if not (runs / TILED / 'config.json').exists():
    interop.lengthen(
      runs / 'short_model', runs / TILED, text8_mlm.LONGER, text8_mlm.WINDOW
    )
  if not (runs / RANDOM / 'config.json').exists():
    model = interop.load_pretrained(runs / TILED)
    randomize(model, text8_mlm.LENGTH, _SEED.value)
    interop.save_pretrained(
      model, runs / RANDOM, interop.config_of_longformer(model)
    )


def randomize(model, length: int, seed: int):
  """Draws the positions beyond the first `length` anew, as at the start."""
  table = model.position_embedding.embedding
  known = model.pad_token + 1 + length
  new = nnx.initializers.normal(0.02)(
    jax.random.key(seed), (table.shape[0] - known, table.shape[1])
  )
  table[...] = np.concatenate([table[...][:known], new])


def score(config, runs: pathlib.Path) -> dict:
  """The test score of a folder's model, as it is."""
  from longjax.training.devices import Devices
  from longjax.training.forward import Apply
  from longjax.training.settings import make_settings
  from longjax.training.state import split
  from longjax.training.tasks import make_task

  task = make_task(make_settings(config), runs)
  model = interop.load_pretrained(config.pretrained)
  return task.test(Apply(*split(model), Devices()), runs)


def draw(rows: list[dict], path: pathlib.Path):
  """Bits over updates of each way, and the short model's as a line."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, ax = plt.subplots(figsize=(6, 4), layout='constrained')
  for name in dict.fromkeys(row['row'] for row in rows[1:]):
    start = name.split(',')[0]
    points = [
      (row['updates'], row['bits_per_token'])
      for row in rows
      if row['row'] == name or (row['row'] == start and not row['updates'])
    ]
    ax.plot(*zip(*sorted(points), strict=True), 'o-', label=name)
  bits = rows[0]['bits_per_token']
  ax.axhline(bits, color='0.3', linestyle='--', label='the short model')
  ax.set_xlabel(f'updates at {text8_mlm.LONGER} tokens')
  ax.set_ylabel('test bits for each masked token')
  ax.set_title(f'{rows[0]["data"]}: {text8_mlm.LENGTH} tokens made longer')
  ax.legend()
  ax.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  try:
    app.run(main)
  except (ValueError, OSError, training.CheckpointError) as e:
    sys.exit(f'error: {e}')
