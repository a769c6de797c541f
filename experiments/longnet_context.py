"""Trains configs/longnet_context.py whole, and measures Table 2 and Figure 7b.

  python -m experiments.longnet_context --out=FOLDER

Runs that are finished are not run again, and one that was stopped goes on where
it was. FOLDER gets results.json, table2.png and figure7b.png.

Table 2: the test split, cut into sequences of each test length, scored whole;
beyond the trained length l with blockwise causal attention, blocks of l / 2.
Figure 7b: the last bytes of windows of growing length that all end at the same
places.
"""

import argparse
import itertools
import json
import pathlib
import sys

import numpy as np

import longjax
from configs import longnet_context
from experiments import stamp
from longjax import training
from longjax.evaluation import flops
from longjax.evaluation.length import streamed_losses

# Bytes scored at the end of a window, and between the ends of two windows.
SUFFIX, APART = 128, 1024
# Bytes that a call scores: a test sequence of any length fits.
_CALL = 32_768


def parse(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add(
    '--runs',
    type=pathlib.Path,
    default=pathlib.Path('runs/longnet_context'),
    help='folder of the runs themselves',
  )
  add('--seeds', type=int, default=3, help='how many; dense has one')
  add('--tokens', type=int, default=2**20, help='bytes that a run trains on')
  add('--lengths', type=int, nargs='+', default=[512, 2048, 8192])
  add('--tested', type=int, nargs='+', default=[512, 2048, 8192, 32_768])
  add('--runlocal', action='store_true', help='seconds for each: a test')
  args = parser.parse_args(argv)
  if args.seeds < 1:
    parser.error(f'--seeds must be at least 1, got {args.seeds}')
  if min(args.tested) < 2 or max(args.tested) > _CALL:
    parser.error(
      f'--tested must lie in 2 ... {_CALL}, got {min(args.tested)} to '
      f'{max(args.tested)}'
    )
  try:
    for length in args.lengths:
      longnet_context.get_config(f'length={length},tokens={args.tokens}')
  except ValueError as error:
    parser.error(str(error))
  return args


def main(argv=None):
  args = parse(argv)
  longest = max(args.lengths)
  wanted = [
    (attention, length, seed)
    for attention, length, seed in itertools.product(
      longnet_context.ATTENTION, sorted(args.lengths), range(args.seeds)
    )
    if attention != 'dense' or (length == longest and not seed)
  ]
  results = []
  for attention, length, seed in wanted:
    name = f'{attention}_{length}_{args.tokens}_seed{seed}'
    print(name, file=sys.stderr)
    arg = (
      f'attention={attention},length={length},seed={seed},tokens={args.tokens}'
    )
    config = longnet_context.get_config(
      arg + (',runlocal' if args.runlocal else '')
    )
    results.append(
      {'attention': attention, 'length': length, 'seed': seed}
      | run(config, sorted(args.tested), args.runs / name)
    )
  out = args.out
  out.mkdir(parents=True, exist_ok=True)
  found = {
    **stamp.stamp(stamp.command('experiments.longnet_context', argv)),
    'suffix': SUFFIX,
    'apart': APART,
    'results': results,
  }
  (out / 'results.json').write_text(json.dumps(found, indent=2) + '\n')
  draw_table(results, out / 'table2.png')
  draw_windows(results, out / 'figure7b.png')
  for name in ('results.json', 'table2.png', 'figure7b.png'):
    print(out / name)


def run(config, tested, workdir: pathlib.Path) -> dict:
  """Trains and measures one model, or reads what it gave."""
  finished = workdir / 'context.json'
  if finished.exists():
    return json.loads(finished.read_text())
  length = config.stages[0]['length']
  trained = training.train_and_evaluate(config, workdir)
  loaded = training.load(config, workdir)
  pattern = loaded.model.patterns[0]
  text = loaded.task.corpus.test[: config.evaluation.test_characters or None]

  def nats(tokens, model):
    rows = max(1, _CALL // tokens.shape[1])
    return np.concatenate(
      [
        streamed_losses(model, tokens[i : i + rows], chunk=tokens.shape[1])
        for i in range(0, len(tokens), rows)
      ]
    )

  table = {}
  for test_length in tested:
    model = loaded.model
    if test_length > length:
      beyond = longjax.BlockwiseCausal(length // 2, pattern)
      model = training.load(config, workdir, patterns=beyond).model
    sequences = len(text) // test_length
    if sequences:
      tokens = text[: sequences * test_length].reshape(sequences, -1)
      table[test_length] = float(nats(tokens, model).mean(dtype=np.float64))
  windows, ends = {}, range(length, len(text) + 1, APART)
  for window in (2**i for i in range(8, length.bit_length())):
    tokens = np.stack([text[end - window : end] for end in ends])
    last = nats(tokens, loaded.model)[:, -SUFFIX:]
    windows[window] = float(last.mean(dtype=np.float64))
  pairs = flops.visible_pairs(pattern, length, config.model.num_heads)
  result = {
    'pattern': repr(pattern),
    'keys_per_query': sum(pairs) / len(pairs) / length,
    'parameters': trained['parameters'],
    'steps': trained['step'],
    'data': trained['description'],
    'test_sha256': trained['split_sha256'],
    'test_bytes': len(text),
    'nats_at': table,
    'nats_of_suffix': windows,
    'suffixes': len(ends),
  }
  finished.write_text(json.dumps(result, indent=2) + '\n')
  # As it is read again: keys of JSON are texts.
  return json.loads(finished.read_text())


def grouped(results, key):
  """{(attention, trained length): ([x], [seeds, x])}."""
  groups = {}
  for result in results:
    group = groups.setdefault((result['attention'], result['length']), [])
    group.append(result[key])
  return {
    name: (
      [int(x) for x in rows[0]],
      np.array([list(row.values()) for row in rows]),
    )
    for name, rows in groups.items()
  }


def _style(attention, length, lengths):
  shade = ['C0', 'C1', 'C2'][longnet_context.ATTENTION.index(attention)]
  marker = 'ovsD^P'[lengths.index(length) % 6]
  return dict(
    color=shade, marker=marker, label=f'{attention}, trained at {length:,}'
  )


def _draw(groups, path, xlabel, ylabel, title):
  from matplotlib import figure

  lengths = sorted({length for _, length in groups})
  canvas = figure.Figure(figsize=(8, 4.5), layout='constrained')
  axes = canvas.add_subplot()
  for (attention, length), (x, rows) in groups.items():
    style = _style(attention, length, lengths)
    axes.plot(x, rows.mean(axis=0), **style)
    if len(rows) > 1:
      axes.fill_between(
        x, rows.min(axis=0), rows.max(axis=0), color=style['color'], alpha=0.15
      )
  axes.set_xscale('log', base=2)
  ticks = sorted({tick for x, _ in groups.values() for tick in x})
  axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.set_title(title, fontsize='medium')
  axes.grid(alpha=0.3)
  canvas.legend(loc='outside right upper', fontsize='small')
  canvas.savefig(path, dpi=130)


def draw_table(results, path):
  """Perplexity against test length, a line for each kind and trained length."""
  groups = {
    name: (x, np.exp(rows))
    for name, (x, rows) in grouped(results, 'nats_at').items()
  }
  _draw(
    groups,
    path,
    'test length (bytes)',
    'perplexity of a byte',
    'mean, least and most over seeds; source code of the standard library',
  )


def draw_windows(results, path):
  """Loss of the same bytes against how much before them is read."""
  _draw(
    grouped(results, 'nats_of_suffix'),
    path,
    'window, its suffix included (bytes)',
    f'nats a byte of the last {SUFFIX}',
    'mean, least and most over seeds; each line has windows of its own',
  )


if __name__ == '__main__':
  try:
    main()
  except (ValueError, OSError, training.CheckpointError) as e:
    sys.exit(f'error: {e}')
