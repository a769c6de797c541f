"""Answers that are spans of a text (arXiv 2004.05150, section 6.1)."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logsumexp

from longjax.data import examples
from longjax.data.examples import Question
from longjax.evaluation.labels import answers
from longjax.sharding import shards
from longjax.training import settings as settings_lib
from longjax.training.tasks import finetuning
from longjax.training.tasks.finetuning import Encoded, FineTuning

# Answers of one question that are learned from.
MOST_ANSWERS = 16


@dataclasses.dataclass(frozen=True)
class Evaluation(settings_lib.Evaluation):
  """How a span is chosen.

  Attributes:
    answer_tokens: the longest answer.
  """

  answer_tokens: int = 30


@dataclasses.dataclass(frozen=True)
class Settings(finetuning.Settings):
  """A run of question answering; see the class above."""

  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


class QuestionAnswering(FineTuning):
  """<s> question </s></s> context </s>; the question is global.

  The loss is that of any right answer, -(logsumexp over the right positions -
  logsumexp over all), the mean of starts and ends. No answer is <s>. A context
  is cut off at its end: what has no answer in the rest is not learned from, and
  evaluated all the same.
  """

  Settings = Settings
  parse = staticmethod(examples.question)
  head = 'question_answering'
  sequences = ('tokens',)
  scores = ('f1', 'exact_match', 'loss')
  curves = ('loss', 'f1')

  def texts(self, example: Question) -> Sequence[str]:
    return [example.question, example.context]

  def check(self) -> None:
    """Refuses questions that are too long to be global."""
    self._may_have_none = any(
      not example.answers for _, example in self.examples['train']
    )
    most = self.max_globals
    for found in self.examples.values():
      questions = self.plain(*(example.question for _, example in found))
      for (where, _), tokens in zip(found, questions, strict=True):
        if most and len(tokens) + 1 > most:
          raise ValueError(
            f'{where}: the question has {len(tokens)} tokens, with <s> more '
            f'than the {most} that may be global: raise '
            'config.model.max_globals'
          )

  def encode(self, example: Question, length: int) -> Encoded:
    (question,) = self.plain(example.question)
    context, offsets = self.tokenizer.encode_offsets(example.context)
    begin, end = self.special['<s>'], self.special['</s>']
    tokens = [begin, *question, end, end]
    room = length - len(tokens) - 1
    if room < 1:
      raise ValueError(
        f'a length of {length} has no room for a text after the question of '
        f'{example.id!r}, {len(question)} tokens'
      )
    first = len(tokens)
    context, offsets = context[:room], np.array(offsets[:room])
    spans = []
    for text, start in example.answers[:MOST_ANSWERS]:
      inside = np.flatnonzero(
        (offsets[:, 1] > start) & (offsets[:, 0] < start + len(text))
      )
      whole = len(inside) and offsets[inside[-1], 1] >= start + len(text)
      if whole:
        spans.append((first + inside[0], first + inside[-1]))
    learned = bool(spans) or not example.answers
    if not spans:
      spans = [(0, 0)]
    tokens += [*context, end]
    arrays = {
      'tokens': tokens,
      'spans': spans,
      'context': (first, first + len(context)),
      'offsets': offsets,
    }
    return Encoded(example, len(tokens), arrays, learned)

  def collate(self, encoded, length: int) -> dict[str, np.ndarray]:
    spans = np.full((len(encoded), MOST_ANSWERS, 2), -1, np.int32)
    for row, e in zip(spans, encoded, strict=True):
      if e is not None:
        row[: len(e.arrays['spans'])] = e.arrays['spans']
    return {'tokens': self.pad_tokens(encoded, length), 'spans': spans}

  def outputs(self, model: nnx.Module, batch: Mapping, dropout_key=None):
    tokens, spans = batch['tokens'], batch['spans']
    # A number for each token: all devices of a sequence may have them all.
    real = shards.gather(tokens != self.special['<pad>'])
    there = spans[:, 0, 0] >= 0
    losses, outputs = 0.0, []
    for end, logits in enumerate(model(tokens, dropout_key=dropout_key)):
      logits = shards.gather(logits)
      # Rows of padding keep theirs: of nothing there is no logsumexp.
      logits = jnp.where(real | ~there[:, None], logits, -jnp.inf)
      right = spans[:, :, end]
      at = jnp.take_along_axis(logits, jnp.maximum(right, 0), axis=1)
      # Several answers may begin, or end, at one place: it counts once.
      again = jnp.tril(right[:, :, None] == right[:, None, :], -1).any(axis=2)
      at = jnp.where((right >= 0) & ~again, at, -jnp.inf)
      at = jnp.where(there[:, None], at, 0.0)
      losses += (logsumexp(logits, axis=1) - logsumexp(at, axis=1)) / 2
      outputs.append(logits)
    losses = jnp.where(there, losses, 0.0)
    return losses, there.astype(jnp.float32), tuple(outputs)

  def predict(self, encoded: Encoded, output) -> dict:
    starts, ends = (np.asarray(x, np.float64) for x in output)
    first, last = encoded.arrays['context']
    longest = self.settings.evaluation.answer_tokens
    best, span = -np.inf, None
    for more in range(min(longest, last - first)):
      scores = starts[first : last - more] + ends[first + more : last]
      at = int(np.argmax(scores))
      if scores[at] > best:
        best, span = scores[at], (at, at + more)
    offsets = encoded.arrays['offsets']
    context = encoded.example.context
    text = context[offsets[span[0], 0] : offsets[span[1], 1]].strip()
    none = self._may_have_none and starts[0] + ends[0] > best
    return {
      'label': [text for text, _ in encoded.example.answers],
      'prediction': '' if none else text,
      'score': round(float(best - starts[0] - ends[0]), 4),
    }

  def measure(self, predictions: Sequence[Mapping]) -> dict:
    return answers(
      [p['label'] for p in predictions], [p['prediction'] for p in predictions]
    )
