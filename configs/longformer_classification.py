"""Longformer fine-tuned to classify long texts.

Paper: https://arxiv.org/abs/2004.05150, section 6.3, Tables 7 and 14: IMDB
(25,000 reviews) and Hyperpartisan (645 articles, split 80/10/10): batches of
32, learning rate 3e-5 after a tenth of the steps as warm-up and then falling to
0, 15 epochs; the first token is global.

  python -m experiments.main --workdir=runs/hyperpartisan \
    --config=configs/longformer_classification.py:epochs=15 \
    --config.pretrained=longformer-base-4096 --config.data.train=FILE.jsonl

FILE has a JSON object a line, {"text": ..., "label": ...}; other names of keys
by `--config.data.fields.text=...`, pairs of texts by `fields.pair`. Validation
and test are tenths of it by the hash of the ids, or `data.validation` and
`data.test`. `longformer-base-4096` is a folder in Hugging Face's format.

| argument  | what                                                       |
|-----------|------------------------------------------------------------|
| epochs    | default 15                                                 |
| examples  | of the training split, for the number of steps; default    |
|           | 516, Hyperpartisan's                                       |
| length    | tokens of a text, default 4096                             |
| ,runlocal | a small model from nothing and a BPE of its own: a minute  |
|           | on two cores with any FILE: a test, not a result           |

Expected: IMDB accuracy 95.7, Hyperpartisan F1 94.8 (mean of 5 seeds; RoBERTa
95.3, 87.4); not run by us.
"""

from configs import common


def get_config(arg=None, task='sequence_classification'):
  """The config; arg as in the table above."""
  arg = common.parse_arg(
    arg, epochs=15, examples=516, length=4096, runlocal=False
  )
  return fine_tuning(arg, task, batch_size=32, learning_rate=3e-5)


def fine_tuning(arg, task, *, batch_size, learning_rate, warmup_steps=None):
  """The config of a task of labelled examples; arg as in the table above."""
  config = common.make_config(task)
  steps = max(1, round(arg.epochs * arg.examples / batch_size))
  if warmup_steps is None:
    warmup_steps = steps // 10
  stage = dict(
    length=arg.length,
    batch_size=batch_size,
    steps=steps,
    learning_rate=learning_rate,
    warmup_steps=min(warmup_steps, steps),
    schedule='linear',
  )
  config.model = dict(dtype='bfloat16', remat=True)
  config.optimizer.update(
    name='adamw', weight_decay=0.01, clip_norm=0.0, b2=0.98, eps=1e-6
  )
  config.evaluation.update(batch_size=8, every=max(1, steps // arg.epochs))
  config.log_every = 10
  if arg.runlocal:
    config.pattern = 'sliding_window'
    config.model = dict(
      num_layers=2,
      features=64,
      num_heads=4,
      max_positions=256,
      dropout_rate=0.1,
    )
    config.data.update(vocab_size=2048, buckets=(128,))
    stage = common.local_stage(windows=(16, 32))
    config.evaluation.every = 20
    config.checkpoint_every = 20
    config.tensorboard = False
  config.stages = (stage,)
  return config
