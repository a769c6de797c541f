"""Evaluation: bits per character over a whole split."""

from longjax.evaluation.bits import BitsPerCharacter, bits_per_character

__all__ = ['BitsPerCharacter', 'bits_per_character']
