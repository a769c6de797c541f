"""LongNet's models (arXiv 2307.02486) as keywords, and an encoder of slides.

MAGNETO (arXiv 2210.06423) blocks with dilated attention and xPos. The paper
names neither the activation nor whether embeddings are scaled: GELU and
sqrt(features) are what its authors' library has.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.models.decoder import INIT_STD
from longjax.models.encoder import Encoder
from longjax.nn.transformer import make_norm
from longjax.patterns import Dilated
from longjax.positions import sinusoidal
from longjax.sharding import shards

# Table 4: layers, width and heads.
SIZES = {
  '125m': (12, 768, 12),
  '350m': (24, 1024, 16),
  '760m': (24, 1536, 16),
  '2.7b': (32, 2560, 32),
}
# Section 4.2, trained at 32K.
SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
RATIOS = (1, 2, 4, 6, 12)
CL100K = 100_277


def longnet(size: str = '125m', **overrides) -> dict:
  """Keywords of `DecoderLM` for a size of Table 4.

  `patterns` and `rngs` are left to the caller:
  `DecoderLM(**longnet('125m', patterns=schedule(8192)), rngs=nnx.Rngs(0))`.

  Args:
    size: '125m', '350m', '760m' or '2.7b', as the paper names them: not quite
      what they hold (with cl100k's 100,277 tokens 162M, 405M, 834M and 2.8B).
    **overrides: further keywords, such as tie_embedding=False for a read-out of
      its own.

  Raises:
    ValueError: for another size.
  """
  if size not in SIZES:
    raise ValueError(f'size {size!r} is not one of {tuple(SIZES)}')
  num_layers, features, num_heads = SIZES[size]
  return {
    'vocab_size': CL100K,
    'num_layers': num_layers,
    'features': features,
    'num_heads': num_heads,
    'mlp_features': 4 * features,
    **magneto(),
    'position': 'xpos',
    'tie_embedding': True,
    'scale_embedding': True,
    **overrides,
  }


def magneto() -> dict:
  """What MAGNETO's blocks have, as keywords of `DecoderLM` or `Encoder`."""
  return {
    'norm': 'layer',
    'norm_epsilon': 1e-5,
    'sub_norm': True,
    'mlp': 'gelu',
    'attention_bias': True,
    'mlp_bias': True,
  }


def schedule(length: int, **options) -> Dilated:
  """Section 4.2's mixture for a training length: its segments up to there.

  Args:
    length: that the model is trained at, >= 2048.
    **options: further arguments of `Dilated`.

  Raises:
    ValueError: for a length below the shortest segment.
  """
  count = sum(w <= length for w in SEGMENT_LENGTHS)
  if not count:
    raise ValueError(
      f'length {length} is below the shortest segment {SEGMENT_LENGTHS[0]}'
    )
  return Dilated(SEGMENT_LENGTHS[:count], RATIOS[:count], **options)


def gigapath_schedule(max_tokens: int = 2**20) -> Dilated:
  """Prov-GigaPath's mixture: five lengths from 1024 to `max_tokens`, in equal
  steps of their logarithms (1024, 5792, 32768, 185363, 1048576), both ways."""
  if max_tokens < 1024:
    raise ValueError(f'max_tokens must be at least 1024, got {max_tokens}')
  exponents = np.linspace(10, int(np.log2(max_tokens)), 5)
  return Dilated(
    tuple(int(w) for w in np.power(2, exponents).astype(int)),
    (1, 2, 4, 8, 16),
    causal=False,
    offsets='torchscale',
    detach_weights=True,
  )


class SlideEncoder(nnx.Module):
  """Prov-GigaPath's slide encoder: tiles of an image, anywhere on a grid.

  A projection of each tile's features, two-dimensional sinusoids of its place,
  a class token before them, an `Encoder`, and a norm of the class token or of
  the mean over tiles.
  """

  def __init__(
    self,
    tile_features: int,
    num_layers: int,
    features: int,
    num_heads: int,
    *,
    patterns,
    tile_size: int = 256,
    grid: int = 1000,
    pool: str = 'class',
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
    **encoder,
  ):
    """Args, besides those of `Encoder`:

    tile_features: size of each tile's features.
    tile_size: of a tile's side, in the unit of coordinates.
    grid: tiles along a side of the largest image.
    pool: 'class' for the class token's state, 'mean' for the tiles' mean.
    """
    if features % 4:
      raise ValueError(f'features={features} must be a multiple of 4')
    if pool not in ('class', 'mean'):
      raise ValueError(f"pool {pool!r} is not one of ('class', 'mean')")
    self.tile_features, self.features = tile_features, features
    self.tile_size, self.grid, self.pool = tile_size, grid, pool
    self.tile_projection = nnx.Linear(
      tile_features,
      features,
      kernel_init=nnx.initializers.glorot_uniform(),
      dtype=jnp.dtype(dtype),
      param_dtype=param_dtype,
      rngs=rngs,
    )
    init = nnx.initializers.normal(INIT_STD)
    shape = (1, 1, features)
    self.class_token = nnx.Param(init(rngs.params(), shape, param_dtype))
    self.encoder = Encoder(
      num_layers,
      features,
      num_heads,
      patterns=patterns,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
      **encoder,
    )
    self.norm = make_norm(
      'layer', features, epsilon=1e-6, param_dtype=param_dtype, rngs=rngs
    )

  def __call__(
    self, tiles, coordinates, *, valid=None, dropout_key=None, all_layers=False
  ):
    """One embedding of each slide.

    Args:
      tiles: [batch, tiles, tile_features].
      coordinates: [batch, tiles, 2], of the tiles' corners.
      valid: bool [batch, tiles], False for padding; None for all True.
      dropout_key: turns dropout on.
      all_layers: return a list, for the states before the first block and after
        each, instead.

    Returns:
      float32 [batch, features], or the list of such.

    Raises:
      ValueError: for other shapes, or tiles beyond the grid (inside of `jit`,
        where they are not known, they are placed beyond it).
    """
    if shards.sequence_axis() is not None:
      raise NotImplementedError(
        'a slide split over devices: the class token is one more than its tiles'
      )
    batch, count = tiles.shape[:2] if tiles.ndim == 3 else (-1, -1)
    if tiles.shape != (batch, count, self.tile_features) or not count:
      raise ValueError(
        f'tiles must have shape [batch, tiles >= 1, {self.tile_features}], got '
        f'{tiles.shape}'
      )
    if coordinates.shape != (batch, count, 2):
      raise ValueError(
        f'coordinates must have shape {(batch, count, 2)}, got '
        f'{coordinates.shape}'
      )
    place = jnp.floor(coordinates / self.tile_size).astype(jnp.int32)
    if not isinstance(place, jax.core.Tracer):
      outside = (place < 0) | (place >= self.grid)
      if (outside if valid is None else outside & valid[..., None]).any():
        raise ValueError(
          f'a tile lies outside of the grid of {self.grid} x {self.grid} tiles '
          f'of {self.tile_size}'
        )
    # The second coordinate comes first, as in the pretrained model.
    place = jnp.concatenate(
      [sinusoidal(place[..., axis], self.features // 2) for axis in (1, 0)], -1
    )
    x = self.tile_projection(tiles)
    x = x + place.astype(x.dtype)
    first = jnp.broadcast_to(
      self.class_token[...].astype(x.dtype), (batch, 1, self.features)
    )
    ids = None
    if valid is not None:
      ids = jnp.pad(jnp.where(valid, 0, -1), ((0, 0), (1, 0)))
    out, states = self.encoder(
      jnp.concatenate([first, x], axis=1),
      segment_ids=ids,
      dropout_key=dropout_key,
      return_states=True,
    )
    if all_layers:
      return [self._pooled(state, valid) for state in states]
    return self._pooled(out, valid)

  def _pooled(self, x, valid):
    if self.pool == 'class':
      return self.norm(x)[:, 0]
    weights = 1.0 if valid is None else valid[..., None].astype(jnp.float32)
    x = x[:, 1:].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(jnp.broadcast_to(weights, x.shape), axis=1), 1)
    return self.norm((x * weights).sum(axis=1) / count)
