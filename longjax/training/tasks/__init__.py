"""What a run trains for, by name; `base.Task` says what the loop asks of one.

A task is imported when it is asked for, with the models and data it needs.
"""

import importlib

DEFAULT = 'language_modelling'
TASKS = {
  'language_modelling': 'LanguageModelling',
  'summarization': 'Summarization',
  'masked_lm': 'MaskedLM',
  'sequence_classification': 'SequenceClassification',
  'token_classification': 'TokenClassification',
  'question_answering': 'QuestionAnswering',
  'multiple_choice': 'MultipleChoice',
}


def find(name: str) -> type:
  """The class of a task.

  Raises:
    ValueError: for a name that there is not.
  """
  if name not in TASKS:
    raise ValueError(f'config.task {name!r} is not one of {tuple(TASKS)}')
  return getattr(
    importlib.import_module(f'longjax.training.tasks.{name}'), TASKS[name]
  )


def make_task(settings, workdir=None):
  """The task of a run's settings; reads its data.

  Args:
    settings: of the run.
    workdir: its folder, for a task that keeps prepared data there.
  """
  return find(settings.task)(settings, workdir)
