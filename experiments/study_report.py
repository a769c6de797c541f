"""What a study has to tell: lines while it runs, a table and pictures after."""

import csv
import datetime
import json
import pathlib
import warnings
from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments import study as studies


def line(study, trial: FrozenTrial) -> str:
  """What became of a trial."""
  if studies.attempted_again(study, trial):
    words = 'its worker was lost: it is tried again'
  elif trial.state == TrialState.COMPLETE:
    words = f'{trial.value:.4f}'
  elif trial.state == TrialState.PRUNED:
    words = f'pruned at step {trial.last_step}'
  else:
    words = f'failed: {trial.user_attrs.get(studies.ERROR)}'
  done, wanted = studies.progress(study)
  params = ', '.join(f'{k}={_short(v)}' for k, v in trial.params.items())
  return f'trial {trial.number} ({done} of {wanted} done): {words}; {params}'


def _short(value):
  return f'{value:.3g}' if isinstance(value, float) else value


def rows(study) -> list[dict]:
  """A row for each attempt at each ticket, to be written as CSV."""
  found = []
  for trial in studies.trials_of(study, finished=False):
    again = studies.attempted_again(study, trial)
    seconds = trial.duration and trial.duration / datetime.timedelta(seconds=1)
    found.append(
      {
        'trial': trial.number,
        'attempt_at': studies.first_number(trial),
        'state': 'lost' if again else trial.state.name.lower(),
        'value': trial.value if trial.state.is_finished() else None,
        'step': trial.last_step,
        'seconds': seconds and round(seconds, 1),
        **{name: _cell(v) for name, v in trial.params.items()},
        'error': trial.user_attrs.get(studies.ERROR),
      }
    )
  return found


def _cell(value):
  return value if isinstance(value, int | float | str) else str(value)


def _complete(study) -> list[FrozenTrial]:
  return [t for t in studies.trials_of(study) if t.state == TrialState.COMPLETE]


def _evaluator(done: int):
  """PED-ANOVA, of what sets the best tenth apart, or the best five trials."""
  share = min(max(0.1, 5 / done), 0.5)
  return optuna.importance.PedAnovaImportanceEvaluator(
    target_quantile=share, evaluate_on_local=False
  )


def summary(study) -> dict:
  """What study.json has besides the stamp."""
  plan = study.user_attrs['plan']
  counts = {}
  for row in rows(study):
    counts[row['state']] = counts.get(row['state'], 0) + 1
  done = _complete(study)
  values = {
    **plan,
    'space': {k: json.loads(v) for k, v in plan['space'].items()},
    'trials': study.user_attrs['tickets'],
    'states': counts,
  }
  if done:
    best = study.best_trial
    values['best'] = {
      'trial': best.number,
      'value': best.value,
      'params': best.params,
    }
    if len(done) > 1:
      with studies.quiet():
        warnings.simplefilter('ignore')
        values['importances'] = optuna.importance.get_param_importances(
          study, evaluator=_evaluator(len(done))
        )
  return values


def write_report(study, folder: pathlib.Path, stamped: Mapping) -> dict:
  """Writes trials.csv, study.json and the pictures; returns the summary."""
  folder.mkdir(parents=True, exist_ok=True)
  table = rows(study)
  names = list(dict.fromkeys(name for row in table for name in row))
  names.remove('error')
  with (folder / 'trials.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, [*names, 'error'], lineterminator='\n')
    writer.writeheader()
    writer.writerows(table)
  values = {**stamped, **summary(study)}
  (folder / 'study.json').write_text(json.dumps(values, indent=2) + '\n')
  with studies.quiet():
    _draw(study, values, folder)
  return values


def _draw(study, values, folder):
  """history.png, importances.png, parallel_coordinates.png."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from optuna.visualization import matplotlib as pictures

  complete = _complete(study)
  if len(complete) < 2:
    return
  name = values['metric'].replace('_', ' ')
  title = f'{values["name"]}: {len(complete)} of {values["trials"]} to the end'
  made = {
    'history': lambda: pictures.plot_optimization_history(
      study, target_name=name
    ),
    'importances': lambda: pictures.plot_param_importances(
      study, evaluator=_evaluator(len(complete)), target_name=name
    ),
    'parallel_coordinates': lambda: _readable(
      pictures.plot_parallel_coordinate(study, target_name=name)
    ),
  }
  for file, make in made.items():
    # optuna chooses a style for the whole process.
    with warnings.catch_warnings(), pyplot.rc_context():
      warnings.simplefilter('ignore')
      figure = make().figure
      figure.set_size_inches(8, 4.5)
      figure.axes[0].set_title('', loc='left')
      figure.axes[0].set_title(title)
      figure.savefig(folder / f'{file}.png', dpi=100, bbox_inches='tight')
    pyplot.close(figure)


def _readable(axes):
  """Every line is seen, and names of choices have room beside the colours."""
  [*_, colours] = (a for a in axes.figure.axes if a.get_label() == '<colorbar>')
  left, bottom, width, height = colours.get_position().bounds
  colours.set_position((left + 0.12, bottom, width, height))
  for lines in axes.collections:
    lines.set_cmap('viridis')
  return axes
