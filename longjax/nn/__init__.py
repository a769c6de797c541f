"""Flax NNX layers: thin shells over `longjax.attention` and plain functions.

Modules hold parameters and static settings, no random state: dropout is on
exactly when a call is given a `dropout_key`.
"""

from longjax.nn.attention import Attention
from longjax.nn.cache import Cache, LayerCache
from longjax.nn.embedding import RelativeEmbedding, dropout
from longjax.nn.transformer import MLP, Block

__all__ = [
  'MLP',
  'Attention',
  'Block',
  'Cache',
  'LayerCache',
  'RelativeEmbedding',
  'dropout',
]
