"""The same attention with the sequence split over a mesh of devices."""

from longjax.sharding.all_to_all import all_to_all_attention
from longjax.sharding.attention import sharded_attention
from longjax.sharding.exchange import merge_over_axis, varying
from longjax.sharding.layers import attention_to_all, self_attention
from longjax.sharding.mesh import make_mesh
from longjax.sharding.shards import map_shards

__all__ = [
  'all_to_all_attention',
  'attention_to_all',
  'make_mesh',
  'map_shards',
  'merge_over_axis',
  'self_attention',
  'sharded_attention',
  'varying',
]
