"""Flax NNX layers: thin shells over `longjax.attention` and plain functions.

Modules hold parameters and static settings, no random state: dropout is on
exactly when a call is given a `dropout_key`.
"""

from longjax.nn.attention import Attention
from longjax.nn.cache import Cache, LayerCache
from longjax.nn.cross_attention import CrossAttention
from longjax.nn.embedding import RelativeEmbedding, dropout
from longjax.nn.global_attention import GlobalAttention
from longjax.nn.post_norm import PostNormBlock
from longjax.nn.transformer import MLP, Block

__all__ = [
  'MLP',
  'Attention',
  'Block',
  'Cache',
  'CrossAttention',
  'GlobalAttention',
  'LayerCache',
  'PostNormBlock',
  'RelativeEmbedding',
  'dropout',
]
