# %% [markdown]
# # Bring your own model
#
# A folder in Hugging Face's format (LLaMA 1 to 3, Mistral, GPT-J, MPT) is
# loaded, its attention is swapped for another, both are measured on long texts,
# and the result is saved as a folder that transformers reads. No PyTorch, no
# network. Name a folder of yours below; without one, a tiny LLaMA is made here.

# %%
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import longjax
from longjax import data, models
from longjax.evaluation import loss_by_position, streamed_losses
from longjax.generation import sample
from longjax.interop import (
  config_of,
  load_pretrained,
  load_tokenizer,
  read_config,
  save_pretrained,
)

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

FOLDER = ''  # of your model; '' to make one
TEXT = ''  # a file of plain text; '' for the source of Python's library
TRAINED = 32 if SMOKE else 128  # tokens, as its config.json says
STEPS = 3 if SMOKE else 500  # of the model made here
LENGTH = TRAINED * (4 if SMOKE else 32)  # of the texts it is measured on
TEXTS = 2 if SMOKE else 8

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

# %% [markdown]
# ## A text

# %%
if TEXT:
  train, test = None, pathlib.Path(TEXT).read_text()
else:
  corpus = data.load('python_source')
  train, test = (
    corpus.decode(split).decode(errors='replace')
    for split in (corpus.train, corpus.test)
  )
print(test[:200])

# %% [markdown]
# ## A folder
#
# If you named one, nothing happens here. Otherwise: a byte-level BPE of 512
# pieces, a LLaMA of two layers of 64 that learns the same text for a minute
# with a loop of a dozen lines, and the three files that such a folder has.


# %%
def make_tokenizer(path):
  import tokenizers

  tokenizer = tokenizers.ByteLevelBPETokenizer()
  tokenizer.train_from_iterator([train], vocab_size=512, show_progress=False)
  tokenizer.save(str(path))


def train_tiny(keywords, tokens):
  """A LLaMA trained on pieces of `TRAINED` tokens, and its losses."""
  model = longjax.DecoderLM(
    **keywords, patterns=longjax.Full(), rngs=nnx.Rngs(0)
  )
  graphdef, params = nnx.split(model, nnx.Param)
  optimizer = optax.adamw(
    optax.warmup_cosine_decay_schedule(0, 3e-3, STEPS // 10, STEPS)
  )

  def loss_fn(params, batch):
    logits = nnx.merge(graphdef, params)(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch[:, 1:]
    ).mean()

  @jax.jit
  def step(params, state, batch):
    loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  rng, state, losses = np.random.default_rng(0), optimizer.init(params), []
  for _ in range(STEPS):
    first = rng.integers(0, len(tokens) - TRAINED - 1, (16, 1))
    batch = jnp.asarray(tokens[first + np.arange(TRAINED + 1)])
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))
  return nnx.merge(graphdef, params), losses


if not FOLDER:
  train = train[: 100_000 if SMOKE else 1_000_000]
  FOLDER = tempfile.mkdtemp()
  make_tokenizer(f'{FOLDER}/tokenizer.json')
  keywords = models.llama(
    vocab_size=load_tokenizer(FOLDER).vocab_size,
    num_layers=2,
    features=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_features=176,
  )
  encoded = np.array(load_tokenizer(FOLDER).encode(train))
  tiny, losses = train_tiny(keywords, encoded)
  save_pretrained(tiny, FOLDER, config_of(keywords, max_length=TRAINED))
  print(f'{losses[0]:.2f} nats per token at first, {losses[-1]:.2f} at last')

# %% [markdown]
# ## Load it
#
# The config says what the model is and at which length it was trained.

# %%
for path in sorted(pathlib.Path(FOLDER).iterdir()):
  print(f'{path.name:24} {path.stat().st_size:>12,} bytes')
config = read_config(FOLDER)
print(json.dumps(config, indent=1))

model, tokenizer = load_pretrained(FOLDER), load_tokenizer(FOLDER)
count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
print(f'{count:,} parameters, layers of {model.patterns[0]}')

# %%
prompt = 'def main(args):\n    '
tokens = sample(model, tokenizer.encode(prompt), 60, temperature=0.7)
print(prompt + tokenizer.decode(tokens))

# %% [markdown]
# ## Swap its attention
#
# `patterns=` is one pattern for all layers or one for each; no weight changes.
# Each is measured on texts far longer than the model was trained at, every
# token given all that the pattern lets it see.

# %%
encoded = np.array(tokenizer.encode(test[: 12 * TEXTS * LENGTH]))
texts = encoded[: TEXTS * LENGTH].reshape(TEXTS, LENGTH)

layers = len(model.layers)
patterns = {
  'as it was trained': None,
  'window': longjax.SlidingWindow(TRAINED - 1),
  'LM-Infinite': longjax.Lambda(TRAINED, 4),
  'StreamingLLM': longjax.AttentionSinks(TRAINED - 4, 4),
  'Self-Extend': longjax.SelfExtend(TRAINED // 2, 8),
  'LongNet': longjax.Dilated((TRAINED // 2, TRAINED, TRAINED * 2), (1, 2, 4)),
  'half windows below, LM-Infinite on top': [
    longjax.SlidingWindow(TRAINED // 2 - 1)
  ]
  * (layers - 1)
  + [longjax.Lambda(TRAINED, 4)],
}
losses = {}
for name, pattern in patterns.items():
  swapped = load_pretrained(FOLDER, patterns=pattern)
  # One text after the other, each as a whole: memory for one is enough.
  losses[name] = np.concatenate(
    [streamed_losses(swapped, text[None], chunk=LENGTH) for text in texts]
  )

# %%
# Four bins an octave.
edges = np.geomspace(
  TRAINED // 4, LENGTH, 4 * int(np.log2(LENGTH / TRAINED) + 2) + 1
)
edges = [1, *np.unique(edges.astype(int))]
figure, ax = plt.subplots(figsize=(12, 4.5))
for name in patterns:
  curve = loss_by_position(losses[name], edges)
  centres = np.add(curve.edges[1:], curve.edges[:-1]) / 2
  ax.plot(centres, curve.mean, label=name)
ax.axvline(TRAINED, color='grey', linestyle=':')
ax.set_xscale('log', base=2)
ax.set(
  xlabel='position (the dotted line is the trained length)',
  ylabel='nats per token',
)
ax.grid(alpha=0.3)
figure.legend(loc='outside right upper', fontsize=9)
plt.show()

within, beyond = (
  {name: part(loss).mean() for name, loss in losses.items()}
  for part in (lambda x: x[:, : TRAINED - 1], lambda x: x[:, TRAINED:])
)
print(f'{"nats per token":40} within {TRAINED:>5}   beyond')
for name in patterns:
  print(f'{name:40} {within[name]:12.3f} {beyond[name]:8.3f}')

# %% [markdown]
# LongNet's pattern is of another kind: this model was not trained with it, and
# segments cut off what lies before them. It would have to be trained so.
#
# ## Save it
#
# The weights as they were, with the config they came with. A window of keys is
# something that Hugging Face has a name for: with one in every layer a LLaMA is
# a Mistral.

# %%
out = pathlib.Path(tempfile.mkdtemp())
save_pretrained(model, out / 'same', config)
again = load_pretrained(out / 'same')
same = jax.tree.map(
  lambda a, b: bool((a == b).all()), *map(nnx.state, (model, again))
)
print('same weights:', all(jax.tree.leaves(same)))

# %%
if config['model_type'] == 'llama':
  # What a LLaMA's config lacks for a Mistral; the window counts the query too.
  mistral = config | {
    'model_type': 'mistral',
    'architectures': ['MistralForCausalLM'],
    'sliding_window': TRAINED,
  }
  save_pretrained(model, out / 'mistral', mistral)
  windowed = load_pretrained(out / 'mistral')
  print(windowed.patterns)
  difference = np.abs(
    streamed_losses(windowed, texts[:1], chunk=LENGTH) - losses['window'][:1]
  ).max()
  print(f'largest difference from the window above: {difference:.1e} nats')
