"""Evaluation: bits per character over a whole split, loss by position, where
queries attend."""

from longjax.evaluation.bits import BitsPerCharacter, bits_per_character
from longjax.evaluation.length import (
  LossByPosition,
  loss_by_position,
  stream,
  streamed_losses,
  truncated_losses,
)
from longjax.evaluation.weights import layer_attention_weights

__all__ = [
  'BitsPerCharacter',
  'LossByPosition',
  'bits_per_character',
  'layer_attention_weights',
  'loss_by_position',
  'stream',
  'streamed_losses',
  'truncated_losses',
]
