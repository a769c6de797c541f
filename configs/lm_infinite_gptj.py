"""LM-Infinite on GPT-J-6B: nothing is trained.

Paper: https://arxiv.org/abs/2308.16137. Trained at 2,048 tokens.

  python -m experiments.main --mode=measure \
    --config=configs/lm_infinite_gptj.py --workdir=runs/lm_infinite_gptj \
    --config.model.path=GPTJ_6B_FOLDER \
    --config.text.path=ARXIV.txt

The text is the ArXiv test split of the Pile, documents split by <|endoftext|>.
The paper's table 1, perplexity on ArXiv at each length:

| model                | 2K   | 4K     | 8K     | 16K    | 32K    |
|----------------------|------|--------|--------|--------|--------|
| GPT-J                | 3.9  | 1.3e3  | 1.0e3  | 1.6e3  | 2.8e2  |
| LM-Infinite          | 3.8  | 3.1    | 3.0    | 3.1    | 2.1    |

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
