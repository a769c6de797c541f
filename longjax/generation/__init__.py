"""Text from trained decoders and encoder-decoders."""

from longjax.generation.beam import generate
from longjax.generation.sample import choose, sample

__all__ = ['choose', 'generate', 'sample']
