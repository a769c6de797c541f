"""The right one of several choices, each read with the question."""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from longjax.data import examples
from longjax.data.examples import Choice
from longjax.evaluation.labels import classification
from longjax.training.tasks.finetuning import Encoded, FineTuning
from longjax.training.tasks.sequence_classification import label_losses


class MultipleChoice(FineTuning):
  """A row <s> question </s></s> choice </s> for each; the choice is global.

  A question is cut off at its beginning, choices never.
  """

  parse = staticmethod(examples.choice)
  head = 'multiple_choice'
  scores = ('accuracy', 'loss')
  curves = ('loss', 'accuracy')

  def texts(self, example: Choice) -> Sequence[str]:
    return [example.question, *example.choices]

  def check(self) -> None:
    """Refuses choices of another number, or too long to be global."""
    _, first = self.examples['train'][0]
    self._choices = len(first.choices)
    most = self.max_globals
    for found in self.examples.values():
      for where, example in found:
        if len(example.choices) != self._choices:
          raise ValueError(
            f'{where}: there are {len(example.choices)} choices, others have '
            f'{self._choices}'
          )
        longest = max(map(len, self.plain(*example.choices)))
        if most and longest + 1 > most:
          raise ValueError(
            f'{where}: a choice has {longest} tokens, with </s> more than the '
            f'{most} that may be global: raise config.model.max_globals'
          )

  def encode(self, example: Choice, length: int) -> Encoded:
    question, *choices = self.plain(*self.texts(example))
    begin, end = self.special['<s>'], self.special['</s>']
    rows = []
    for choice in choices:
      room = length - len(choice) - 4
      if room < 1:
        raise ValueError(
          f'a length of {length} has no room for the question of '
          f'{example.id!r} beside a choice of {len(choice)} tokens'
        )
      rows.append([begin, *question[-room:], end, end, *choice, end])
    arrays = {'tokens': rows, 'label': example.label}
    return Encoded(example, max(map(len, rows)), arrays)

  def collate(self, encoded, length: int) -> dict[str, np.ndarray]:
    none = [()] * self._choices
    tokens = [
      self.pad(
        none if e is None else e.arrays['tokens'], length, self.special['<pad>']
      )
      for e in encoded
    ]
    labels = [-1 if e is None else e.arrays['label'] for e in encoded]
    return {'tokens': np.stack(tokens), 'labels': np.array(labels, np.int32)}

  def outputs(self, model: nnx.Module, batch: Mapping, dropout_key=None):
    logits = model(batch['tokens'], dropout_key=dropout_key)
    return label_losses(logits, batch['labels'])

  def predict(self, encoded: Encoded, output) -> dict:
    return {
      'label': encoded.example.label,
      'prediction': int(np.argmax(output)),
      'probabilities': [round(float(np.exp(p)), 6) for p in output],
    }

  def measure(self, predictions: Sequence[Mapping]) -> dict:
    figures = classification(
      [p['label'] for p in predictions], [p['prediction'] for p in predictions]
    )
    return {'accuracy': figures['accuracy']}
