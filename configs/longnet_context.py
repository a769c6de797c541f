"""What does a longer context give? LongNet's Table 2 and Figure 7b, small.

Paper: https://arxiv.org/abs/2307.02486, sections 4.2 and 4.4; its own figures
stand in configs/longnet_stack.py. Here the same questions are put to models of
0.8M parameters (4 layers of 128) that read bytes: the files of Python's
standard library of 32 KiB and more, sequences of 512, 2,048 or 8,192, 8,192
bytes in a batch, about a million in all, tested at 512 to 32,768.

  python -m experiments.longnet_context --out=experiments/records/NAME

trains LongNet and the Sparse Transformer at the three lengths with three seeds,
and a dense model at 8,192 once, and writes a record. One run by itself:

  python -m experiments.main --workdir=runs/context \
    --config=configs/longnet_context.py:attention=longnet,length=2048,seed=0

| argument  | what                                                          |
|-----------|---------------------------------------------------------------|
| attention | longnet (default), sparse or dense                            |
| length    | of training sequences, a multiple of 16, default 2048         |
| seed      | of parameters and order of data, default 0                    |
| tokens    | bytes to train on, default 1,048,576                          |
| runlocal  | seconds on two cores: a test                                  |

LongNet's five segments are the paper's for 32,768 divided by 32,768 / length:
length / 16, ..., length with ratios 1, 2, 4, 6, 12. The Sparse Transformer has
blocks of length / 16 and as many summary keys as cost the same. All see the
same number of bytes; dense attention costs more for each.

Expected: none from the paper at this size. Ours: experiments/records,
'longnet_context'; not comparable with figures on other texts.
"""

from configs import common
from longjax.models.longnet import RATIOS, magneto
from longjax.patterns import Dilated, FixedSparse

ATTENTION = ('longnet', 'sparse', 'dense')
BATCH_TOKENS = 8192


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(
    arg,
    attention='longnet',
    length=2048,
    seed=0,
    tokens=2**20,
    runlocal=False,
  )
  if arg.attention not in ATTENTION:
    raise ValueError(
      f'config argument attention={arg.attention} is not one of '
      f'{", ".join(ATTENTION)}'
    )
  if arg.length < 16 or arg.length % 16 or BATCH_TOKENS % arg.length:
    raise ValueError(
      f'config argument length={arg.length} is not a multiple of 16 that '
      f'divides {BATCH_TOKENS}'
    )
  if arg.tokens < BATCH_TOKENS:
    raise ValueError(
      f'config argument tokens={arg.tokens} is less than a batch of '
      f'{BATCH_TOKENS}'
    )
  config = common.make_config()
  config.seed = arg.seed
  config.data.min_document_bytes = 32_768
  config.model = dict(
    num_layers=4,
    features=128,
    num_heads=4,
    mlp_features=512,
    **magneto(),
    position='xpos',
    tie_embedding=True,
    scale_embedding=True,
  )
  block = arg.length // 16
  dilated = Dilated(tuple(block * 2**i for i in range(5)), RATIOS)
  steps = arg.tokens // BATCH_TOKENS
  stage = dict(
    length=arg.length,
    batch_size=BATCH_TOKENS // arg.length,
    learning_rate=4e-3,
    steps=steps,
    warmup_steps=steps // 10,
    schedule='linear',
  )
  if arg.attention == 'longnet':
    config.pattern = 'dilated'
    stage |= dict(
      segment_lengths=dilated.segment_lengths, ratios=dilated.ratios
    )
  elif arg.attention == 'sparse':
    config.pattern = 'fixed_sparse'
    fixed = FixedSparse.matching(dilated, arg.length, block=block)
    stage |= dict(block=fixed.block, summary=fixed.summary)
  else:
    config.pattern = 'full'
  config.stages = (stage,)
  config.optimizer.update(name='muon', weight_decay=0.01, clip_norm=1.0)
  config.evaluation.update(
    length=arg.length,
    stride=arg.length,
    batch_size=max(1, 32_768 // arg.length),
  )
  config.log_every = 16
  config.checkpoint_every = steps
  config.tensorboard = False
  if arg.runlocal:
    config.model.update(num_layers=1, features=32, mlp_features=64)
    stage |= dict(steps=2, warmup_steps=0)
    config.stages = (stage,)
    config.evaluation.test_characters = 2 * arg.length
  return config
