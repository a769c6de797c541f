"""A text and a config small enough to train on within a test."""

import random


def write_text(path, words=6000, seed=0):
  """A file of random words: learnable, and the same everywhere."""
  generator = random.Random(seed)
  vocabulary = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'lazy', 'dog']
  path.write_text(' '.join(generator.choice(vocabulary) for _ in range(words)))
  return path


def tiny(text_path, **changes):
  """A nested dictionary of settings: two layers, two stages, 12 steps."""
  return {
    'data': dict(name='text', path=str(text_path), loader='numpy'),
    'model': dict(
      num_layers=2,
      features=16,
      num_heads=2,
      dropout_rate=0.1,
      # Compiles in a second; the loop is what is tested here.
      implementation='reference',
    ),
    'stages': (
      dict(length=32, batch_size=4, steps=6, learning_rate=1e-2, windows=8),
      dict(
        length=48, batch_size=4, steps=6, learning_rate=3e-3, windows=(8, 16)
      ),
    ),
    'evaluation': dict(
      length=32,
      stride=16,
      batch_size=8,
      validation_characters=200,
      test_characters=300,
    ),
    'log_every': 2,
    'checkpoint_every': 4,
    'tensorboard': False,
    **changes,
  }
