"""Optimizers: AdamW and Muon, with clipping and weight-decay masks.

Parameters are a flat dictionary {'blocks.0.attention.query.kernel': array}, so
every choice by parameter is a choice by name.
"""

from collections.abc import Callable, Mapping

import jax
import optax
from optax import contrib

OPTIMIZERS = ('adamw', 'muon')


def is_matrix(name: str) -> bool:
  """Whether Muon updates this parameter: the layers' matrices.

  Embedding tables, the read-out, biases, norms and Transformer-XL's u and v are
  vectors or tables of vectors: AdamW's.
  """
  return name.endswith('kernel')


def is_decayed(name: str) -> bool:
  """Whether weight decay applies: matrices and tables; no biases, no norms."""
  return name.endswith(('kernel', 'embedding', 'output'))


def make_optimizer(
  learning_rate: Callable,
  *,
  name: str = 'adamw',
  weight_decay: float = 0.01,
  clip_norm: float | None = 0.25,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  only: str = '',
) -> optax.GradientTransformation:
  """The optimizer of a run.

  Args:
    learning_rate: schedule, a function of the step.
    name: 'adamw', or 'muon': orthogonalised momentum for the matrices (scaled
      to AdamW's root mean square, so one learning rate serves both) and AdamW
      for everything else.
    weight_decay: times the learning rate; biases and norms are not decayed.
    clip_norm: largest global norm of the gradient; 0 or None for no clipping.
    b1, b2, eps: of AdamW. Muon's momentum is 0.95, its own epsilon is fixed.
    only: how the names of the parameters begin that are trained, such as
      'position_embedding'; all others stay as they are. '' for all.

  Raises:
    ValueError: for an unknown name; by `init`, where no parameter begins so.
  """
  if name not in OPTIMIZERS:
    raise ValueError(f'optimizer {name!r} is not one of {OPTIMIZERS}')
  update = optax.adamw(
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=lambda params: _by_name(is_decayed, params),
  )
  if name == 'muon':
    # optax's own fallback for what is no matrix is Adam with Nesterov momentum.
    update = optax.partition(
      {
        True: contrib.muon(
          learning_rate, weight_decay=weight_decay, consistent_rms=0.2
        ),
        False: update,
      },
      lambda params: _by_name(is_matrix, params),
    )
  if clip_norm:
    update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
  if not only:
    return update

  def is_trained(params):
    trained = _by_name(lambda name: name.startswith(only), params)
    if not any(trained.values()):
      raise ValueError(
        f'config.optimizer.only: no parameter begins with {only!r}: they are '
        f'{", ".join(sorted({name.split(".")[0] for name in params}))}, ...'
      )
    return trained

  return optax.partition({True: update, False: optax.set_to_zero()}, is_trained)


def _by_name(predicate, params: Mapping[str, jax.Array]) -> dict[str, bool]:
  return {name: predicate(name) for name in params}
