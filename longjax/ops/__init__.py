"""How attention is computed.

Shape letters of the room: B batch, T queries, S keys, H heads, K kv heads,
R = H / K, D head size, E value size, G globals; a small b is B or 1.
"""

from longjax.ops.attention import attention
from longjax.ops.merge import merge
from longjax.ops.weights import attention_weights

__all__ = ['attention', 'attention_weights', 'merge']
