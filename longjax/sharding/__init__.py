"""The same attention with the sequence split over a mesh of devices."""

from longjax.sharding.all_to_all import all_to_all_attention
from longjax.sharding.attention import sharded_attention
from longjax.sharding.exchange import merge_over_axis, varying
from longjax.sharding.mesh import make_mesh

__all__ = [
  'all_to_all_attention',
  'make_mesh',
  'merge_over_axis',
  'sharded_attention',
  'varying',
]
