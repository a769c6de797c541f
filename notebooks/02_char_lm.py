# %% [markdown]
# # A character language model
#
# A small Longformer reads the source code of Python's standard library, which
# is on every machine, character by character. We train it for some minutes,
# look at its curves beside those of counting models, let it write, and look
# where its queries attend.

# %%
import os
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np

sys.path.append('..')  # for configs/
from configs import demo
from longjax import training
from longjax.data import markov
from longjax.evaluation import layer_attention_weights
from longjax.generation import sample
from longjax.patterns.draw import draw_layers

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

STEPS = 4 if SMOKE else 300
WORKDIR = tempfile.mkdtemp()  # name a folder to keep the run, and go on with it
SAMPLE = 20 if SMOKE else 300  # characters

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

# %% [markdown]
# ## The run
#
# A run is a config and a folder. This config is that of `make demo`: four
# layers of 128 whose windows double from 16 keys to 128, rotary positions,
# Muon. Here are the parts that we change, and what comes of the rest.

# %%
config = demo.get_config()
stage = dict(config.stages[0]) | {'steps': STEPS, 'warmup_steps': STEPS // 20}
config.log_every = 10
config.evaluation.update(every=50, validation_characters=16_384)
if SMOKE:
  stage |= {'length': 64, 'batch_size': 2, 'windows': (8, 16)}
  config.model.update(num_layers=2, features=16, num_heads=2)
  config.log_every = 1
  config.evaluation.update(
    length=64,
    stride=32,
    every=2,
    validation_characters=512,
    test_characters=512,
  )
config.stages = (stage,)
config.report = config.tensorboard = False

print('model:', dict(config.model))
print('stage:', stage)

# %%
print(training.train_and_evaluate(config, WORKDIR))

# %% [markdown]
# ## Curves
#
# The folder's `metrics.jsonl` has a line every ten steps. Beside them, models
# that count: of order $n$, they know how often each character followed each $n$
# others in all of the training split.

# %%
trained = training.load(config, WORKDIR)
model, corpus = trained.model, trained.task.corpus
metrics = training.read_metrics(WORKDIR)


def curve(name):
  """Steps and values of the lines that have it."""
  lines = [(line['step'], line[name]) for line in metrics if name in line]
  return zip(*lines, strict=True)


figure, axes = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1))
axes[0].plot(*curve('train/bits_per_character'), label='training')
axes[0].plot(*curve('validation/bits_per_character'), 'o-', label='validation')
validation = corpus.validation[: config.evaluation.validation_characters]
for order, style in ((1, ':'), (2, '--')):
  bits = markov.bits_per_character(
    corpus.train, validation, order, vocab_size=corpus.vocab_size
  )
  axes[0].axhline(bits, color='grey', linestyle=style)
  axes[0].annotate(f'order {order}', (0, bits), va='bottom', fontsize=8)
axes[0].set(xlabel='step', ylabel='bits per character')
axes[0].legend()
axes[1].plot(*curve('train/gradient_norm'), label='gradient norm')
rates = axes[1].twinx()
rates.plot(*curve('train/learning_rate'), color='tab:red')
axes[1].set(xlabel='step', ylabel='gradient norm')
rates.set_ylabel('learning rate', color='tab:red')
for ax in axes:
  ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What it writes
#
# The same prompt, colder and warmer.

# %%
prompt = 'def read_'
for temperature in (0.3, 0.7, 1.0):
  tokens = sample(
    model, corpus.encode(prompt), SAMPLE, temperature=temperature, seed=1
  )
  text = corpus.decode(tokens).decode(errors='replace')
  print(f'--- temperature {temperature}\n{prompt}{text}\n')

# %% [markdown]
# ## What a query may see

# %%
draw_layers(model.patterns, 256, num_heads=model.num_heads)
plt.show()

# %% [markdown]
# ## Where chosen queries attend
#
# `layer_attention_weights` gives the weights of a layer, dense and by the
# definition. We feed a text that the model has not seen and choose two of its
# characters; each row of a picture is a head.

# %%
text = b'''def load(self, path, mode="r"):
    """Load the values of a path."""
    with open(path, mode) as file:
        values = file.read(
'''[:-1]
tokens = np.asarray(corpus.encode(text))[None]
weights = [
  layer_attention_weights(model, tokens, layer)[0]
  for layer in range(len(model.layers))
]


def show(query, before=72):
  """The weights of one query in all heads, on the characters before it."""
  first = max(0, query + 1 - before)
  rows = np.concatenate([w[:, query, first : query + 1] for w in weights])
  figure, ax = plt.subplots(figsize=(13, 0.22 * len(rows) + 0.9))
  ax.imshow(rows, aspect='auto', cmap='Blues', vmax=0.5)
  names = [chr(c) for c in text[first : query + 1]]
  names = [{'\n': '¶', ' ': '·'}.get(name, name) for name in names]
  ax.set_xticks(range(len(names)), names, fontfamily='monospace', fontsize=9)
  heads = len(weights[0])
  ax.set_yticks(
    np.arange(len(weights)) * heads + (heads - 1) / 2,
    [f'layer {layer}' for layer in range(len(weights))],
  )
  for layer in range(1, len(weights)):
    ax.axhline(layer * heads - 0.5, color='black', linewidth=0.6)
  ax.set_title(f'query {query}, {names[-1]!r}', fontsize=10)
  plt.show()


show(text.index(b'mode) as') + 3)  # the last letter of a name seen before

# %%
show(len(text) - 1)  # an open bracket

# %% [markdown]
# ## How far heads look
#
# The mean distance between a query and what it attends to, over a longer text.

# %%
length = 96 if SMOKE else 384
tokens = np.asarray(corpus.validation[:length], np.int32)[None]
distance = np.arange(length)[:, None] - np.arange(length)
looks = np.array(
  [
    (layer_attention_weights(model, tokens, layer)[0] * distance)[:, 64:]
    .sum(axis=-1)
    .mean(axis=-1)
    for layer in range(len(model.layers))
  ]
)
figure, ax = plt.subplots(figsize=(5, 3))
image = ax.imshow(looks, cmap='viridis')
for (layer, head), value in np.ndenumerate(looks):
  ax.text(head, layer, f'{value:.1f}', ha='center', va='center', color='white')
ax.set_xticks(range(looks.shape[1]))
ax.set_yticks(
  range(len(looks)),
  [f'{i}: {p.reach()[0] + 1} keys' for i, p in enumerate(model.patterns)],
)
ax.set(xlabel='head', ylabel='layer', title='mean distance, in characters')
plt.show()

# %% [markdown]
# The upper layers look further, as far as their windows let them, and at
# places: line breaks, words, the bracket that is open. Longer runs, with the
# paper's sizes and windows, are `configs/enwik8_longformer.py` and
# `configs/text8_longformer.py`.
