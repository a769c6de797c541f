"""What a task brings to the training loop; language modelling is the first.

The loop in `train.py` asks a task for batches, for the module of a stage, for
the loss of a batch and for the score of a split, and knows nothing else of it.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax import data
from longjax.evaluation import bits_per_character
from longjax.models import DecoderLM
from longjax.training.loss import next_token_losses
from longjax.training.settings import Settings
from longjax.training.stages import Stage

# Arguments of the model that a config gives by the name of a dtype.
_DTYPES = ('dtype', 'param_dtype')


class LanguageModelling:
  """Predicting each next character (token) of a text.

  Attributes:
    corpus: the text, see `longjax.data.Corpus`.
  """

  # The score of a split, as metrics name it; lower is better.
  score_name = 'bits_per_character'

  def __init__(self, settings: Settings):
    self._settings = settings
    where = settings.data
    optional = {
      name: getattr(where, name)
      for name in ('path', 'vocab', 'data_dir', 'min_document_bytes')
      if getattr(where, name)
    }
    self.corpus = data.load(where.name, **optional)
    model = {**settings.model}
    for name in ('vocab_size', 'patterns', 'rngs'):
      if name in model:
        raise ValueError(f'config.model.{name} is not set by hand: drop it')
    if 'num_layers' not in model:
      raise ValueError('config.model lacks the key num_layers')
    for name in _DTYPES:
      if name in model:
        model[name] = jnp.dtype(model[name])
    self._model = model

  def make_model(
    self, stage: Stage, rngs: nnx.Rngs, patterns=None
  ) -> nnx.Module:
    """The module of a stage: other patterns, the same parameters.

    Args:
      stage: says the patterns, unless they are given.
      rngs: of the initial parameters.
      patterns: of `DecoderLM`.
    """
    return DecoderLM(
      vocab_size=self.corpus.vocab_size,
      patterns=patterns
      or stage.layer_patterns(
        self._settings.pattern, self._model['num_layers']
      ),
      rngs=rngs,
      **self._model,
    )

  def make_batches(self, stage: Stage, number: int) -> data.Batches:
    """The batches of this process for stage `number`."""
    return data.Batches(
      self.corpus.train,
      stage.length,
      stage.batch_size,
      seed=self._settings.seed + number,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      loader=self._settings.data.loader,
    )

  def loss(self, model: nnx.Module, batch: Mapping, dropout_key):
    """Mean negative log-likelihood in nats of tokens `[batch, length + 1]`."""
    losses = next_token_losses(model, batch['tokens'], dropout_key=dropout_key)
    return losses.mean()

  def score(
    self,
    logits_fn: Callable,
    tokens: np.ndarray,
    *,
    progress: Callable | None = None,
  ):
    """Bits per character of a text; see `longjax.evaluation`."""
    protocol = self._settings.evaluation
    return bits_per_character(
      logits_fn,
      tokens,
      length=protocol.length,
      stride=protocol.stride,
      batch_size=protocol.batch_size,
      progress=progress,
    )
