"""Trains configs/text8_windows.py with each schedule and seed; a record.

  python -m experiments.window_ablation --data=PATH --out=FOLDER

Runs that are finished are not run again, and one that was stopped goes on where
it was. FOLDER gets results.json and bits.png.
"""

import json
import pathlib
import statistics
import sys

from absl import app, flags

from configs import text8_windows
from experiments import stamp
from longjax import training

_DATA = flags.DEFINE_string('data', None, 'text8, or a prefix of it.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the record.')
_RUNS = flags.DEFINE_string(
  'runs', 'runs/text8_windows', 'Folder of the runs themselves.'
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many seeds.')
_STEPS = flags.DEFINE_integer('steps', 400, 'Steps of a run.')


def main(argv):
  del argv
  out = pathlib.Path(_OUT.value)
  results = []
  for seed in range(_SEEDS.value):
    for schedule in text8_windows.WINDOWS:
      workdir = pathlib.Path(
        _RUNS.value, f'{schedule}_{_STEPS.value}_seed{seed}'
      )
      results.append(
        {'schedule': schedule, 'seed': seed, **run(schedule, seed, workdir)}
      )
  out.mkdir(parents=True, exist_ok=True)
  record = {
    **stamp.stamp(stamp.command('experiments.window_ablation')),
    'mean_bits_per_character': {
      schedule: statistics.mean(
        r['bits_per_character'] for r in results if r['schedule'] == schedule
      )
      for schedule in text8_windows.WINDOWS
    },
    'results': results,
  }
  (out / 'results.json').write_text(json.dumps(record, indent=2) + '\n')
  draw(results, out / 'bits.png')
  print(f'{out}/results.json\n{out}/bits.png')


def run(schedule: str, seed: int, workdir: pathlib.Path) -> dict:
  """The result of one run, from its folder if it is finished."""
  finished = workdir / 'result.json'
  if finished.exists():
    return json.loads(finished.read_text())
  arg = f'windows={schedule},seed={seed},steps={_STEPS.value}'
  config = text8_windows.get_config(arg)
  config.data.path = _DATA.value
  return training.train_and_evaluate(config, workdir)


def draw(results: list[dict], path: pathlib.Path):
  """A dot for each run, a bar for each schedule's mean."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, ax = plt.subplots(figsize=(5, 3.5), layout='constrained')
  for x, schedule in enumerate(text8_windows.WINDOWS):
    bits = [
      r['bits_per_character'] for r in results if r['schedule'] == schedule
    ]
    ax.hlines(sum(bits) / len(bits), x - 0.25, x + 0.25, color='0.3')
    ax.plot([x] * len(bits), bits, 'o', color='C0')
  names = [
    f'{name}\n{windows}' for name, windows in text8_windows.WINDOWS.items()
  ]
  ax.set_xticks(range(len(names)), names)
  ax.set_xlabel('windows, bottom layer to top')
  ax.set_ylabel('test bits/char (prefix of text8)')
  ax.set_title(f'{_SEEDS.value} seeds, {_STEPS.value} steps each')
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  for name in ('data', 'out'):
    flags.mark_flag_as_required(name)
  try:
    app.run(main)
  except (ValueError, OSError, training.CheckpointError) as e:
    sys.exit(f'error: {e}')
