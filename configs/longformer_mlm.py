"""Longformer's pretraining from RoBERTa, as the paper has it.

Paper: https://arxiv.org/abs/2004.05150, section 5, appendix C and Table 5:
RoBERTa, made longer by copying its positions, goes on with masked language
modelling for 65,000 updates of 64 sequences of 4,096 tokens, at a learning rate
of at most 3e-5 after 500 steps of warm-up, which then falls with the third
power to 0; the rest is RoBERTa's (Adam with b2 0.98, weight decay 0.01, dropout
0.1). No token is global; `experiments.export` copies the projections of global
tokens from the others.

  python -m longjax.interop.convert roberta-base longformer-4096 \
    --length=4096 --window=512
  python -m experiments.main --workdir=runs/longformer_base \
    --config=configs/longformer_mlm.py:folder=longformer-4096 \
    --config.data.path=TEXT
  python -m experiments.export --workdir=runs/longformer_base \
    --config=configs/longformer_mlm.py:folder=longformer-4096 \
    --folder=longformer-4096-trained

`roberta-base` is a folder in Hugging Face's format.

| argument  | what                                                          |
|-----------|---------------------------------------------------------------|
| folder    | of the longer model                                           |
| large     | what differs for the large model: nothing but the memory      |
| ,runlocal | a tiny model from nothing, a BPE of its own, Python's source: |
|           | a test, not a result                                          |

Expected, bits for each masked token (base, large), on the authors' own texts
(books, Wikipedia, news, stories), not run by us: before (copied positions)
1.957, 1.597; after 2,000 updates 1.753, 1.414; after all 1.705, 1.358.
"""

from configs import common

LENGTH = 4096


def get_config(arg=None):
  """The config; arg as in the table above."""
  arg = common.parse_arg(arg, folder='', large=False, runlocal=False)
  config = common.make_config('masked_lm')
  config.data.name = 'text'
  config.data.tokenizer = 'pretrained'
  config.pretrained = arg.folder or 'longformer-4096'
  config.model = dict(dtype='bfloat16', remat=True)
  config.stages = (
    dict(
      length=LENGTH,
      batch_size=64,
      steps=65_000,
      learning_rate=3e-5,
      warmup_steps=500,
      schedule='cubic',
    ),
  )
  config.micro_batches = 16 if arg.large else 4
  config.optimizer.update(
    name='adamw', weight_decay=0.01, clip_norm=0.0, b2=0.98, eps=1e-6
  )
  config.evaluation.update(
    length=LENGTH,
    batch_size=8,
    every=1000,
    validation_characters=2_000_000,
  )
  if arg.runlocal:
    config.data.update(name='python_source', tokenizer='train', vocab_size=1024)
    config.pretrained = ''
    config.pattern = 'sliding_window'
    config.model = dict(
      num_layers=2,
      features=64,
      num_heads=4,
      max_positions=256,
      max_globals=8,
      dropout_rate=0.1,
    )
    config.stages = (common.local_stage(windows=(16, 32)),)
    config.micro_batches = 1
    config.log_every = 10
    config.checkpoint_every = 30
    config.evaluation.update(
      length=256,
      every=30,
      validation_characters=16_384,
      test_characters=65_536,
    )
  return config
