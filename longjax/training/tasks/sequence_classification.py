"""A label for each text, or for each pair of texts."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longjax.data import examples
from longjax.data.examples import Classified
from longjax.evaluation.labels import classification
from longjax.training.tasks.finetuning import Encoded, FineTuning


class SequenceClassification(FineTuning):
  """<s> text </s>, of pairs <s> text </s></s> pair </s>; <s> is global.

  A long text is cut off at its end; of a pair the longer one.

  Attributes:
    labels: of the training split, in the order of the logits.
  """

  parse = staticmethod(examples.classified)
  head = 'sequence_classification'
  sequences = ('tokens',)
  scores = ('accuracy', 'f1', 'loss')
  curves = ('loss', 'accuracy')

  def texts(self, example: Classified) -> Sequence[str]:
    return [example.text, *([example.pair] if example.pair else [])]

  def sizes(self) -> dict[str, int]:
    self.labels = known_labels(self.examples, lambda example: [example.label])
    return {'num_labels': len(self.labels)}

  def encode(self, example: Classified, length: int) -> Encoded:
    texts = self.plain(*self.texts(example))
    begin, end = self.special['<s>'], self.special['</s>']
    over = sum(map(len, texts)) + 2 * len(texts) - length
    while over > 0:
      longest = max(texts, key=len)
      others = max((len(t) for t in texts if t is not longest), default=0)
      # Down to the other's length first, then both by turns.
      cut = min(over, max(1, len(longest) - others))
      del longest[len(longest) - cut :]
      over -= cut
    tokens = [begin, *texts[0], end]
    for more in texts[1:]:
      tokens += [end, *more, end]
    label = self.labels.index(example.label)
    return Encoded(example, len(tokens), {'tokens': tokens, 'label': label})

  def collate(self, encoded, length: int) -> dict[str, np.ndarray]:
    labels = [-1 if e is None else e.arrays['label'] for e in encoded]
    return {
      'tokens': self.pad_tokens(encoded, length),
      'labels': np.array(labels, np.int32),
    }

  def outputs(self, model: nnx.Module, batch: Mapping, dropout_key=None):
    logits = model(batch['tokens'], dropout_key=dropout_key)
    return label_losses(logits, batch['labels'])

  def predict(self, encoded: Encoded, output) -> dict:
    return {
      'label': encoded.example.label,
      'prediction': self.labels[int(np.argmax(output))],
      'probabilities': {
        str(label): round(float(np.exp(p)), 6)
        for label, p in zip(self.labels, output, strict=True)
      },
    }

  def measure(self, predictions: Sequence[Mapping]) -> dict:
    return classification(
      [p['label'] for p in predictions], [p['prediction'] for p in predictions]
    )


def known_labels(splits, labels_of) -> list:
  """The labels of the training split, in order.

  Args:
    splits: as of `longjax.data.examples.splits`.
    labels_of: example -> its labels.

  Raises:
    ValueError: fewer than two, some of another type than others, or some in
      another split that training lacks; names the line.
  """
  known = {}
  for where, example in splits['train']:
    for label in labels_of(example):
      known[label] = None
      first = next(iter(known))
      if type(label) is not type(first):
        raise ValueError(
          f'{where}: the label {label!r} is a {type(label).__name__}, others '
          f'are {type(first).__name__} like {first!r}'
        )
  if len(known) < 2:
    raise ValueError(
      f'all labels of the training split are {first!r}: there must be two'
    )
  for where, example in [*splits['validation'], *splits['test']]:
    for label in labels_of(example):
      if label not in known:
        raise ValueError(
          f'{where}: the label {label!r} is none of the training split, which '
          f'has {sorted(known)}'
        )
  return sorted(known)


def label_losses(logits, labels):
  """(losses, weights, log-probabilities) of labels, -1 for none.

  Args:
    logits: float32 [..., labels].
    labels: int [...].
  """
  log_p = jax.nn.log_softmax(logits)
  there = labels >= 0
  index = jnp.where(there, labels, 0)[..., None]
  losses = -jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
  losses = jnp.where(there, losses, 0.0)
  return losses, there.astype(jnp.float32), log_p
