"""LongNet's language models on source code (The Stack).

Paper: https://arxiv.org/abs/2307.02486, sections 4.1 to 4.4, Tables 2 to 4.
The Stack is not downloaded: give a folder of source files (or one file).

  python -m experiments.main --config=configs/longnet_stack.py \
    --workdir=runs/longnet_stack --config.data.path=FOLDER

Table 2: perplexity of tokens of cl100k_base, test lengths 2K, 8K, 32K; beyond
the trained length with blockwise causal attention. Ours are reported as bits
for each token, the logarithm to base 2 of that. Not run by us.

| argument            | paper's row, trained at     | 2K   | 8K   | 32K   |
|---------------------|-----------------------------|------|------|-------|
| (none)              | LongNet, 32K                | 4.37 | 3.33 | 3.01  |
| length=16384        | LongNet, 16K                | 4.27 | 3.26 | 3.31  |
| length=8192         | LongNet, 8K                 | 4.23 | 3.24 | 3.36  |
| dense,length=2048   | Transformer, 2K             | 4.24 | 5.07 | 11.29 |
| sparse              | Sparse Transformer, 32K     | 5.15 | 4.00 | 3.64  |
| sparse,length=16384 | Sparse Transformer, 16K     | 4.85 | 3.73 | 19.77 |
| sparse,length=8192  | Sparse Transformer, 8K      | 4.39 | 3.35 | 8.79  |

These are 12 layers of 768 ("125M"), 300,000 steps of 524,288 tokens, about 157
billion. Figure 7a's models of Table 4, test loss in nats (read off the figure):

| argument | layers, width, heads | tokens | loss  |
|----------|----------------------|--------|-------|
| 125m     | 12, 768, 12          | 40B    | 2.590 |
| 350m     | 24, 1024, 16         | 40B    | 2.313 |
| 760m     | 24, 1536, 16         | 40B    | 2.214 |
| 2.7b     | 32, 2560, 32         | 300B   | 1.164 |

| further argument | what                                                      |
|------------------|-----------------------------------------------------------|
| dense            | full attention, for as many steps as cost the same FLOPs  |
| sparse           | the fixed pattern, blocks of 2048, of the same FLOPs      |
| bytes            | 256 symbols instead of cl100k_base                        |
| rope             | RoPE instead of xPos: what the Pallas kernels serve       |
| runlocal         | a minute on two cores, on python_source: a test           |

Without a network, cl100k's file goes with
--config.data.vocab=PATH/cl100k_base.tiktoken.

A run that was trained at length l is scored beyond it by
`training.load(config, workdir, patterns=longjax.BlockwiseCausal(l // 2,
pattern))`. The paper leaves open how the learning rate decays (polynomially:
linear here), Adam's epsilon and how the data were split.
"""

from configs import common
from longjax.models.longnet import SIZES, longnet, schedule
from longjax.patterns import FixedSparse

_TOKENS = 524_288
# Learning rate, tokens in a batch, billions of tokens: Table 4, section 4.4.
_RUNS = {
  '125m': (6e-4, _TOKENS, 40),
  '350m': (6e-4, _TOKENS, 40),
  '760m': (6e-4, _TOKENS, 40),
  '2.7b': (2e-4, 8 * _TOKENS, 300),
}


def get_config(arg=None):
  """The config; arg as in the tables above."""
  parts = [f'size={p}' if p in SIZES else p for p in (arg or '').split(',')]
  arg = common.parse_arg(
    ','.join(parts),
    size='',
    length=32_768,
    dense=False,
    sparse=False,
    bytes=False,
    rope=False,
    runlocal=False,
  )
  if arg.size and arg.size not in SIZES:
    raise ValueError(
      f'config argument size={arg.size} is not one of {", ".join(SIZES)}'
    )
  config = common.make_config()
  config.data.name = 'text'
  config.data.vocab = 'bytes' if arg.bytes else 'cl100k_base'
  config.model = longnet(
    arg.size or '125m',
    position='rope' if arg.rope else 'xpos',
    dtype='bfloat16',
    remat=True,
  )
  del config.model.vocab_size  # the text's own
  pattern = schedule(arg.length)
  rate, tokens, billions = _RUNS[arg.size or '125m']
  steps = round(billions * 1e9 / tokens) if arg.size else 300_000
  stage = dict(
    length=arg.length,
    batch_size=tokens // arg.length,
    learning_rate=rate,
    warmup_steps=750,
    schedule='linear',
  )
  if arg.dense and arg.sparse:
    raise ValueError('of dense and sparse only one can be had')
  if arg.sparse:
    config.pattern = 'fixed_sparse'
    fixed = FixedSparse.matching(pattern, arg.length)
    stage |= dict(block=fixed.block, summary=fixed.summary)
  elif arg.dense:
    config.pattern = 'full'
    # A token costs 24 d^2 + 4 d keys FLOPs a layer, as the paper counts.
    width, keys = config.model.features, pattern.keys_per_query()
    steps = round(steps * (6 * width + keys) / (6 * width + arg.length))
  else:
    config.pattern = 'dilated'
    stage |= dict(
      segment_lengths=pattern.segment_lengths, ratios=pattern.ratios
    )
  config.stages = (stage | dict(steps=steps),)
  config.optimizer.update(
    name='adamw', weight_decay=0.01, clip_norm=2.0, b1=0.9, b2=0.98
  )
  config.evaluation.update(
    length=arg.length,
    stride=arg.length // 2,
    batch_size=4,
    every=10_000,
    validation_characters=2_000_000,
  )
  if arg.runlocal:
    patterns = {
      'dilated': dict(segment_lengths=(32, 128, 256), ratios=(1, 2, 4)),
      'fixed_sparse': dict(block=32, summary=4),
      'full': {},
    }[config.pattern]
    common.run_local(config, stages=(common.local_stage(**patterns),))
    config.model.update(mlp_features=256, dtype='float32', remat=False)
  return config
