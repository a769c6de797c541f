"""Longformer's self-attention layer: what Hugging Face and longjax share.

Weights in PyTorch's layout, out = hidden @ weight.T + bias. Only numpy, any
Python from 3.11.
"""

import numpy as np

from experiments.benchmarks import numerics

PROJECTIONS = ('query', 'key', 'value')
GLOBAL_PROJECTIONS = tuple(f'{name}_global' for name in PROJECTIONS)


def inputs(case):
  """(weights, hidden, cotangent), the same in every process."""
  rng = np.random.default_rng(0)
  features = case.heads * case.size

  def normal(*shape, scale=1.0):
    return (scale * rng.standard_normal(shape, np.float32)).astype(case.dtype)

  names = PROJECTIONS + (GLOBAL_PROJECTIONS if case.num_globals else ())
  weights = {}
  for name in names:
    weights[f'{name}.weight'] = normal(features, features, scale=features**-0.5)
    weights[f'{name}.bias'] = normal(features, scale=0.1)
  shape = case.batch, case.length, features
  return weights, normal(*shape), normal(*shape)


def check(reference, out, d_hidden, forward):
  """{name: error} of batch row 0; raises ArithmeticError.

  Args:
    reference: path of an .npz with `out` and `d_hidden` of that row: Hugging
      Face's in float32.
  """
  with np.load(reference) as file:
    wanted = dict(file)
  got = {'out': out, 'd_hidden': d_hidden, 'forward': forward}
  wanted['forward'] = wanted['out']
  return numerics.judge(
    {
      name: numerics.error(numerics.to_numpy(x[0]), wanted[name])
      for name, x in got.items()
    }
  )
