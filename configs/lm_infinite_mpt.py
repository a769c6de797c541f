"""LM-Infinite on MPT-7B: nothing is trained.

Paper: https://arxiv.org/abs/2308.16137. Trained at 2,048 tokens (the paper says
4K, its code and the model's config 2048).

  python -m experiments.main --mode=measure \
    --config=configs/lm_infinite_mpt.py --workdir=runs/lm_infinite_mpt \
    --config.model.path=MPT_7B_FOLDER \
    --config.text.path=ARXIV.txt

The text is the ArXiv test split of the Pile, documents split by <|endoftext|>.
The paper's table 1, perplexity on ArXiv at each length:

| model                | 2K   | 4K     | 8K     | 16K    | 32K    |
|----------------------|------|--------|--------|--------|--------|
| MPT-7B               | 5.5  | 2.5e2  | 1.1e3  | 1.7e3  | 1.6e3  |
| LM-Infinite          | 5.7  | 6.8    | 5.8    | 6.0    | 4.6    |

Not run by us: the weights could not be had where this was written. The paper's
figures are means of few documents about one position (below the trained length
LM-Infinite *is* the plain model, though its rows differ), so expect their
shape: the plain model fails beyond 2048, LM-Infinite stays level.
"""

from configs import common


def get_config(arg=None):
  """The config; it takes no argument."""
  common.parse_arg(arg)
  return common.paper_measurements(trained_length=2048)
