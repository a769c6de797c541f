"""Training: one `train_and_evaluate(config, workdir)` and its helpers."""

from longjax.training.checkpoint import CheckpointError
from longjax.training.metrics import NonFiniteError, read_metrics
from longjax.training.preemption import Preempted
from longjax.training.scoring import evaluate, load, sample
from longjax.training.settings import Settings, default_settings
from longjax.training.stages import Stage
from longjax.training.train import train_and_evaluate

__all__ = [
  'CheckpointError',
  'NonFiniteError',
  'Preempted',
  'Settings',
  'Stage',
  'default_settings',
  'evaluate',
  'load',
  'read_metrics',
  'sample',
  'train_and_evaluate',
]
