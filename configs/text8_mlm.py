"""A small RoBERTa made longer: Longformer's pretraining, small.

Paper: https://arxiv.org/abs/2004.05150, section 5 and Table 5: bits per token
of masked language modelling, base model: RoBERTa at 512 tokens 1.846; made into
a Longformer of 4,096 with random new positions 10.299, with copied ones 1.957;
after 2,000 updates 1.753, after 65,000 1.705; where only the positions were
trained 1.850.

Here the tokens are the letters of text8, the short model reads 128 of them and
the long one 1,024, through windows of 64 on each side. The short one grows to
its length in stages: given 128 at once, 600 steps teach a tiny model (2 layers
of 64) how frequent letters are and nothing more, 3.86 bits; 500 steps of 18 at
once, 3.06 (a rehearsal, no record).

  python -m experiments.mlm_conversion \
    --data=TEXT8_OR_A_PREFIX --out=experiments/records/NAME

trains the short model, converts it in both ways, scores and trains on, and
writes a record of the table's rows. One run by itself:

  python -m experiments.main --workdir=runs/mlm \
    --config=configs/text8_mlm.py --config.data.path=TEXT8_OR_A_PREFIX

| argument   | what                                                         |
|------------|--------------------------------------------------------------|
| pretrained | folder of the longer model, to be trained on; '': the short  |
|            | one, from nothing                                            |
| positions  | train only the table of positions                            |
| steps      | of 4,096 letters; default 1500 for the short, 300 the long   |
| seed       | default 0                                                    |
| ,runlocal  | half a minute on two cores, on Python's own source: a test   |

Expected: the order of the paper's rows. Ours, on a prefix of text8 and so
comparable with nothing else: 2.001 bits for the short model, 3.745 with random
positions, 2.029 with tiled ones; trained on 3.632 and 1.969; with positions
alone trained 2.023 (experiments/records, 'text8_mlm').
"""

from configs import common

LENGTH, LONGER, WINDOW = 128, 1024, 128
# Of the short model's stages, and their shares of the steps.
LENGTHS, SHARES = (18, 34, 66, LENGTH), (0.4, 0.15, 0.15, 0.3)


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(
    arg, pretrained='', positions=False, steps=0, seed=0, runlocal=False
  )
  config = common.make_config('masked_lm')
  config.seed = arg.seed
  config.data.name = 'text8'
  config.pretrained = arg.pretrained
  length = LONGER if arg.pretrained else LENGTH
  if not arg.pretrained:
    config.pattern = 'full'
    config.model = dict(
      num_layers=2,
      features=128,
      num_heads=2,
      max_positions=LENGTH,
      max_globals=0,
    )
  if arg.positions:
    if not arg.pretrained:
      raise ValueError('config argument positions goes with pretrained')
    config.optimizer.only = 'position_embedding'
  default = 40 if arg.runlocal else 300 if arg.pretrained else 1500
  steps = arg.steps or default
  tokens = 2048 if arg.runlocal else 4096
  if arg.pretrained:
    config.stages = (stage(length, tokens, steps, 1e-3, 'linear'),)
  else:
    config.stages = tuple(
      stage(
        n,
        tokens,
        max(1, round(share * steps)),
        3e-3,
        'linear' if n == length else 'constant',
      )
      for n, share in zip(LENGTHS, SHARES, strict=True)
    )
  config.optimizer.update(
    name='muon', weight_decay=0.01, clip_norm=1.0, b2=0.98
  )
  config.evaluation.update(
    length=length,
    batch_size=4096 // length,
    every=max(1, steps // 10),
    validation_characters=32 * 1024,
    test_characters=256 * 1024,
  )
  config.log_every = 10
  # The record scores the model after a tenth of the steps, too.
  config.checkpoint_every = max(1, steps // 10)
  config.keep_checkpoints = 10
  config.tensorboard = False
  if arg.runlocal:
    config.data.update(name='python_source', vocab='bytes')
    if not arg.pretrained:
      config.model.update(num_layers=2, features=64)
    config.evaluation.update(
      every=20, validation_characters=4096, test_characters=16 * 1024
    )
    config.checkpoint_every = 10
  return config


def stage(length, tokens, steps, learning_rate, schedule):
  """A stage of batches of so many tokens."""
  return dict(
    length=length,
    batch_size=max(1, tokens // length),
    steps=steps,
    learning_rate=learning_rate,
    warmup_steps=max(1, steps // 10),
    schedule=schedule,
  )
