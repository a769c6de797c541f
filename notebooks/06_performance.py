# %% [markdown]
# # Time and memory against length
#
# Every figure here is read from `experiments/records/`, where each claim has
# its command, commit, device, seed and raw samples. Nothing is measured now.
# Titles name the record, the device and the commit (with + where files differed
# from it).

# %%
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

sys.path.append('..')  # for experiments/
from experiments import record as records
from experiments.benchmarks import report

RECORDS = pathlib.Path('../experiments/records')

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

# %%
table = records.table(RECORDS).replace('](experiments', '](../experiments')
display(Markdown(table))

# %% [markdown]
# What follows needs two little helpers: the newest record of a name, and what a
# figure has to say of where it comes from.


# %%
def newest(name):
  """The folder of the newest record called so."""
  return max(RECORDS.glob(f'*_{name}'))


def origin(folder, run=0):
  """'RECORD, DEVICE, commit COMMIT' of one of a record's runs."""
  made = json.loads((folder / 'record.json').read_text())['runs'][run]
  commit = made['commit'][:7] + '+' * made['commit'].endswith('+')
  return f'{folder.name}\n{made["device"]}, commit {commit}'


def read(folder, name):
  return json.loads((folder / name).read_text())


def lengths_axis(ax, lengths):
  ax.set_xscale('log', base=2)
  ax.set_xticks(lengths, [f'{n:,}' for n in lengths])
  ax.minorticks_off()
  ax.grid(alpha=0.3)


# %% [markdown]
# ## Longformer's attention beside Hugging Face's
#
# A layer of 12 heads of 64, 256 keys on each side, with its projections,
# float32 on two threads. Each implementation ran in its own process and took
# turns with the other; outputs and gradients were compared first. Points are
# medians, bars the fastest and the slowest of nine repeats; memory is the peak
# of a fresh process, libraries included.

# %%
folder = newest('cpu_attention')
found = read(folder, 'results.json')
whom = ('longjax', 'Hugging Face', 'full attention')
figure, axes = plt.subplots(1, 3, figsize=(14, 4))
for ax, mode in zip(axes, ('forward', 'forward+backward'), strict=False):
  for who in whom:
    rows = [
      row
      for row in found['timings']
      if (row['who'], row['mode']) == (who, mode)
    ]
    middle = np.array([row['median_seconds'] for row in rows])
    low = middle - [min(row['seconds']) for row in rows]
    high = [max(row['seconds']) for row in rows] - middle
    ax.errorbar(
      [row['length'] for row in rows],
      middle,
      (low, high),
      marker='o',
      capsize=3,
      label=who,
    )
  ax.set(title=mode, xlabel='tokens', ylabel='seconds')
  ax.set_ylim(bottom=0)
  lengths_axis(ax, found['lengths'])
for who in whom:
  rows = [
    row
    for row in found['memory']
    if (row['who'], row['mode']) == (who, 'forward+backward')
  ]
  axes[2].plot(
    [row['length'] for row in rows],
    [row['peak_bytes'] / 1e6 for row in rows],
    marker='o',
    label=who,
  )
axes[2].set(
  title='forward+backward', xlabel='tokens', ylabel='peak memory (MB)'
)
axes[2].set_ylim(bottom=0)
lengths_axis(axes[2], found['lengths'])
axes[0].legend()
figure.suptitle(origin(folder), fontsize=10)
plt.show()

# %% [markdown]
# The targets of that benchmark, those that were missed as well:

# %%
for name in ('results.json', 'results_4096.json'):
  for row in read(folder, name)['ratios']:
    if 'attention alone' not in row['name']:
      holds = 'holds ' if row['holds'] else 'MISSED'
      print(f'{holds} {row["ratio"]:6.2f} {row["target"]:>8}  {row["name"]}')
  print()

# %% [markdown]
# (`results_4096.json` is the shorter length again, alone on the machine.)
#
# ## A token far into a text
#
# Decoding with LM-Infinite's cache of 512 keys and the first 10, against our
# own cache of everything.

# %%
folder = newest('decoding')
found = read(folder, 'results.json')
figure, axes = plt.subplots(1, 4, figsize=(15, 3.6))
for run, (model, one) in enumerate(found.items()):
  for who in ('LM-Infinite', 'whole cache'):
    timings = [row for row in one['timings'] if row['who'] == who]
    memory = [row for row in one['memory'] if row['who'] == who]
    axes[2 * run].plot(
      [row['length'] for row in timings],
      [1e3 * row['median_cpu_seconds'] for row in timings],
      marker='o',
      label=who,
    )
    axes[2 * run + 1].plot(
      [row['length'] for row in memory],
      [row['cache_bytes'] / 1e6 for row in memory],
      marker='o',
      label=who,
    )
  for ax, unit in zip(
    axes[2 * run :],
    ('processor ms for a token', 'MB of the cache'),
    strict=False,
  ):
    ax.set(title=model, xlabel='tokens before it', ylabel=unit)
    ax.set_ylim(bottom=0)
    lengths_axis(ax, one['lengths'])
axes[0].legend()
figure.suptitle(
  ' and '.join([origin(folder), origin(folder, 1).split(', ')[-1]]), fontsize=10
)
plt.show()

# %% [markdown]
# ## An endless text
#
# The same cache through 5 million tokens: loss, time and memory of each
# hundredth.

# %%
folder = newest('stories260k_stream')
found = read(folder, 'five_million.json')['results']['LM-Infinite']
figure, axes = plt.subplots(1, 3, figsize=(14, 3.4))
for ax, key, unit in zip(
  axes,
  ('nats', 'processor_seconds_per_chunk', 'resident_bytes'),
  (1, 1e-3, 1e6),
  strict=True,
):
  ax.plot(np.array(found['position']) / 1e6, np.array(found[key]) / unit)
  ax.set(xlabel='million tokens', ylim=(0, 1.2 * max(found[key]) / unit))
  ax.grid(alpha=0.3)
axes[0].set_ylabel('nats per token')
axes[1].set_ylabel('processor ms for 512 tokens')
axes[2].set_ylabel('memory of the process (MB)')
figure.suptitle(origin(folder), fontsize=10)
plt.show()

# %% [markdown]
# ## LongNet at a million tokens
#
# A million tokens in all, as many short sequences or one long: its paper's
# figure 5, on a CPU. The machine was busy, so that the processor's time is
# told; each repeat is a point.

# %%
folder = newest('longnet')
found = read(folder, 'runtime.json')['results']
figure, ax = plt.subplots(figsize=(8, 4))
for kind, name in (('LongNet', 'LongNet'), ('dense', 'dense causal')):
  rows = [row for row in found if row['kind'] == kind]
  lengths = [row['length'] for row in rows]
  (line,) = ax.plot(
    lengths, [row['cpu_seconds'] for row in rows], marker='_', label=name
  )
  for row in rows:
    times = [repeat['cpu_seconds'] for repeat in row['all']]
    ax.plot([row['length']] * len(times), times, '.', color=line.get_color())
ax.set(xlabel='length of a sequence', ylabel='processor seconds', ylim=(0, 14))
lengths_axis(ax, [row['length'] for row in found if row['kind'] == 'LongNet'])
ax.legend()
ax.set_title(origin(folder), fontsize=10)
plt.show()

# %%
for row in read(folder, 'decoding.json')['results']:
  print(
    f'decoding at {row["position"]:>7,}: {row["cpu_seconds"]:.3f} processor '
    'seconds a token'
  )
for row in read(folder, 'memory.json'):
  print(
    f'a training step of {row["length"]:,} tokens for one {row["device"]}, '
    f'compiled, not run: {row["peak_gib"]} GiB'
  )

# %% [markdown]
# ## GPUs
#
# `make gpu` on a Hopper GPU writes a record of attention against everybody else
# (cuDNN, FlexAttention, FlashAttention, ...). Where there is one, this is its
# table; ratios above 1 say that longjax is faster.

# %%
measured = 0
for folder in sorted(RECORDS.iterdir()):
  path = folder / 'results.json'
  if path.exists() and 'cases' in (found := json.loads(path.read_text())):
    measured += 1
    display(Markdown(f'**{origin(folder)}**\n\n{report.table(found)}'))
if not measured:
  print('No record of a GPU yet: nothing is claimed about speed on one.')
