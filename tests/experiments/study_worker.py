"""A worker of a study whose trials compute next to nothing.

  python -m tests.experiments.study_worker URL TRIALS SECONDS_OF_A_STEP

Says 'start NUMBER X' when it begins a trial.
"""

import sys
import time

import optuna

from experiments import study as studies


def suggest(trial):
  kind = trial.suggest_categorical('kind', ['a', 'b'])
  return trial.suggest_float('x', -1, 1), kind


def make_plan(trials, name='s', sampler='random', config=None, suggest=suggest):
  space, points = studies.explore(suggest, 0, trials)
  plan = studies.Plan(
    name=name,
    sampler=sampler,
    pruner='median',
    direction='minimize',
    metric='loss',
    seed=0,
    space=studies.describe(space),
    config=config or {'steps': 3},
  )
  return plan, points if sampler == 'random' else [{}] * trials


def objective(trial, seconds=0.0, say=lambda line: None):
  x, kind = suggest(trial)
  say(f'start {trial.number} {x}')
  before = studies.frozen(trial.study, trial).intermediate_values
  for step in range(3):
    time.sleep(seconds)
    if step not in before:
      trial.report(x * x + 1 / (step + 1), step)
    if trial.should_prune():
      raise optuna.TrialPruned
  if kind == 'b' and x > 0.9:
    raise ValueError(f'x is too large: {x}\nand more lines')
  return x * x


def main(url, trials, seconds):
  def say(line):
    print(line, flush=True)

  plan, points = make_plan(int(trials))
  storage = studies.open_storage(url, 1)
  study = studies.begin(storage, plan, points)
  studies.work(
    storage,
    study,
    plan,
    lambda trial: objective(trial, float(seconds), say),
    say=say,
    poll=0.2,
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
