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

Table 2, share of pass keys found (Llama-2-7b-chat, with the top-5 middle keys,
which this command does not use): truncated input .66 at 6K to .27 at 16K;
LM-Infinite .70 to .91.
"""

from configs import common


def get_config(arg=None):
  """The config; it takes no argument."""
  common.parse_arg(arg)
  return common.paper_measurements(trained_length=4096, start=100)
