"""The loss of a language model, without all of its logits at a time."""

import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import logsumexp

from longjax.nn.memory import in_pieces

# Logits at a time, in numbers: 256 MiB of float32. A vocabulary of 256 at a
# million tokens has 1 GiB, one of 100,000 has 400.
LOGITS = 2**26


def next_token_losses(model: nnx.Module, tokens, **options):
  """`target_losses` of tokens [batch, length + 1]: of each the next one."""
  return target_losses(model, tokens[:, :-1], tokens[:, 1:], **options)


def target_losses(
  model: nnx.Module,
  inputs,
  targets,
  *,
  dropout_key=None,
  logits: int = LOGITS,
):
  """Negative log-likelihood of each target, in nats.

  Logits are computed for some positions at a time, and again in the backward
  pass, unless all of them are few. Dropout draws the same either way.

  Args:
    model: a `DecoderLM`, or whatever has its `hidden`, `read_out` and
      `vocab_size`.
    inputs: int [batch, length].
    targets: int [batch, length], of each input the token after it.
    dropout_key: turns dropout on.
    logits: how many logits may exist at a time.

  Returns:
    float32 [batch, length].
  """
  x = model.hidden(inputs, dropout_key=dropout_key)
  size = max(1, logits // (model.vocab_size * len(inputs)))

  def losses(x, wanted):
    z = model.read_out(x)
    chosen = jnp.take_along_axis(z, wanted[..., None], axis=-1)[..., 0]
    return logsumexp(z, axis=-1) - chosen

  return in_pieces(losses, size, x, targets)
