"""How position enters attention: pure functions, float32 angles."""

from longjax.positions.absolute import sinusoidal
from longjax.positions.base import Position
from longjax.positions.relative import ALiBi, TransformerXL, alibi_slopes
from longjax.positions.rotary import RoPE, XPos

__all__ = [
  'ALiBi',
  'Position',
  'RoPE',
  'TransformerXL',
  'XPos',
  'alibi_slopes',
  'sinusoidal',
]
