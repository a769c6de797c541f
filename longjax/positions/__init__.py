"""How position enters attention: pure functions, float32 angles."""

from longjax.positions.absolute import sinusoidal
from longjax.positions.base import Position
from longjax.positions.relative import ALiBi, TransformerXL, alibi_slopes
from longjax.positions.rope_scaling import (
  LinearScaling,
  Llama3Scaling,
  RoPEScaling,
  YarnScaling,
)
from longjax.positions.rotary import RoPE, XPos

__all__ = [
  'ALiBi',
  'LinearScaling',
  'Llama3Scaling',
  'Position',
  'RoPE',
  'RoPEScaling',
  'TransformerXL',
  'XPos',
  'YarnScaling',
  'alibi_slopes',
  'sinusoidal',
]
