"""Evaluation: bits per character over a whole split, loss by position."""

from longjax.evaluation.bits import BitsPerCharacter, bits_per_character
from longjax.evaluation.length import (
  LossByPosition,
  loss_by_position,
  stream,
  streamed_losses,
  truncated_losses,
)

__all__ = [
  'BitsPerCharacter',
  'LossByPosition',
  'bits_per_character',
  'loss_by_position',
  'stream',
  'streamed_losses',
  'truncated_losses',
]
