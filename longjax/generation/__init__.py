"""Text from trained decoders and encoder-decoders."""

from longjax.generation.beam import decode, generate
from longjax.generation.sample import choose, sample

__all__ = ['choose', 'decode', 'generate', 'sample']
