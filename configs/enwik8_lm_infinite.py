"""A character language model with LM-Infinite's Λ-shaped attention on enwik8.

Paper: https://arxiv.org/abs/2308.16137. It trains nothing: it puts the Λ-mask
and the distance ceiling on models that were trained with full attention. So no
figure is expected on enwik8. Here a model is trained with short sequences and
full windows, where the Λ-mask changes nothing, and evaluated on sequences four
times as long: what the paper is about, at the scale of a character model.

  python -m experiments.main --config=configs/enwik8_lm_infinite.py \
    --workdir=runs/enwik8_lm_infinite

| argument  | what                                    | test bits/char         |
|-----------|-----------------------------------------|------------------------|
| (none)    | 12 layers of 512, RoPE; trained at      | none published; not    |
|           | length 2048 = L, G = 16 first keys,     | run by us              |
|           | evaluated at 8192                       |                        |
| budget    | about 10 minutes of one Hopper GPU:     | none published; not    |
|           | L 1024, bf16, Muon, evaluated at 4096   | run by us              |
| ,runlocal | a minute on two cores, on python_source | a test, not a result   |
"""

from configs import common


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(arg, budget=False, runlocal=False)
  config = common.make_config()
  config.data.name = 'enwik8'
  config.pattern = 'lambda'
  config.model = common.modern_model(dropout_rate=0.2)
  if arg.runlocal:
    common.run_local(
      config, stages=(common.local_stage(length=128, windows=128, start=4),)
    )
  elif arg.budget:
    common.budget(
      config,
      stages=[dict(windows=512, start=16), dict(windows=1024, start=16)],
      lengths=(512, 1024),
    )
  else:
    config.stages = (
      dict(
        length=2048,
        batch_size=32,
        steps=200_000,
        learning_rate=3e-4,
        warmup_steps=2000,
        schedule='cosine',
        windows=2048,
        start=16,
      ),
    )
    config.model.update(dtype='bfloat16', remat=True)
    config.evaluation.update(length=8192, stride=2048, batch_size=8, every=5000)
    config.evaluation.validation_characters = 500_000
  return config
