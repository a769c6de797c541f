"""Trains configs/longnet_context.py whole, and measures Table 2 and Figure 7b.

  python -m experiments.longnet_context --out=FOLDER

Runs that are finished are not run again, and one that was stopped goes on where
it was. FOLDER gets results.json, table2.png and figure7b.png.

Table 2: the test split, cut into sequences of each test length, scored whole;
beyond the trained length l with blockwise causal attention, blocks of l / 2.
Figure 7b: the last bytes of windows of growing length that all end at the same
places.
"""

import itertools
import json
import pathlib
import sys

import numpy as np
from absl import app, flags

import longjax
from configs import longnet_context
from experiments import stamp
from longjax import training
from longjax.evaluation import flops
from longjax.evaluation.length import streamed_losses

_OUT = flags.DEFINE_string('out', None, 'Folder of the record.')
_RUNS = flags.DEFINE_string(
  'runs', 'runs/longnet_context', 'Folder of the runs themselves.'
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many seeds; dense has one.')
_TOKENS = flags.DEFINE_integer('tokens', 2**20, 'Bytes that a run trains on.')
_LENGTHS = flags.DEFINE_list('lengths', ['512', '2048', '8192'], 'Trained at.')
_TESTED = flags.DEFINE_list(
  'tested', ['512', '2048', '8192', '32768'], 'Tested at.'
)
_RUNLOCAL = flags.DEFINE_bool('runlocal', False, 'Seconds for each: a test.')

# Bytes scored at the end of a window, and between the ends of two windows.
SUFFIX, APART = 128, 1024
# Bytes that a call scores: a test sequence of any length fits.
_CALL = 32_768


def main(argv):
  del argv
  lengths, tested = (
    sorted(map(int, flag.value)) for flag in (_LENGTHS, _TESTED)
  )
  wanted = [
    (attention, length, seed)
    for attention, length, seed in itertools.product(
      longnet_context.ATTENTION, lengths, range(_SEEDS.value)
    )
    if attention != 'dense' or (length == lengths[-1] and not seed)
  ]
  results = []
  for attention, length, seed in wanted:
    name = f'{attention}_{length}_{_TOKENS.value}_seed{seed}'
    print(name, file=sys.stderr)
    results.append(
      run(attention, length, seed, tested, pathlib.Path(_RUNS.value, name))
    )
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  found = {
    **stamp.stamp(stamp.command('experiments.longnet_context')),
    'suffix': SUFFIX,
    'apart': APART,
    'results': results,
  }
  (out / 'results.json').write_text(json.dumps(found, indent=2) + '\n')
  draw_table(results, out / 'table2.png')
  draw_windows(results, out / 'figure7b.png')
  for name in ('results.json', 'table2.png', 'figure7b.png'):
    print(out / name)


def run(attention, length, seed, tested, workdir: pathlib.Path) -> dict:
  """Trains and measures one model, or reads what it gave."""
  finished = workdir / 'context.json'
  if finished.exists():
    return json.loads(finished.read_text())
  arg = (
    f'attention={attention},length={length},seed={seed},tokens={_TOKENS.value}'
  )
  config = longnet_context.get_config(
    arg + (',runlocal' if _RUNLOCAL.value else '')
  )
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
    'attention': attention,
    'length': length,
    'seed': seed,
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
  flags.mark_flag_as_required('out')
  try:
    app.run(main)
  except (ValueError, OSError, training.CheckpointError) as e:
    sys.exit(f'error: {e}')
