"""Text from a trained decoder."""

from longjax.generation.sample import choose, sample

__all__ = ['choose', 'sample']
