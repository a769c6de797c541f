"""Longformer-Encoder-Decoder summarizes arXiv papers.

Paper: https://arxiv.org/abs/2004.05150, section 7, Table 11 and Figure 3. The
data are scientific_papers/arxiv (203,037 papers to train on, article to
abstract), downloaded once by tensorflow-datasets (`longjax[tfds]`).

  python -m longjax.interop.convert BART_LARGE led-large --length=16384 \
    --window=1024
  python -m experiments.main --config=configs/arxiv_led.py:large16k \
    --workdir=runs/arxiv_led_large16k --config.pretrained=led-large

BART_LARGE is a folder of facebook/bart-large; a folder of
allenai/led-large-16384 will do without the first command.

| argument  | what                                  | arXiv test ROUGE-1, 2, L |
|-----------|---------------------------------------|--------------------------|
| large16k  | 12 + 12 layers, 460M; 16,384 tokens   | paper: 46.63, 19.62,     |
|           |                                       | 41.83; not run by us     |
| large4k   | the same of 4,096 tokens              | paper: 44.40, 17.94,     |
|           |                                       | 39.76; not run by us     |
| base      | 6 + 6 layers, 162M; 16,384 tokens     | none in the paper; not   |
|           | (`--config.pretrained`: a base model) | run by us                |
| ,runlocal | a minute on two cores, from nothing,  | a test, not a result     |
|           | on the modules of Python itself       |                          |

Figure 3 (validation, ROUGE-1 and 2 over the input's length): 35.21/11.54 at
1,024 tokens, 44.48/17.99 at 4,096 and 46.23/19.62 at 16,384; not run by us. The
same model reads the test split at such lengths here (`evaluation.lengths`) and
draws `rouge_by_length.png`; whether the paper trained one for each length it
does not say.

The paper gives no hyper-parameters but teacher forcing and beam search. Here
are those of its authors' script where it has them: Adam at 3e-5 with 1,000
steps of warm-up and linear decay, 5 epochs in batches of 16, targets of 256
tokens, attention dropout 0.1, no label smoothing, the first token global, ROUGE
without stemming. Ours: bfloat16, gradients clipped at 1, 4 beams with length
penalty 2, no three tokens twice, 100 to 256 tokens. rougeLsum is reported
beside rougeL, since which of them the paper calls ROUGE-L it does not say.
"""

from configs import common

PAPERS, EPOCHS, BATCH_SIZE = 203_037, 5, 16


def get_config(arg=None):
  """The config; arg as in the table above, 'large16k' by default."""
  arg = common.parse_arg(
    arg, large16k=False, large4k=False, base=False, runlocal=False
  )
  if arg.large16k + arg.large4k + arg.base > 1:
    raise ValueError('of large16k, large4k and base only one can be had')
  config = common.make_config('summarization')
  if arg.runlocal:
    common.summaries_run_local(config)
    return config
  config.data.name = 'arxiv'
  config.model = dict(dtype='bfloat16', remat=True, attention_dropout_rate=0.1)
  length = 4096 if arg.large4k else 16384
  steps = EPOCHS * PAPERS // BATCH_SIZE
  config.stages = (
    dict(
      length=length,
      batch_size=BATCH_SIZE,
      steps=steps,
      learning_rate=3e-5,
      warmup_steps=1000,
      schedule='linear',
    ),
  )
  config.target_length = 256
  config.optimizer.update(name='adamw', weight_decay=0.0, clip_norm=1.0)
  config.micro_batches = 4
  config.evaluation.update(
    lengths=tuple(n for n in (1024, 4096, 16384) if n <= length),
    batch_size=8,
    num_beams=4,
    min_length=100,
    max_length=256,
    length_penalty=2.0,
    no_repeat_ngram=3,
    early_stopping=True,
    every=5000,
    validation_papers=200,
  )
  config.log_every = 100
  config.checkpoint_every = 1000
  return config
