"""Prints how many operations the model of a config takes.

  python -m experiments.flops --config=configs/enwik8_longnet.py
  python -m experiments.flops --config=configs/enwik8_longnet.py \
    --length=32768 --vocab_size=100277
  python -m experiments.flops --figure6

For each layer of the last stage's model, in a forward pass over one sequence:
projections, MLP, and attention by the pairs that are seen and, where the
LongNet paper says how it counts, so. With --figure6 the numbers of its figure 6
(12 layers of 768).
"""

import argparse
import runpy

from longjax import Full
from longjax.evaluation import flops
from longjax.models.longnet import longnet, schedule
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages

_SIZES = ('features', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_features')
# What the figure's x axis, read off it, says of the shortest model. The paper
# does not say how many tokens that is: this gives 1.57e8, forward only.
_FIGURE_TOKENS = 1.57e8
FIGURE_6 = {
  # (model, length of training): operations, test perplexity at 32K.
  ('Transformer', 2048): (3.86e16, 11.29),
  ('LongNet', 8192): (4.75e16, 3.36),
  ('LongNet', 16384): (5.01e16, 3.31),
  ('LongNet', 32768): (5.15e16, 3.01),
  ('Transformer', 8192): (7.42e16, 3.54),
  ('Transformer', 16384): (1.22e17, 3.31),
}


def figure_6(tokens: float = _FIGURE_TOKENS) -> dict:
  """{(model, length): operations of a forward pass over `tokens` tokens}."""
  counted = {}
  for model, length in FIGURE_6:
    sizes = longnet('125m')
    pattern = Full() if model == 'Transformer' else schedule(length)
    whole = flops.decoder_flops(
      length,
      vocab_size=sizes['vocab_size'],
      features=sizes['features'],
      num_heads=sizes['num_heads'],
      patterns=[pattern] * sizes['num_layers'],
    )
    counted[model, length] = whole.paper_total * tokens / length
  return counted


def of_config(
  config, length: int | None, vocab_size: int, number: int = -1
) -> flops.DecoderFlops:
  """Of a forward pass over one sequence by the model of a stage.

  Args:
    config: of language modelling.
    length: of the sequence; None for the stage's own.
    vocab_size: symbols there are.
    number: of the stage.
  """
  settings = make_settings(config)
  stage = make_stages(settings.stages)[number]
  model = settings.model
  return flops.decoder_flops(
    stage.length if length is None else length,
    vocab_size=vocab_size,
    patterns=stage.layer_patterns(settings.pattern, model['num_layers']),
    mlp=model.get('mlp', 'gelu'),
    **{name: model[name] for name in _SIZES if name in model},
  )


def describe(config, length: int | None, vocab_size: int) -> str:
  """The table of a config's last stage, at its own length if None."""
  whole = of_config(config, length, vocab_size)
  if length is None:
    length = make_stages(make_settings(config).stages)[-1].length
  attention = sum(layer.attention for layer in whole.layers)
  lines = [
    f'GFLOP of a forward pass over {length:,} tokens',
    flops.table(whole),
    f'read-out ({vocab_size:,} symbols) {whole.read_out / 1e9:,.3f}; all '
    f'{whole.total / 1e9:,.3f}, of which attention '
    f'{attention / whole.total:.1%}; a training step, three times that',
  ]
  if whole.paper_total is not None:
    lines.append(
      f"as in the paper's figure 6 (no read-out, attention not halved by "
      f'causality): {whole.paper_total / 1e9:,.3f}'
    )
  return '\n'.join(lines)


def describe_figure_6() -> str:
  lines = [f'forward pass over {_FIGURE_TOKENS:.3g} tokens, FLOP']
  for (model, length), counted in figure_6().items():
    read, _ = FIGURE_6[model, length]
    lines.append(f'{model:>11} {length:6,}: {counted:.3g} (figure: {read:.3g})')
  return '\n'.join(lines)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', help='a file, with its argument after :')
  parser.add_argument('--length', type=int, help="the last stage's by default")
  parser.add_argument('--vocab_size', type=int, default=256)
  parser.add_argument('--figure6', action='store_true')
  args = parser.parse_args(argv)
  if args.figure6:
    print(describe_figure_6())
    return
  for name in ('length', 'vocab_size'):
    value = getattr(args, name)
    if value is not None and value < 1:
      parser.error(f'--{name} must be at least 1, got {value}')
  if args.config is None:
    parser.error('--config is missing (or --figure6)')
  path, _, argument = args.config.partition(':')
  try:
    config = runpy.run_path(path)['get_config'](argument)
    print(describe(config, args.length, args.vocab_size))
  except (OSError, ValueError, KeyError) as error:
    parser.error(f'{args.config}: {error}')


if __name__ == '__main__':
  main()
