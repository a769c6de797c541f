"""How pretrained models stretch RoPE's wavelengths to longer texts.

A scaling turns the inverse frequencies a model was first trained with into
those that it was published with. All are static: a rule whose frequencies
depend on the length at hand would give cached keys two meanings.
"""

import dataclasses
import math

import numpy as np


def _check_positive(name, **values):
  for field, value in values.items():
    if not value > 0:
      raise ValueError(f'{name} {field} must be > 0, got {value}')


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Position interpolation (arXiv 2306.15595): positions over `factor`."""

  factor: float

  def __post_init__(self):
    _check_positive('LinearScaling', factor=self.factor)

  # What rotated features are multiplied with, queries and keys each.
  amplitude = 1.0

  def __call__(self, inverse_frequency: np.ndarray, base: float) -> np.ndarray:
    del base
    return inverse_frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's: long wavelengths are stretched, short ones kept.

  Wavelengths above original_length / low_factor are stretched by `factor`,
  those below original_length / high_factor kept, those between mixed.
  """

  factor: float
  low_factor: float
  high_factor: float
  original_length: int

  amplitude = 1.0

  def __post_init__(self):
    _check_positive('Llama3Scaling', **dataclasses.asdict(self))
    if not self.high_factor > self.low_factor:
      raise ValueError(
        f'Llama3Scaling high_factor {self.high_factor} must exceed low_factor '
        f'{self.low_factor}'
      )

  def __call__(self, inverse_frequency, base):
    del base
    turns = self.original_length * inverse_frequency / (2 * math.pi)
    kept = (turns - self.low_factor) / (self.high_factor - self.low_factor)
    kept = np.clip(kept, 0, 1)
    return inverse_frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv 2309.00071): mixed by dimension, and a sharper softmax.

  Pairs that turn more than `fast` times within original_length are kept,
  those that turn less than `slow` times are stretched by `factor`, those
  between are mixed in proportion to their number.

  Attributes:
    amplitude: what rotated features are multiplied with; None for the paper's
      0.1 ln(factor) + 1.
    truncate: round the two bounds outwards to whole pairs.
  """

  factor: float
  original_length: int
  fast: float = 32.0
  slow: float = 1.0
  amplitude: float | None = None
  truncate: bool = True

  def __post_init__(self):
    _check_positive(
      'YarnScaling',
      factor=self.factor,
      original_length=self.original_length,
      fast=self.fast,
      slow=self.slow,
    )
    if self.amplitude is None:
      amplitude = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
      object.__setattr__(self, 'amplitude', amplitude)

  def __call__(self, inverse_frequency, base):
    pairs = len(inverse_frequency)

    def pair_that_turns(times):
      wavelengths = self.original_length / (times * 2 * math.pi)
      return pairs * math.log(wavelengths) / math.log(base)

    low, high = pair_that_turns(self.fast), pair_that_turns(self.slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low if high > low else 0.001
    stretched = np.clip((np.arange(pairs) - low) / width, 0, 1)
    return inverse_frequency * (1 - stretched + stretched / self.factor)


RoPEScaling = LinearScaling | Llama3Scaling | YarnScaling
