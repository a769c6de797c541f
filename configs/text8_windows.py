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
  arg = common.parse_arg(arg, windows='increasing', seed=0, steps=400)
  if arg.windows not in WINDOWS:
    raise ValueError(
      f'config argument windows={arg.windows} is not one of {list(WINDOWS)}'
    )
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
  return config
