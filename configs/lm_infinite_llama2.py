"""LM-Infinite on Llama-2-7B: nothing is trained.

Paper: https://arxiv.org/abs/2308.16137. Trained at 4,096 tokens.

  python -m experiments.main --mode=measure \
    --config=configs/lm_infinite_llama2.py --workdir=runs/lm_infinite_llama2 \
    --config.model.path=LLAMA2_7B_FOLDER \
    --config.text.path=ARXIV.txt

The text is the ArXiv test split of the Pile, documents split by <|endoftext|>.
The paper's table 1, perplexity on ArXiv at each length:

| model                | 2K   | 4K     | 8K     | 16K    | 32K    |
|----------------------|------|--------|--------|--------|--------|
| Llama-2              | 3.4  | 3.8    | 8.5e3  | NaN    | NaN    |
| LM-Infinite          | 4.3  | 3.6    | 3.3    | 4.2    | 6.5    |

Not run by us: the weights could not be had where this was written. The paper's
figures are means of few documents about one position (below the trained length
LM-Infinite *is* the plain model, though its rows differ), so expect their
shape: the plain model fails beyond 4096, LM-Infinite stays level.

Table 2, share of pass keys found (Llama-2-7b-chat; LM-Infinite with the top-5
middle keys and G = 10):

| input                | 6K   | 8K     | 10K    | 12K    | 16K    |
|----------------------|------|--------|--------|--------|--------|
| the plain model      | 0    | 0      | 0      | 0      | 0      |
| truncated to 4K      | .66  | .55    | .39    | .33    | .27    |
| LM-Infinite          | .70  | .91    | .87    | .79    | .79    |

That is `--config.model.path=LLAMA2_7B_CHAT_FOLDER --config.model.start=10` and
`--config.loss_by_position.length=0`; truncated input is not measured here.
"""

from configs import common


def get_config(arg=None):
  """The config; it takes no argument."""
  common.parse_arg(arg)
  config = common.paper_measurements(trained_length=4096, start=100)
  config.passkey.update(
    lengths=(6144, 8192, 10240, 12288, 16384), middle_keys=5
  )
  return config
