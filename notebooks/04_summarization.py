# %% [markdown]
# # Summaries of long texts
#
# A Longformer-Encoder-Decoder (LED) reads a long text with windows and one
# global token, and writes a summary with beam search. Here is what such a run
# leaves behind: predictions beside references, ROUGE with intervals beside
# baselines that need no model, and whether reading more of a text helps.
#
# It reads the folder of a run that you name (of `configs/scisummnet_led.py` or
# `configs/arxiv_led.py`), or the newest record of one. Where there is neither,
# a small model is trained here on Python's own modules, whose docstrings are
# the summaries: in a few minutes, enough to see how things look and by far not
# enough to summarize.

# %%
import json
import os
import pathlib
import sys
import tempfile
import textwrap

import matplotlib.pyplot as plt
import numpy as np

sys.path.append('..')  # for configs/
from configs import scisummnet_led
from longjax import training

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

RUN = ''  # the folder of a run, or a record of one
SHOWN = 2  # texts

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

records = pathlib.Path('../experiments/records')
recorded = sorted(records.glob('*/summaries.json'))
if not RUN and recorded:
  RUN = recorded[-1].parent

# %% [markdown]
# ## The run

# %%
if not RUN:
  RUN = tempfile.mkdtemp()
  config = scisummnet_led.get_config('runlocal')
  if SMOKE:
    config.model.update(
      num_encoder_layers=1,
      num_decoder_layers=1,
      features=16,
      num_encoder_heads=2,
      num_decoder_heads=2,
    )
    config.data.update(vocab_size=300, buckets=())
    config.stages = (
      dict(length=64, batch_size=2, steps=2, learning_rate=1e-3, windows=8),
    )
    config.target_length = 16
    config.optimizer.name = 'adamw'
    config.evaluation.update(
      lengths=(64,), max_length=8, every=0, test_papers=4, num_beams=1
    )
  result = training.train_and_evaluate(config, RUN)
  print(result['description'])

folder = pathlib.Path(RUN)
found = json.loads((folder / 'summaries.json').read_text())
lines = (folder / 'predictions.jsonl').read_text().splitlines()
lines = [json.loads(line) for line in lines]
print(f'decoding: {found["decoding"]}')
print(f'intervals: {found["intervals"]}')
for name, one in found['sets'].items():
  print(f'{name}: {one["papers"]} texts; {one["description"]}')

# %% [markdown]
# ## Training

# %%
metrics = training.read_metrics(RUN)
figure, axes = plt.subplots(1, 2, figsize=(12, 3.5))
for name, style in (('train/loss', '-'), ('validation/loss', 'o-')):
  points = [(line['step'], line[name]) for line in metrics if name in line]
  if points:
    axes[0].plot(*zip(*points, strict=True), style, label=name)
for name in ('rouge1', 'rouge2', 'rougeL'):
  name = f'validation/{name}'
  points = [(line['step'], line[name]) for line in metrics if name in line]
  if points:
    axes[1].plot(*zip(*points, strict=True), 'o-', label=name)
axes[0].set(xlabel='step', ylabel='nats per token')
axes[1].set(xlabel='step', ylabel='ROUGE, greedy decoding', ylim=(0, None))
for ax in axes:
  ax.grid(alpha=0.3)
  if ax.lines:
    ax.legend()
plt.show()

# %% [markdown]
# (A step in the loss is where the stage changes: the first teaches the decoder
# to write the opening of what was read.)
#
# ## Predictions beside references


# %%
def show(title, text):
  print(f'  {title}')
  print(
    textwrap.fill(text, 76, initial_indent='    ', subsequent_indent='    ')
  )


for line in lines[:SHOWN]:
  print(f'{line["set"]}: {line["id"]}')
  show('reference', line['reference'])
  for length, prediction in line['predictions'].items():
    show(f'having read {length} tokens', prediction)
  if 'another' in line:
    other = line['another']
    show(f"given another text's tokens, of {other['id']}", other['prediction'])
  print(f'  ROUGE-1/2/L: {[line["rouge"][f"rouge{k}"] for k in "12L"]}\n')

# %% [markdown]
# ## ROUGE, and against what
#
# Lead-3 takes the first three sentences of the text, random-3 any three. The
# same model given *another* text shows how much of its score is the language of
# such summaries rather than anything read. Bars are 95% intervals over texts.

# %%
for name, one in found['sets'].items():
  kinds = ('rouge1', 'rouge2', 'rougeL')
  figure, ax = plt.subplots(figsize=(10, 0.45 * len(one['systems']) + 1.2))
  for number, kind in enumerate(kinds):
    at = np.arange(len(one['systems'])) + 0.22 * (number - 1)
    mean, low, high = (
      np.array([row[kind][key] for row in one['systems']])
      for key in ('mean', 'low', 'high')
    )
    ax.errorbar(
      mean, at, xerr=(mean - low, high - mean), fmt='o', capsize=3, label=kind
    )
  names = [
    row['system']
    + (f', {row["input_tokens"]:,} tokens' if row['input_tokens'] else '')
    for row in one['systems']
  ]
  ax.set_yticks(range(len(names)), names)
  ax.invert_yaxis()
  ax.set(xlabel='ROUGE', xlim=(0, None))
  ax.set_title(f'{name}, {one["papers"]} texts')
  ax.legend()
  ax.grid(alpha=0.3)
  plt.show()

# %% [markdown]
# Whether two systems differ is better asked text by text. The mean difference
# to the model at its longest input, with its interval:

# %%
for name, one in found['sets'].items():
  print(name)
  for row in one['differences']:
    tokens = f', {row["input_tokens"]:,} tokens' if row['input_tokens'] else ''
    cells = (
      f'{row[k]["mean"]:+6.2f} [{row[k]["low"]:+.2f}, {row[k]["high"]:+.2f}]'
      for k in ('rouge1', 'rouge2', 'rougeL')
    )
    print(f'  less {row["less"] + tokens:40}', *(f'{c:24}' for c in cells))

# %% [markdown]
# ## ROUGE against how much was read
#
# The question of the Longformer paper's figure 3.

# %%
first = next(iter(found['sets'].values()))
own = [row for row in first['systems'] if row['system'] == 'model']
figure, ax = plt.subplots(figsize=(8, 4))
lengths = [row['input_tokens'] for row in own]
for kind in ('rouge1', 'rouge2', 'rougeL'):
  mean, low, high = (
    [row[kind][key] for row in own] for key in ('mean', 'low', 'high')
  )
  (line,) = ax.plot(lengths, mean, marker='o', label=kind)
  ax.fill_between(lengths, low, high, alpha=0.15, color=line.get_color())
ax.set_xscale('log', base=2)
ax.set_xticks(lengths, [f'{n:,}' for n in lengths])
ax.set(xlabel='input tokens read', ylabel='ROUGE', ylim=(0, None))
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# A run of half an hour on papers of the ACL, and the paper's own sizes, are the
# configs named above; their docstrings have the commands.
