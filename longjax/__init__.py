"""longjax: long-context attention for JAX.

Longformer, LongNet and LM-Infinite as three small descriptions of who sees
whom (`SlidingWindow`, `Dilated`, `Lambda`), computed by one `attention`.

Public names are bound when first used, so `import longjax` is cheap and never
initialises a JAX backend.
"""

import importlib

__version__ = '0.1.0'

_PUBLIC = {
  'attention': 'longjax.ops.attention',
  'attention_weights': 'longjax.ops.weights',
  'MiddleKeys': 'longjax.ops.middle',
  'Pattern': 'longjax.patterns',
  'SlidingWindow': 'longjax.patterns',
  'Dilated': 'longjax.patterns',
  'Lambda': 'longjax.patterns',
  'AttentionSinks': 'longjax.patterns',
  'DistanceCeiling': 'longjax.patterns',
  'SelfExtend': 'longjax.patterns',
  'Full': 'longjax.patterns',
  'BlockwiseCausal': 'longjax.patterns',
  'FixedSparse': 'longjax.patterns',
  'RoPE': 'longjax.positions',
  'XPos': 'longjax.positions',
  'ALiBi': 'longjax.positions',
  'TransformerXL': 'longjax.positions',
  'DecoderLM': 'longjax.models',
  'Longformer': 'longjax.models',
  'LED': 'longjax.models',
}
_ROOMS = (
  'data',
  'evaluation',
  'generation',
  'interop',
  'models',
  'nn',
  'ops',
  'patterns',
  'positions',
  'sharding',
  'training',
)

__all__ = [*_PUBLIC, *_ROOMS]


def __getattr__(name):
  if name in _PUBLIC:
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
  elif name in _ROOMS:
    value = importlib.import_module(f'longjax.{name}')
  else:
    raise AttributeError(f"module 'longjax' has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__():
  return sorted({*globals(), *__all__})
