"""Texts as arrays of tokens, and batches of them.

`load` reads a text by name into a `Corpus`; `Batches` iterates over one of its
splits. Nothing here uses JAX, so workers that only load data stay small.
"""

from longjax.data.batches import Batches
from longjax.data.corpus import Corpus
from longjax.data.loading import load

__all__ = ['Batches', 'Corpus', 'load']
