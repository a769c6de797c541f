"""A tag for each word of a text."""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from longjax.data import examples
from longjax.data.examples import Tagged
from longjax.evaluation.labels import tagging
from longjax.training.tasks.finetuning import Encoded, FineTuning
from longjax.training.tasks.sequence_classification import (
  known_labels,
  label_losses,
)


class TokenClassification(FineTuning):
  """<s> words </s>; a word's first token has its tag, and no token is global.

  Words beyond the length are cut off: not learned from, and in the evaluation
  they have the tag that training has most often.

  Attributes:
    labels: tags of the training split, in the order of the logits.
  """

  parse = staticmethod(examples.tagged)
  head = 'token_classification'
  sequences = ('tokens', 'labels')
  scores = ('f1', 'accuracy', 'loss')
  curves = ('loss', 'f1')

  def texts(self, example: Tagged) -> Sequence[str]:
    return [' '.join(example.words)]

  def sizes(self) -> dict[str, int]:
    self.labels = known_labels(self.examples, lambda example: example.tags)
    tags = [t for _, x in self.examples['train'] for t in x.tags]
    self._usual = max(self.labels, key=tags.count)
    return {'num_labels': len(self.labels)}

  def encode(self, example: Tagged, length: int) -> Encoded:
    # A space goes before a word but the first, as in running text.
    words = [(' ' if at else '') + w for at, w in enumerate(example.words)]
    tokens, firsts = [self.special['<s>']], []
    for word in self.plain(*words):
      if len(tokens) + len(word) + 1 > length:
        break
      firsts.append(len(tokens))
      tokens += word
    tokens.append(self.special['</s>'])
    labels = [self.labels.index(tag) for tag in example.tags[: len(firsts)]]
    arrays = {'tokens': tokens, 'firsts': firsts, 'labels': labels}
    return Encoded(example, len(tokens), arrays, bool(firsts))

  def collate(self, encoded, length: int) -> dict[str, np.ndarray]:
    labels = np.full((len(encoded), length), -1, np.int32)
    for row, e in zip(labels, encoded, strict=True):
      if e is not None:
        row[e.arrays['firsts']] = e.arrays['labels']
    return {'tokens': self.pad_tokens(encoded, length), 'labels': labels}

  def outputs(self, model: nnx.Module, batch: Mapping, dropout_key=None):
    logits = model(batch['tokens'], dropout_key=dropout_key)
    losses, weights, log_p = label_losses(logits, batch['labels'])
    return losses, weights, log_p.argmax(axis=-1)

  def predict(self, encoded: Encoded, output) -> dict:
    firsts = encoded.arrays['firsts']
    tags = [self.labels[int(output[at])] for at in firsts]
    words = encoded.example.words
    return {
      'words': list(words),
      'label': list(encoded.example.tags),
      'prediction': tags + [self._usual] * (len(words) - len(tags)),
    }

  def measure(self, predictions: Sequence[Mapping]) -> dict:
    return tagging(
      [p['label'] for p in predictions], [p['prediction'] for p in predictions]
    )
