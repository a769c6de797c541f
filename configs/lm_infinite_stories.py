"""LM-Infinite on stories260K, a LLaMA of 260 thousand parameters: runs here.

Paper: https://arxiv.org/abs/2308.16137; its figures 4 and 5 on a real model
that is small enough for two cores. llama2.c's stories260K was trained on
TinyStories at 512 tokens.

  python -m experiments.main --mode=measure \
    --config=configs/lm_infinite_stories.py --workdir=runs/lm_infinite_stories \
    --config.model.path=stories260K.bin --config.model.tokenizer=tok512.bin \
    --config.text.path=tinystories_sample_2MiB.txt.xz

| argument  | what                                                             |
|-----------|------------------------------------------------------------------|
| (none)    | 3 texts of 32,768 tokens, every variant                          |
| stream    | one text of 5 million tokens, with LM-Infinite alone             |
| ,runlocal | a minute on two cores: 2 texts of 2,048 tokens, some passkeys    |

No figure is published. Measured by us (experiments/records, 'stories260k'): in
nats per token beyond 512, of two texts LM-Infinite 1.477 and the plain model
6.343; of eight LM-Infinite 1.527 and independent blocks of 512 1.550; along 5
million tokens 1.477 to 1.481 in each million.
"""

from configs import common


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(arg, stream=False, runlocal=False)
  config = common.measurements(trained_length=512)
  with config.unlocked():
    config.loss_by_position.update(length=32768, documents=3)
    if arg.stream:
      config.loss_by_position.length = 0
      config.streaming.length = 5_000_000
    if arg.runlocal:
      config.loss_by_position.update(length=2048, documents=2)
      config.streaming.length = min(config.streaming.length, 20_000)
      config.passkey.update(lengths=(512, 1024), samples=1)
      config.key_value.update(lengths=(512,), depths=(0.5,), samples=1)
      config.overlap.update(milestones=(256, 1024), documents=2)
      config.variants = ('vanilla', 'LM-Infinite', 'truncation')
  return config
