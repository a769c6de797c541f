"""Stages of training: what changes while a run goes on, as data.

Longformer trains its character models in five phases of doubling length and
windows and halving learning rate (arXiv 2004.05150, section 4.2 and Table 12).
A stage says all of that; parameters and the optimizer's state are carried from
one stage to the next, and no parameter depends on a window.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from longjax import patterns
from longjax.training.settings import nearest

SCHEDULES = ('constant', 'cosine', 'linear', 'cubic')
# Each kind of pattern, and the keys of a stage that describe it.
PATTERNS = {
  'sliding_window': ('windows', 'dilations'),
  'dilated': ('segment_lengths', 'ratios'),
  'fixed_sparse': ('block', 'summary'),
  'lambda': ('windows', 'start'),
  'full': (),
}
# Those that an encoder may have.
TWO_SIDED = ('sliding_window', 'dilated', 'full')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training.

  Attributes:
    length: characters (tokens) predicted in each sequence.
    batch_size: sequences in a step, over all devices and processes.
    steps: optimizer steps.
    learning_rate: the peak, reached after the warm-up.
    warmup_steps: steps of linear warm-up from 0.
    schedule: after the warm-up 'constant', or 'cosine', 'linear' or 'cubic'
      (the third power of 'linear') to 0 at the stage's last step.
    windows: for 'sliding_window' the number of keys seen before self (of an
      encoder as many after it), for 'lambda' the number of keys seen with self;
      one for all layers or one for each layer, bottom to top.
    dilations: for 'sliding_window'; one for all layers, or for each layer one
      for all heads or a tuple with one for each head.
    start: for 'lambda', how many first keys every query sees.
    segment_lengths, ratios: for 'dilated' (LongNet), the same in every layer.
    block, summary: for 'fixed_sparse' (Sparse Transformer), likewise.
    objective: what is learned, of tasks that can learn several things; None for
      the task itself.
    target_length: of encoder-decoders, tokens of a target; None for the
      config's.
  """

  length: int
  batch_size: int
  steps: int
  learning_rate: float
  warmup_steps: int = 0
  schedule: str = 'constant'
  windows: int | tuple[int, ...] | None = None
  dilations: int | tuple[int | tuple[int, ...], ...] | None = None
  start: int | None = None
  segment_lengths: tuple[int, ...] | None = None
  ratios: tuple[int, ...] | None = None
  block: int | None = None
  summary: int | None = None
  objective: str | None = None
  target_length: int | None = None

  def __post_init__(self):
    for name in ('length', 'batch_size', 'steps'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'stage {name} must be an int >= 1, got {value!r}')
    if not 0 <= self.warmup_steps <= self.steps:
      raise ValueError(
        f'stage warmup_steps must lie in 0..{self.steps} (its steps), got '
        f'{self.warmup_steps!r}'
      )
    if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
      raise ValueError(
        f'stage learning_rate must be >= 0, got {self.learning_rate!r}'
      )
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f'stage schedule {self.schedule!r} is not one of {SCHEDULES}'
      )

  def layer_patterns(
    self, pattern: str, num_layers: int, *, causal: bool = True
  ) -> tuple[patterns.Pattern, ...]:
    """The attention pattern of each layer, bottom to top.

    Args:
      pattern: 'sliding_window', 'dilated', 'fixed_sparse', 'lambda' or 'full'.
      num_layers: layers of the model.
      causal: False for an encoder, which sees both sides.

    Raises:
      ValueError: for an unknown pattern, one that is always causal where that
        is not wanted, for keys of the stage that the pattern
        lacks or does not use, or when a sequence is not one per layer.
    """
    if pattern not in PATTERNS:
      raise ValueError(f'pattern {pattern!r} is not one of {tuple(PATTERNS)}')
    if not causal and pattern not in TWO_SIDED:
      raise ValueError(
        f'pattern {pattern!r} is causal: an encoder has one of {TWO_SIDED}'
      )
    wanted = PATTERNS[pattern]
    for name in sorted({n for names in PATTERNS.values() for n in names}):
      given = getattr(self, name) is not None
      if given and name not in wanted:
        raise ValueError(
          f'stage key {name!r} is not used by pattern {pattern!r}, which has '
          f'{wanted}'
        )
      if not given and name in wanted and name != 'dilations':
        raise ValueError(f'pattern {pattern!r} needs stage key {name!r}')

    def per_layer(name, default):
      value = getattr(self, name)
      value = default if value is None else value
      if not isinstance(value, tuple | list):
        return (value,) * num_layers
      if len(value) != num_layers:
        raise ValueError(
          f'stage {name} has {len(value)} entries for {num_layers} layers: '
          f'{tuple(value)}'
        )
      return tuple(value)

    if pattern == 'sliding_window':
      return tuple(
        patterns.SlidingWindow(
          left=window,
          right=0 if causal else window,
          dilation=tuple(d) if isinstance(d, tuple | list) else d,
        )
        for window, d in zip(
          per_layer('windows', None), per_layer('dilations', 1), strict=True
        )
      )
    if pattern == 'lambda':
      return tuple(
        patterns.Lambda(window=window, start=self.start)
        for window in per_layer('windows', None)
      )
    if pattern == 'dilated':
      dilated = patterns.Dilated(
        self.segment_lengths, self.ratios, causal=causal
      )
      return (dilated,) * num_layers
    if pattern == 'fixed_sparse':
      return (patterns.FixedSparse(self.block, self.summary),) * num_layers
    return (patterns.Full(causal=causal),) * num_layers

  def window_beyond_length(self) -> int | None:
    """The widest window where one exceeds the length (allowed), else None."""
    windows = self.windows or 0
    widest = max(windows) if isinstance(windows, tuple | list) else windows
    widest = max(widest, *(self.segment_lengths or (0,)))
    return widest if widest > self.length else None


def make_stages(stages: Sequence[Mapping]) -> tuple[Stage, ...]:
  """Checks the stages of a config; an unknown key names the nearest one."""
  if not stages:
    raise ValueError('config.stages is empty: give at least one stage')
  known = [field.name for field in dataclasses.fields(Stage)]
  for number, stage in enumerate(stages):
    for key in stage:
      if key not in known:
        raise ValueError(
          f'unknown key {key!r} in stage {number}: {nearest(key, known)}'
        )
    for key in ('length', 'batch_size', 'steps', 'learning_rate'):
      if key not in stage:
        raise ValueError(f'stage {number} lacks the key {key!r}')
  return tuple(Stage(**stage) for stage in stages)


def first_steps(stages: Sequence[Stage]) -> tuple[int, ...]:
  """The global step at which each stage begins, and the total at the end."""
  totals = [0]
  for stage in stages:
    totals.append(totals[-1] + stage.steps)
  return tuple(totals)


def stage_of(stages: Sequence[Stage], step: int) -> int:
  """The stage that global step `step` (0-based) belongs to."""
  ends = first_steps(stages)[1:]
  return next((s for s, end in enumerate(ends) if step < end), len(stages))


def learning_rate_schedule(stages: Sequence[Stage]):
  """The learning rate as a function of the global step (0-based).

  Within a stage of n steps with w of warm-up, step i has the peak times
  (i + 1) / w while i < w and then 1, (1 + cos(pi x)) / 2, 1 - x or (1 - x)^3,
  with x = (i - w) / (n - w): the first step never has rate 0.
  """
  starts = first_steps(stages)

  def schedule(step):
    rate = 0.0
    for start, stage in zip(starts, stages, strict=False):
      i = step - start
      warm = stage.warmup_steps
      x = jnp.clip((i - warm) / max(stage.steps - warm, 1), 0.0, 1.0)
      factor = {
        'constant': 1.0,
        'cosine': 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
        'linear': 1.0 - x,
        'cubic': (1.0 - x) ** 3,
      }[stage.schedule]
      if warm:
        factor = jnp.where(i < warm, (i + 1) / warm, factor)
      rate = jnp.where(i >= 0, stage.learning_rate * factor, rate)
    return rate

  return schedule
