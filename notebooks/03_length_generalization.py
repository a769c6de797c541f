# %% [markdown]
# # Beyond the trained length
#
# A language model with rotary positions fails on texts longer than those it was
# trained on. LM-Infinite's answer changes no weight: a query sees the last $L$
# tokens and the first few (the Λ-mask), and no distance above $L$ is told (the
# ceiling). Here a model is trained, or one is taken that you name, and read far
# beyond its length with and without each half of the method.

# %%
import os
import sys
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import longjax

sys.path.append('..')  # for configs/ and experiments/
from configs import common, text8_rope_lm_infinite
from experiments.measure import Afresh, variants
from experiments.subject import Subject
from longjax import training
from longjax.evaluation import (
  layer_attention_weights,
  loss_by_position,
  stream,
  streamed_losses,
  truncated_losses,
)

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

# A folder in Hugging Face's format, a llama2.c .bin, or the folder of a run,
# with the length it was trained at and a text; "" to train a model here.
MODEL, TOKENIZER, TEXT = '', '', ''
TRAINED = 32 if SMOKE else 256  # tokens
START = 4 if SMOKE else 10  # first tokens that stay visible

STEPS = 3 if SMOKE else 300
LENGTH = TRAINED * (4 if SMOKE else 32)
TEXTS = 2 if SMOKE else 6
STREAM = 1_000 if SMOKE else 100_000  # tokens

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

# %% [markdown]
# ## A model
#
# Four layers of 128 with RoPE, RMSNorm and SwiGLU, as LLaMA has them, learn the
# source code of Python's standard library by characters, with full attention to
# at most `TRAINED` of them.

# %%
if not MODEL:
  config = text8_rope_lm_infinite.get_config(f'steps={STEPS}')
  config.data.name = 'python_source'
  config.stages = (
    dict(config.stages[0])
    | {'length': TRAINED, 'batch_size': 2 if SMOKE else 16},
  )
  config.evaluation.update(length=TRAINED, stride=TRAINED // 2)
  config.log_every = 20
  if SMOKE:
    config.model.update(num_layers=1, features=16, mlp_features=16)
    config.evaluation.test_characters = 256
  MODEL = tempfile.mkdtemp()
  print(training.train_and_evaluate(config, MODEL))

measured = common.measurements(trained_length=TRAINED, start=START)
measured.model.update(path=MODEL, tokenizer=TOKENIZER)
measured.text.path = TEXT  # of a run by default its test split
subject = Subject(measured)
texts = subject.texts(TEXTS, LENGTH)
print(f'{TEXTS} texts of {LENGTH:,} tokens; the first begins')
print(subject.tokenizer.decode(texts[0, :160]))

# %% [markdown]
# ## Loss by position
#
# The weights are the same in every line; what differs is who sees whom, and
# what the position scheme is told. "Independent blocks" is the plain model
# begun anew every `TRAINED` tokens: what one had to beat.

# %%
known = variants(TRAINED, START)
labels = (
  'vanilla',
  'mask only',
  'ceiling only',
  'window only',
  'LM-Infinite',
  'independent blocks',
)
losses = {}
for label in labels:
  variant = known[label]
  if isinstance(variant, Afresh):
    plain = subject.load(longjax.Full())
    losses[label] = truncated_losses(
      plain, texts, length=TRAINED, stride=variant.stride
    )
  else:
    # One text at a time, as a whole: chunk says how much is read at once.
    model = subject.load(variant)
    losses[label] = np.concatenate(
      [streamed_losses(model, text[None], chunk=LENGTH) for text in texts]
    )

# %%
# Four bins an octave.
edges = np.geomspace(
  TRAINED // 4, LENGTH, 4 * int(np.log2(LENGTH / TRAINED) + 2) + 1
)
edges = [1, *np.unique(edges.astype(int))]
figure, ax = plt.subplots(figsize=(11, 4.5))
for label in labels:
  curve = loss_by_position(losses[label], edges)
  centres = np.add(curve.edges[1:], curve.edges[:-1]) / 2
  (line,) = ax.plot(centres, curve.mean, label=label)
  ax.fill_between(
    centres, curve.low, curve.high, color=line.get_color(), alpha=0.1
  )
ax.axvline(TRAINED, color='grey', linestyle=':')
ax.set_xscale('log', base=2)
ax.set(
  xlabel='position (the dotted line is the trained length)',
  ylabel='nats per token',
)
ax.grid(alpha=0.3)
figure.legend(loc='outside right upper')
plt.show()

# %%
doublings = [TRAINED * 2**i for i in range(int(np.log2(LENGTH / TRAINED)) + 1)]
pairs = list(zip(doublings, doublings[1:], strict=False))
print(f'{"nats per token":20}', *(f'{f"{a}-{b}":>11}' for a, b in pairs))
for label in labels:
  means = loss_by_position(losses[label], doublings).mean
  print(f'{label:20}', *(f'{mean:11.3f}' for mean in means))

gap = losses['LM-Infinite'] - losses['independent blocks']
gap = gap[:, TRAINED:].mean(axis=1)
print(
  f'\nLM-Infinite less independent blocks: {gap.mean():+.4f} nats, '
  f'by text {np.round(gap, 4)}'
)

# %% [markdown]
# Bands are 95% confidence over the texts: most of the ups and downs are the
# texts'. The plain model leaves its level soon after the trained length, the
# ceiling alone more slowly; LM-Infinite stays.
#
# In the paper, on large pretrained models, the mask alone and the window alone
# fail too. A model that was trained for minutes on pieces that begin anywhere
# has not learnt to look at the first characters, and does well without: what
# the first tokens are worth needs a model that looks at them (name one above).
#
# ## Why the plain model fails
#
# The paper names two reasons: distances that were never trained, and more
# tokens than ever to spread attention over. The second can be seen: the entropy
# of attention, of each query in the last layer, the mean over heads.

# %%
seen = min(LENGTH, 8 * TRAINED, 1024)
figure, ax = plt.subplots(figsize=(11, 3.5))
for label in ('vanilla', 'ceiling only', 'LM-Infinite'):
  weights = layer_attention_weights(
    subject.load(known[label]), texts[:1, :seen], -1
  )[0]
  entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1).mean(0)
  smooth = np.convolve(entropy, np.ones(16) / 16, mode='valid')
  ax.plot(np.arange(16, seen + 1), smooth, label=label)
ax.axvline(TRAINED, color='grey', linestyle=':')
ax.set(xlabel='position', ylabel='entropy of attention (nats)')
ax.grid(alpha=0.3)
figure.legend(loc='outside right upper')
plt.show()

# %% [markdown]
# ## Without end
#
# With the Λ-mask a cache of $L$ keys and the first few is enough, however long
# the text: loss, time and memory stay as they are.

# %%
tokens = subject.up_to(STREAM)
model = subject.load(known['LM-Infinite'])
position, nats, milliseconds = [], [], []
for piece in stream(model, tokens[None], chunk=TRAINED):
  position.append(piece.first)
  nats.append(piece.losses.mean())
  milliseconds.append(1e3 * piece.seconds)
  size = sum(x.nbytes for x in jax.tree.leaves(piece.cache))
print(f'{len(tokens):,} tokens; the cache has {size:,} bytes throughout')

figure, axes = plt.subplots(1, 2, figsize=(12, 3.5))
axes[0].plot(position, nats, linewidth=0.7)
axes[0].set(ylabel='nats per token', xlabel='position', ylim=(0, None))
axes[1].plot(position[1:], milliseconds[1:], linewidth=0.7)
axes[1].set(
  ylabel=f'milliseconds for {TRAINED} tokens',
  xlabel='position',
  ylim=(0, 4 * np.median(milliseconds)),
)
for ax in axes:
  ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The times are the clock's of a machine that may have done other work as well.
# Larger measurements, with records, are `python -m experiments.main
# --mode=measure` with `configs/lm_infinite_*.py`; their results are in
# `experiments/records/`.
