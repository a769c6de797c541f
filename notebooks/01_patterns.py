# %% [markdown]
# # Who sees whom
#
# A *pattern* says which keys each query sees, how often, and at which distance
# the position scheme is told they are. Longformer, LongNet and LM-Infinite are
# three patterns; everything else about attention is the same for all of them.
# This notebook draws the patterns, follows what they let through from layer to
# layer, and counts what they cost.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import longjax
from longjax.evaluation.flops import decoder_flops, visible_pairs
from longjax.patterns.draw import draw, draw_heads

# Small sizes, for the tests.
SMOKE = bool(os.environ.get('LONGJAX_SMOKE'))

LENGTH = 16 if SMOKE else 32  # of the pictures
NUM_HEADS = 4
LAYERS_LENGTH = 256 if SMOKE else 1024  # for what layers pass on
COST_LENGTHS = 2 ** np.arange(8, 13 if SMOKE else 21)

plt.rcParams.update({'figure.dpi': 80, 'figure.constrained_layout.use': True})

# %% [markdown]
# ## The three papers
#
# Queries run down, keys run across. Blue cells are seen at their true distance;
# darker ones are seen more than once, and count as often in the softmax.
#
# **Longformer** lets each query see a window. Its upper layers may dilate the
# window in some heads, and a few *global* keys are seen by everyone.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 5))
draw(longjax.SlidingWindow(6, 6), LENGTH, ax=axes[0])
draw(longjax.SlidingWindow(6), LENGTH, ax=axes[1])
draw(
  longjax.SlidingWindow(6, 6),
  LENGTH,
  global_tokens=[0, 11],
  ax=axes[2],
  title='the first with global keys 0 and 11',
)
plt.show()

# %%
# A dilation for each head: what two of the four give up nearby, they gain in
# distance.
draw_heads(longjax.SlidingWindow(6, dilation=(1, 1, 2, 3)), LENGTH, NUM_HEADS)
plt.show()

# %% [markdown]
# **LongNet** cuts the sequence into segments of length $w$ and keeps every
# $r$-th row of each, for several pairs $(w, r)$ at once. Head $j$ begins at row
# $j \bmod r$, so that the heads together leave nothing out. Cells that several
# pairs show are seen as often.

# %%
longnet = longjax.Dilated((8, 16, 32), (1, 2, 4))
draw_heads(longnet, LENGTH, NUM_HEADS)
plt.show()

# %% [markdown]
# **LM-Infinite** shows the last $L$ keys, and the first $G$. Orange cells are
# told another distance than the true one: at most $L$, which the pretrained
# model knows. Up to 20 positions the distance is written into the cell.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 5))
for ax, pattern in zip(
  axes,
  (
    longjax.Lambda(6, 3),
    longjax.Lambda(6, 3, ceiling=False),
    longjax.DistanceCeiling(6),
  ),
  strict=True,
):
  draw(pattern, 16, ax=ax)
plt.show()

# %% [markdown]
# ## Rivals and relatives

# %%
others = (
  longjax.Full(),
  longjax.AttentionSinks(6, 3),  # StreamingLLM
  longjax.SelfExtend(6, 3),
  longjax.BlockwiseCausal(8),
  longjax.BlockwiseCausal(8, longnet),
  longjax.FixedSparse(8, 2),  # the Sparse Transformer
)
figure, axes = plt.subplots(2, 3, figsize=(13, 10))
for ax, pattern in zip(axes.flat, others, strict=True):
  draw(pattern, LENGTH, ax=ax, title=str(pattern).split(', causal')[0])
plt.show()

# %% [markdown]
# ## A picture is what is computed
#
# Pictures are drawn from `pattern.multiplicity`, the definition. Attention
# computes by another way, without a mask over the whole length. With queries
# and keys of zeros every key that is seen weighs the same, and with the unit
# vectors as values the output *is* the weights. So both can be compared:

# %%
zeros = jnp.zeros([1, LENGTH, NUM_HEADS, 16])
units = jnp.broadcast_to(
  jnp.eye(LENGTH)[None, :, None, :], [1, LENGTH, NUM_HEADS, LENGTH]
)
at = np.arange(LENGTH)
for pattern in (longjax.SlidingWindow(6), longnet, longjax.Lambda(6, 3)):
  weights = longjax.attention(zeros, zeros, units, pattern)[0]
  for head in range(NUM_HEADS):
    drawn = pattern.multiplicity(at[:, None], at, head, NUM_HEADS)
    drawn = drawn / drawn.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights[:, head], drawn, atol=1e-6)
  print(f'{pattern}: computed as drawn')

# %% [markdown]
# ## What layers pass on
#
# A query sees few keys, but each of those has seen others in the layer below.
# How many layers bring what stands at a position to the last one? It may go
# through any head, and stay where it is (the residual stream keeps it).


# %%
def layers_needed(length, pattern, num_heads, global_tokens=()):
  """How many layers bring each position's content to the last; inf: never."""
  at = np.arange(length)
  is_global = np.isin(at, global_tokens)
  # Global tokens are seen by all and see all, as in Longformer's encoder.
  sees = is_global | is_global[:, None]
  for head in range(num_heads):
    sees |= pattern.multiplicity(at[:, None], at, head, num_heads) > 0
  needed = np.full(length, np.inf)
  needed[-1] = 0
  for layer in range(1, length):
    reached = needed < layer
    new = sees[reached].any(axis=0) & ~reached
    if not new.any():
      break
    needed[new] = layer
  return needed


def schemes(length):
  """{name: what `layers_needed` wants} at a length."""
  # LongNet's segments and ratios grow geometrically up to the length.
  growth = [4**k for k in range(12) if 16 * 4**k <= length]
  longnet = longjax.Dilated([16 * w for w in growth], growth)
  dilations = (1, 1, 2, 3)
  return {
    'full': (longjax.Full(), 1),
    'window 16': (longjax.SlidingWindow(16), 1),
    'window 16, dilated': (longjax.SlidingWindow(16, dilation=dilations), 4),
    'encoder, window 8 + 8, a global token': (
      longjax.SlidingWindow(8, 8),
      1,
      (0,),
    ),
    'LongNet, a head for each row': (longnet, max(growth)),
    'LongNet, 4 heads': (longnet, 4),
    'Λ, 16 and the first 4': (longjax.Lambda(17, 4), 1),
  }


figure, axes = plt.subplots(figsize=(10, 4.5))
for name, scheme in schemes(LAYERS_LENGTH).items():
  needed = layers_needed(LAYERS_LENGTH, *scheme)
  axes.plot(needed, label=name, linestyle='--' if 'Λ' in name else '-')
axes.set_yscale('symlog', base=2, linthresh=1)
axes.set_yticks([0, 1, 2, 4, 8, 16, 32, 64], [0, 1, 2, 4, 8, 16, 32, 64])
axes.set(
  xlabel=f'position (the last is {LAYERS_LENGTH - 1})',
  ylabel='layers to the last position',
  title='How many layers away is each position?',
)
figure.legend(loc='outside right upper', fontsize=8)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The same as the receptive field of the last position, layer by layer:

# %%
depths = (1, 2, 4, 8, 16)
print(f'{"positions within ... layers":40}', *(f'{n:>6}' for n in depths))
for name, scheme in schemes(LAYERS_LENGTH).items():
  needed = layers_needed(LAYERS_LENGTH, *scheme)
  field = [int((needed <= n).sum()) for n in depths]
  never = int(np.isinf(needed).sum())
  print(
    f'{name:40}',
    *(f'{n:6,}' for n in field),
    f'  {never:,} never' if never else '',
  )

# %% [markdown]
# A window's field grows by its width with each layer, in dilated heads by as
# much more as they skip. A global token puts all pairs two layers apart. Λ's
# first tokens are one layer away; the rest is as far as with a window.
#
# LongNet brings everything within a few layers, *if* there is a head for each
# row that a segment skips: as many heads as the largest ratio. With fewer, a
# causal model never hears of some positions beyond the smaller segments, those
# behind the last row that any head keeps. (The paper's largest ratio is 12, and
# its models have 12 heads or more.)
#
# ## The longest path against length

# %%
figure, axes = plt.subplots(figsize=(10, 4.5))
lengths = [4**k for k in range(3, 6) if 4**k <= LAYERS_LENGTH]
for name in schemes(64):
  longest = [layers_needed(n, *schemes(n)[name]).max() for n in lengths]
  style = '--' if 'Λ' in name else '-'
  axes.plot(lengths, longest, marker='o', linestyle=style, label=name)
axes.set_xscale('log', base=2)
axes.set_yscale('log', base=2)
axes.set(xlabel='length', ylabel='layers', title='From the furthest position')
figure.legend(loc='outside right upper', fontsize=8)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Windows need layers in proportion to the length; LongNet, with its logarithm
# (section 2.4 of its paper). Where a line is missing some positions never
# arrive.
#
# ## What it costs
#
# Keys that a query meets, the mean over queries and heads, counted exactly.
# Now with sizes as the papers have them.

# %%
papers = {
  'full': longjax.Full(),
  'Longformer, window 512': longjax.SlidingWindow(511),
  'LongNet': longjax.Dilated(
    (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
  ),
  'LM-Infinite, 4096 and 10': longjax.Lambda(4096, 10),
  'Sparse Transformer, 2048 and 8': longjax.FixedSparse(2048, 8),
}
figure, axes = plt.subplots(1, 2, figsize=(13, 4.5))
for name, pattern in papers.items():
  keys, share = [], []
  for length in map(int, COST_LENGTHS):
    pairs = sum(visible_pairs(pattern, length, 12))
    keys.append(pairs / (12 * length))
    flops = decoder_flops(
      length,
      vocab_size=50_000,
      features=768,
      num_heads=12,
      patterns=[pattern] * 12,
    )
    share.append(sum(x.attention for x in flops.layers) / flops.total)
  axes[0].plot(COST_LENGTHS, keys, label=name)
  axes[1].plot(COST_LENGTHS, share, label=name)
for ax in axes:
  ax.set_xscale('log', base=2)
  ax.set_xlabel('length')
  ax.grid(alpha=0.3)
axes[0].set_yscale('log')
axes[0].set_ylabel('keys that a query meets')
axes[0].legend(fontsize=8)
axes[1].set_ylabel('share of attention in all operations')
axes[1].set_title('A model of 12 layers of 768', fontsize=10)
axes[1].set_ylim(0, 1)
plt.show()

# %% [markdown]
# Beyond its window or its longest segment a pattern costs the same for every
# further token; full attention, and in the end the Sparse Transformer, do not.
# The projections and MLPs of this model cost as much as meeting 7,000 keys, so
# that at a few thousand tokens the pattern matters little, and at a million
# full attention is nearly all of the work.
