"""What a training step keeps for its backward pass, and what it computes again.

Ways to trade time for memory: `jax.checkpoint` with a named policy around each
block, and pieces of the sequence one after the other where tokens do not meet.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from longjax.ops.call import SAVED
from longjax.sharding import shards

_policies = jax.checkpoint_policies
# What is kept of a block besides its input.
POLICIES = {
  # Nothing: least memory, one more forward pass.
  'block': _policies.nothing_saveable,
  # What attention returned and its log-sum-exp: it is not computed again.
  'attention': _policies.save_only_these_names(*SAVED),
  # Products with weights: only attention and what is elementwise is again.
  'dots': _policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: bool | str):
  """Raises ValueError unless `checkpointed` knows it."""
  if not isinstance(remat, bool) and remat not in POLICIES:
    raise ValueError(
      f'remat {remat!r} is not one of {tuple(POLICIES)}, True (for '
      "'block') or False"
    )


def checkpointed(f: Callable, remat: bool | str) -> Callable:
  """f, of which the backward pass keeps what the policy says.

  Args:
    f: a function of arrays.
    remat: a name in `POLICIES`, True for 'block', False to keep everything.
  """
  if remat is False:
    return f
  return jax.checkpoint(f, policy=POLICIES['block' if remat is True else remat])


def check_remat_blocks(remat_blocks: int, num_layers: int, scan: bool):
  """Raises ValueError unless `through_layers` takes it."""
  if remat_blocks < 1:
    raise ValueError(f'remat_blocks must be at least 1, got {remat_blocks}')
  if scan and num_layers % remat_blocks:
    raise ValueError(
      f'remat_blocks {remat_blocks} does not divide the {num_layers} layers, '
      'as it has to with scan_layers'
    )


def through_layers(
  run: Callable,
  layers: Sequence[nnx.Module],
  x,
  *,
  scan: bool = False,
  remat_blocks: int = 1,
):
  """x after all layers.

  Args:
    run: (layer, its number, x) -> x.
    layers: in their order.
    x: the first one's input.
    scan: in a loop, so that one layer is compiled: they may then differ in
      their parameters only.
    remat_blocks: of so many layers in a row the input of the first is kept for
      the backward pass, which computes those of the others again: one more
      forward pass if 2 or more, and inputs of layers / remat_blocks +
      remat_blocks in memory instead of one for each layer.
  """
  if not scan:
    for first in range(0, len(layers), remat_blocks):
      some = range(first, min(first + remat_blocks, len(layers)))

      def run_some(x, some=some):
        for number in some:
          x = run(layers[number], number, x)
        return x

      x = checkpointed(run_some, remat_blocks > 1)(x)
    return x
  graphs, states = zip(*map(nnx.split, layers), strict=True)
  stacked = jax.tree.map(lambda *y: jnp.stack(y), *states)

  def one(x, layer):
    number, state = layer
    return run(nnx.merge(graphs[0], state), number, x), None

  def run_all(x, layers):
    return jax.lax.scan(one, x, layers)[0], None

  numbered = (jnp.arange(len(graphs)), stacked)
  if remat_blocks == 1:
    return run_all(x, numbered)[0]
  grouped = jax.tree.map(
    lambda y: y.reshape(-1, remat_blocks, *y.shape[1:]), numbered
  )
  return jax.lax.scan(checkpointed(run_all, True), x, grouped)[0]


def in_pieces(f: Callable, size: int | None, *arrays):
  """f of arrays [batch, length, ...], `size` positions at a time.

  The backward pass computes each piece again, so that what f makes in between
  exists for one piece only.

  Args:
    f: pieces [batch, positions, ...] -> an array of the same leading axes,
      whose positions do not meet.
    size: positions in a piece; the last may have fewer. None for all of them,
      kept.
    *arrays: equal in their leading axes.
  """
  length = arrays[0].shape[1]
  if size is None or size >= length:
    return f(*arrays)
  count = length // size

  @jax.checkpoint
  def of_piece(first, *pieces):
    with shards.piece(first, length):
      return f(*pieces)

  def cut(x):
    pieces = x[:, : count * size].reshape(len(x), count, size, *x.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)

  starts = jnp.arange(count) * size
  y = jax.lax.map(lambda x: of_piece(*x), (starts, *map(cut, arrays)))
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(len(y), count * size, *y.shape[3:])
  if count * size == length:
    return y
  last = of_piece(count * size, *(x[:, count * size :] for x in arrays))
  return jnp.concatenate([y, last], axis=1)
