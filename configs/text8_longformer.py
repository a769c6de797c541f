"""Longformer's small character language model on text8.

Paper: https://arxiv.org/abs/2004.05150, section 4 and Table 12 (appendix B).

  python -m experiments.main --config=configs/text8_longformer.py \
    --workdir=runs/text8_longformer

| argument  | what                                    | test bits/char         |
|-----------|-----------------------------------------|------------------------|
| small     | 12 layers, 41M parameters, dropout 0.2  | paper: 1.10; not run   |
|           |                                         | by us                  |
| large     | 30 layers, dropout 0.4                  | not in the paper; not  |
|           |                                         | run by us              |
| budget    | our own recipe for about 10 minutes of  | none expected; not run |
|           | one Hopper GPU: RoPE, bf16, Muon        | by us                  |
| ,runlocal | a minute on two cores, on python_source | a test, not a result   |

Everything but the text is that of `enwik8_longformer.py`, which also lists what
the paper leaves unsaid.
"""

from configs import common


def get_config(arg=None):
  """The config; arg as in the table above, 'small' by default."""
  arg = common.parse_arg(
    arg, small=False, large=False, budget=False, runlocal=False
  )
  return common.longformer_config(arg, data='text8')
