"""Do windows that grow over the layers help? Longformer's ablation, small.

Paper: https://arxiv.org/abs/2004.05150, section 4.2.1 and Table 4: the small
model after 150K steps of its first phase, text8, development bits/char:
decreasing windows 512 to 32: 1.24; one window of 230: 1.23; increasing windows
32 to 512: 1.21.

Here the same question is put to the demo's model (4 layers, 0.8M parameters):
windows 16, 32, 64, 128 up or down, or 60 in every layer (their mean).

  python -m experiments.window_ablation \
    --data=TEXT8_OR_A_PREFIX --out=experiments/records/NAME

runs all three with three seeds and writes a record. One run by itself:

  python -m experiments.main --workdir=runs/windows \
    --config=configs/text8_windows.py:windows=increasing,seed=0 \
    --config.data.path=TEXT8_OR_A_PREFIX

| argument | what                                       |
|----------|--------------------------------------------|
| windows  | increasing (default), fixed or decreasing  |
| seed     | of parameters and order of data, default 0 |
| steps    | of 4,096 characters, default 400           |
| sweep    | 160 steps, validated every 40, to be swept |

Which schedule is best at which learning rate and dropout, 24 trials by TPE:

  python -m experiments.sweep --config=configs/text8_windows.py:sweep \
    --config.data.path=TEXT8_OR_A_PREFIX --study=text8_windows \
    --workdir=runs/text8_sweep --trials=24 --parallel=2

Expected: none from the paper at this size. Ours, on a prefix of text8 and so
comparable with nothing else: experiments/records, 'text8_windows'.
"""

from configs import common, demo

WINDOWS = {
  'increasing': (16, 32, 64, 128),
  'fixed': (60, 60, 60, 60),
  'decreasing': (128, 64, 32, 16),
}


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(
    arg, windows='increasing', seed=0, steps=400, sweep=False
  )
  if arg.windows not in WINDOWS:
    raise ValueError(
      f'config argument windows={arg.windows} is not one of {list(WINDOWS)}'
    )
  if arg.sweep:
    arg.steps = min(arg.steps, 160)
  config = demo.get_config()
  config.seed = arg.seed
  config.data.name = 'text8'
  config.stages = (
    config.stages[0]
    | dict(
      steps=arg.steps,
      warmup_steps=arg.steps // 20,
      windows=WINDOWS[arg.windows],
    ),
  )
  config.checkpoint_every = arg.steps
  config.evaluation.test_characters = 128 * 1024
  config.tensorboard = False
  config.report = False
  if arg.sweep:
    config.model.dropout_rate = 0.0
    # Steps that a killed worker's trial does again are few; the test split is
    # not what trials are chosen by.
    config.checkpoint_every = 40
    config.keep_checkpoints = 1
    config.evaluation.update(
      every=40, validation_characters=16 * 1024, test_characters=16 * 1024
    )
  return config


def sweep(trial, config):
  """Learning rate, window schedule and dropout; see `experiments.sweep`."""
  windows = trial.suggest_categorical('windows', list(WINDOWS))
  config.stages[0].update(
    windows=WINDOWS[windows],
    learning_rate=trial.suggest_float('learning_rate', 1e-3, 2e-2, log=True),
  )
  config.model.dropout_rate = trial.suggest_categorical(
    'dropout', [0.0, 0.1, 0.2]
  )
