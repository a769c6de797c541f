"""Where a model's queries attend."""

import functools

import jax
import numpy as np
from flax import nnx

from longjax.models import DecoderLM


def layer_attention_weights(
  model: nnx.Module, tokens, layer: int, *, segment_ids=None
) -> np.ndarray:
  """How much each query of a layer attends to each key.

  Dense, by the definition of attention: for texts of some hundreds of tokens.

  Args:
    model: a `DecoderLM`, of any patterns and positions.
    tokens: int [batch, length].
    layer: 0 ... layers - 1, or from the end -1, -2, ....
    segment_ids: as of the model's call.

  Returns:
    float32 [batch, heads, length, length]. A row sums to 1, or is 0 where a
    query sees no key.

  Raises:
    ValueError: another kind of model, or no such layer.
  """
  if not isinstance(model, DecoderLM):
    raise ValueError(
      f'the model must be a DecoderLM, got a {type(model).__name__}'
    )
  count = len(model.layers)
  if not -count <= layer < count:
    raise ValueError(f'layer {layer} is not one of the {count} layers')
  graphdef, state = nnx.split(model)
  return np.asarray(_weights(graphdef, state, tokens, segment_ids, layer))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _weights(graphdef, state, tokens, segment_ids, layer):
  model = nnx.merge(graphdef, state)
  # The weights have to leave the layer, which neither of these would allow.
  model.remat, model.scan_layers = False, False
  block, found = model.layers[layer], []
  attention = block.attention

  def watched(x, *, cache, dropout_key, **options):
    found.append(attention.weights(x, **options))
    return attention(x, **options)

  block.attention = watched
  model.hidden(tokens, segment_ids=segment_ids)
  return found[0]
