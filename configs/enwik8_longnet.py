"""A character language model with LongNet's dilated attention on enwik8.

Paper: https://arxiv.org/abs/2307.02486. It trains on source code with a
subword vocabulary and reports no figure on enwik8, so none is expected here:
this is Longformer's small model with LongNet's attention in its place.

  python -m experiments.main --config=configs/enwik8_longnet.py \
    --workdir=runs/enwik8_longnet

| argument  | what                                    | test bits/char         |
|-----------|-----------------------------------------|------------------------|
| (none)    | 12 layers of 512, RoPE; segments of     | none published; not    |
|           | 2048 to 16,384 with ratios 1, 2, 4, 6   | run by us              |
|           | at length 16,384, as in section 4.2     |                        |
| budget    | about 10 minutes of one Hopper GPU:     | none published; not    |
|           | segments of 512 to 4096, bf16, Muon     | run by us              |
| ,runlocal | a minute on two cores, on python_source | a test, not a result   |

The paper's own model (12 layers of 768, AdamW with betas 0.9 and 0.98, learning
rate 6e-4 with 750 steps of warm-up, weight decay 0.01, gradients clipped at
2.0, 524,288 tokens in a batch) gives the optimizer's settings. Its decay is
polynomial with a power it does not state: linear here. Its xPos scales overflow
at such lengths unless they are centred; RoPE is used instead.
"""

from configs import common


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(arg, budget=False, runlocal=False)
  config = common.make_config()
  config.data.name = 'enwik8'
  config.pattern = 'dilated'
  config.model = common.modern_model(dropout_rate=0.2)
  if arg.runlocal:
    common.run_local(
      config,
      stages=(
        common.local_stage(segment_lengths=(32, 128, 256), ratios=(1, 2, 4)),
      ),
    )
  elif arg.budget:
    common.budget(
      config,
      stages=[
        dict(segment_lengths=(256, 1024), ratios=(1, 2)),
        dict(segment_lengths=(512, 2048, 4096), ratios=(1, 2, 4)),
      ],
    )
  else:
    config.stages = (
      dict(
        length=16384,
        batch_size=32,
        steps=50_000,
        learning_rate=6e-4,
        warmup_steps=750,
        schedule='linear',
        segment_lengths=(2048, 4096, 8192, 16384),
        ratios=(1, 2, 4, 6),
      ),
    )
    config.optimizer.update(clip_norm=2.0, b2=0.98)
    config.model.update(dtype='bfloat16', remat=True)
    config.evaluation.update(
      length=16384, stride=4096, batch_size=4, every=5000
    )
    config.evaluation.validation_characters = 500_000
  return config
