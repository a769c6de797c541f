# %% [markdown]
# # A study explored
#
# `experiments.sweep` tries one config with many settings: a study, which any
# number of workers on any number of machines may share. What it leaves is a
# table of trials, its plan and pictures. This notebook reads those of the
# newest record of a sweep, of a folder that you name, or of a small study that
# it runs itself where there is neither.

# %%
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

sys.path.append('..')
from longjax import training

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

STUDY = ''  # the workdir of a sweep, or a record of one
TRIALS = 2 if SMOKE else 8  # of the study that is run here

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

recorded = sorted(pathlib.Path('../experiments/records').glob('*/study.json'))
if not STUDY and recorded:
  STUDY = recorded[-1].parent

# %% [markdown]
# ## A search space
#
# It stands beside the config, in the same file: `sweep` is given a trial of
# optuna and the config, and sets what the trial suggests. A key that the config
# lacks is refused before anything runs.

# %%
CONFIG = """
from configs import common

WINDOWS = {'growing': (8, 32), 'fixed': (20, 20), 'shrinking': (32, 8)}


def get_config(arg=None):
  arg = common.parse_arg(arg, smoke=False)
  config = common.make_config()
  config.data.update(name='python_source', loader='numpy')
  config.model = common.modern_model(
    num_layers=2, features=64, num_heads=2, dropout_rate=0.0
  )
  stage = dict(
    length=128, batch_size=16, steps=80, learning_rate=4e-3, windows=(8, 32)
  )
  config.optimizer.update(name='muon', clip_norm=1.0)
  config.evaluation.update(
    length=128,
    stride=64,
    batch_size=16,
    every=20,
    validation_characters=16384,
    test_characters=16384,
  )
  if arg.smoke:
    config.model.features = 8
    config.optimizer.name = 'adamw'
    stage |= dict(length=16, batch_size=2, steps=4)
    config.evaluation.update(
      length=16,
      stride=8,
      every=2,
      validation_characters=64,
      test_characters=64,
    )
  config.stages = (stage,)
  config.log_every = 10
  config.tensorboard = False
  return config


def sweep(trial, config):
  windows = trial.suggest_categorical('windows', list(WINDOWS))
  config.stages[0].update(
    windows=WINDOWS[windows],
    learning_rate=trial.suggest_float('learning_rate', 5e-4, 5e-2, log=True),
  )
  config.model.dropout_rate = trial.suggest_categorical('dropout', [0.0, 0.2])
"""

if not STUDY:
  STUDY = tempfile.mkdtemp()
  file = pathlib.Path(STUDY, 'tiny.py')
  file.write_text(CONFIG)
  command = [
    *(sys.executable, '-m', 'experiments.sweep', '--study=tiny'),
    f'--config={file}' + ':smoke' * SMOKE,
    *(f'--workdir={STUDY}', f'--trials={TRIALS}'),
  ]
  done = subprocess.run(command, cwd='..', capture_output=True, text=True)
  lines = done.stderr.splitlines()
  print('\n'.join(line for line in lines if line.startswith('trial ')))
  assert done.returncode == 0, lines[-1]

# %% [markdown]
# ## The trials

# %%
folder = pathlib.Path(STUDY)
plan = json.loads((folder / 'study.json').read_text())
with (folder / 'trials.csv').open(newline='') as file:
  trials = list(csv.DictReader(file))
names = list(plan['space'])
metric = plan['metric'].replace('_', ' ')
sign = 1 if plan['direction'] == 'minimize' else -1


def number(text):
  """A figure of the table, or the text itself."""
  try:
    return float(text)
  except ValueError:
    return text


complete = [row for row in trials if row['state'] == 'complete']
complete.sort(key=lambda row: sign * float(row['value']))
print(
  f'{plan["name"]}: {plan["sampler"]} on {plan["device"]}, commit '
  f'{(plan["commit"] or "?")[:7]}, seed {plan["seed"]}; {plan["states"]}\n'
)
print(f'{"trial":>5} {metric:>20}', *(f'{name:>16}' for name in names))
for row in complete[:10]:
  values = (number(row[name]) for name in names)
  cells = (f'{v:.4g}' if isinstance(v, float) else v for v in values)
  print(
    f'{row["trial"]:>5} {float(row["value"]):20.4f}',
    *(f'{cell:>16}' for cell in cells),
  )
for row in trials:
  if row['error']:
    print(f'trial {row["trial"]} failed: {row["error"]}')

# %% [markdown]
# ## The course of the study
#
# Pruned trials stopped early, at a value that says little: they are crosses. A
# trial whose worker was lost is tried again, under a number of its own.

# %%
figure, ax = plt.subplots(figsize=(9, 3.6))
for state, style in (('complete', 'o'), ('pruned', 'x')):
  rows = [row for row in trials if row['state'] == state and row['value']]
  ax.plot(
    [int(row['trial']) for row in rows],
    [float(row['value']) for row in rows],
    style,
    label=state,
  )
by_number = sorted(complete, key=lambda row: int(row['trial']))
best = np.minimum.accumulate([sign * float(row['value']) for row in by_number])
ax.step(
  [int(row['trial']) for row in by_number],
  sign * best,
  where='post',
  color='grey',
  label='best so far',
)
ax.set(xlabel='trial', ylabel=metric)
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# ## Each parameter alone

# %%
figure, axes = plt.subplots(
  1, len(names), figsize=(4.2 * len(names), 3.6), sharey=True, squeeze=False
)
for ax, name in zip(axes[0], names, strict=True):
  values = [number(row[name]) for row in complete]
  kind = plan['space'][name]
  if kind['name'] == 'CategoricalDistribution':
    choices = [str(c) for c in kind['attributes']['choices']]
    at = [choices.index(str(row[name])) for row in complete]
    ax.set_xticks(range(len(choices)), choices)
    ax.set_xlim(-0.5, len(choices) - 0.5)
  else:
    at = values
    if kind['attributes'].get('log'):
      ax.set_xscale('log')
  ax.plot(at, [float(row['value']) for row in complete], 'o')
  ax.set_xlabel(name)
  ax.grid(alpha=0.3)
axes[0, 0].set_ylabel(metric)
plt.show()

# %% [markdown]
# ## Which of them matters
#
# By optuna's PED-ANOVA: how far the best tenth of the finished trials (or the
# best five) lies, in each parameter, from all that was searched, as shares. TPE
# goes where it was good before, which counts for a parameter too: with few
# trials take it as a hint, and look at the pictures above.

# %%
importances = plan.get('importances', {})
figure, ax = plt.subplots(figsize=(7, 0.5 * max(len(importances), 1) + 0.8))
ax.barh(list(importances), list(importances.values()))
ax.invert_yaxis()
ax.set(xlabel='importance', xlim=(0, 1))
plt.show()

# %% [markdown]
# ## All at once
#
# One line for each trial, through its value and its parameters.

# %%
picture = folder / 'parallel_coordinates.png'
if picture.exists():
  display(Image(filename=picture))

# %% [markdown]
# ## How the trials learnt
#
# Where the folders of the trials are there (a record has none): the darker, the
# better in the end.

# %%
if (folder / 'trials').is_dir():
  figure, ax = plt.subplots(figsize=(9, 3.6))
  worst = len(complete)
  for place, row in reversed(list(enumerate(complete))):
    run = folder / 'trials' / f'{int(row["attempt_at"]):04}'
    points = [
      (line['step'], line[f'validation/{plan["metric"]}'])
      for line in training.read_metrics(run)
      if f'validation/{plan["metric"]}' in line
    ]
    color = plt.cm.viridis(0.9 * place / max(worst - 1, 1))
    label = f'trial {row["trial"]}' if place in (0, worst - 1) else None
    ax.plot(*zip(*points, strict=True), 'o-', color=color, label=label)
  ax.set(xlabel='step', ylabel=metric)
  ax.grid(alpha=0.3)
  ax.legend()
  plt.show()

# %% [markdown]
# A study says which settings to look at again, not how they compare: its best
# value is the luckiest of many. Before anything is claimed, the few best are
# run with other seeds and scored on the test split, which no trial is chosen
# by.
