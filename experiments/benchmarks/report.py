"""The record of attention.py as text: table, targets, what failed and why."""

import math

from experiments.benchmarks import cases
from experiments.benchmarks.cases import (
  CUDNN,
  FLASH,
  FLEX,
  GATHER,
  GATHER_FLEX,
  HF,
  MODES,
  MOSAIC,
  TOKAMAX,
  TORCH_CUDNN,
  XLA,
)

FORWARD, BOTH = MODES
RIVALS = (
  CUDNN,
  FLEX,
  FLASH,
  TORCH_CUDNN,
  GATHER,
  GATHER_FLEX,
  HF,
  TOKAMAX,
  XLA,
)


def best_rate(run, unit):
  """The highest measured rate of a run, or nan."""
  rates = [r.get(unit, math.nan) for r in run.get('rates', {}).values()]
  return max((r for r in rates if r == r), default=math.nan)


def seconds(entry, who, mode):
  """Median, or nan where there is none; 'backward' is the difference."""
  if mode == 'backward':
    return seconds(entry, who, BOTH) - seconds(entry, who, FORWARD)
  result = entry['results'].get(who, {})
  return result.get(mode, {}).get('seconds', math.nan)


def memory(entry, who, mode):
  return entry['results'].get(who, {}).get('memory', {}).get(mode, math.nan)


def figures(entry, mode, run, who=MOSAIC):
  """What an implementation reaches, in the units of the table."""
  case = cases.Case.from_json(entry['case'])
  time = seconds(entry, who, mode)
  flops = cases.useful_flops(case, mode)
  return {
    'ms': 1e3 * time,
    'tflops': flops / time / 1e12,
    'matmul': flops / time / best_rate(run, 'flops'),
    'copy': cases.fewest_bytes(case, mode) / time / best_rate(run, 'bytes'),
    'memory': memory(entry, who, mode),
  }


def lines(name, entry):
  """A case in a few lines, while the run goes on."""
  text = [name]
  for who, result in entry['results'].items():
    times = ', '.join(
      f'{mode} {1e3 * result[mode]["seconds"]:.3f} ms'
      for mode in MODES
      if mode in result
    )
    reason = result.get('failed', '').split('\n')[0][:160]
    text.append(f'  {who}: {times} {reason}'.rstrip())
  return '\n'.join(text)


# Targets.


def targets(record):
  """[(name, value, bound, whether lower is better)] of issue 3, with nan for
  what was not measured."""
  found = []
  entries = {
    name: (cases.Case.from_json(entry['case']), entry)
    for name, entry in record['cases'].items()
  }

  def add(name, value, bound, below=False):
    found.append((name, value, bound, below))

  for name, (case, entry) in entries.items():

    def ratio(rival, mode, entry=entry):
      return seconds(entry, rival, mode) / seconds(entry, MOSAIC, mode)

    rivals = case.rivals()
    if case.family == 'window':
      middle = 512 <= case.branches[0].left + 1 <= 2048
      add(
        f'{name}: forward, {CUDNN} / ours',
        ratio(CUDNN, FORWARD),
        1.15 if middle else 1.0,
      )
    if FLEX in rivals:
      add(f'{name}: forward, {FLEX} / ours', ratio(FLEX, FORWARD), 1.15)
      # Of the two that the project measures itself by.
      both = [ratio(who, 'backward') for who in (FLEX, CUDNN) if who in rivals]
      best = min((r for r in both if r == r), default=math.nan)
      add(f'{name}: backward, the better of them / ours', best, 1.0)
    if GATHER in rivals:
      for mode in MODES:
        ways = [ratio(who, mode) for who in (GATHER, GATHER_FLEX)]
        best = min((r for r in ways if r == r), default=math.nan)
        add(f'{name}: {mode}, {GATHER} / ours', best, 2.5)
    if (case.family, case.length, case.num_globals) == ('layer', 16384, 64):
      add(f'{name}: {BOTH}, {HF} / ours', ratio(HF, BOTH), 8.0)
      share = memory(entry, MOSAIC, BOTH) / memory(entry, HF, BOTH)
      add(f'{name}: {BOTH}, peak memory, ours / {HF}', share, 0.25, True)
    if case.family == 'window' and (
      (case.branches[0].left, case.size) == (2047, 128)
    ):
      run = record['runs'][entry['run']]
      share = figures(entry, FORWARD, run)['matmul']
      add(f'{name}: forward, of the matmul rate', share, 0.6)
  for schedule in cases.SCHEDULES:
    for mode in MODES:
      times = [
        seconds(entry, MOSAIC, mode)
        for name, (_, entry) in entries.items()
        if name.startswith(f'LongNet {schedule}')
      ]
      times = [t for t in times if t == t]
      if len(times) > 1:
        add(
          f'LongNet {schedule}: {mode}, slowest / fastest of {len(times)} '
          'lengths',
          max(times) / min(times),
          1.6,
          True,
        )
  return found


def verdict(value, bound, below):
  if value != value:
    return 'not measured'
  return 'met' if (value <= bound if below else value >= bound) else 'MISSED'


# The page.


def _cell(value, form):
  return '-' if value != value else format(value, form)


def _against(entry, who, mode):
  theirs, ours = (seconds(entry, name, mode) for name in (who, MOSAIC))
  if ours != ours and theirs == theirs:
    return f'({1e3 * theirs:.3f} ms)'
  return _cell(theirs / ours, '.2f')


def table(record):
  """One row for each case and mode; only rivals that were timed at all."""
  shown = [
    who
    for who in RIVALS
    if any(
      seconds(entry, who, FORWARD) == seconds(entry, who, FORWARD)
      for entry in record['cases'].values()
    )
  ]
  heads = ['case', 'pass', 'ms', 'TFLOP/s', 'of matmul', 'of copy', 'peak MB']
  heads += [f'{who} / ours' for who in shown]
  rows = [heads, ['---'] * len(heads)]
  for name, entry in record['cases'].items():
    run = record['runs'][entry['run']]
    for mode in MODES:
      got = figures(entry, mode, run)
      result = entry['results'].get(MOSAIC, {}).get(mode, {})
      bound = ' (host)' if result.get('host_share', 0) > 0.9 else ''
      rows.append(
        [
          name if mode == FORWARD else '',
          mode,
          _cell(got['ms'], '.3f') + bound,
          _cell(got['tflops'], '.0f'),
          _cell(got['matmul'], '.0%'),
          _cell(got['copy'], '.0%'),
          _cell(got['memory'] / 1e6, '.0f'),
        ]
        + [
          _cell(seconds(entry, who, mode) / seconds(entry, MOSAIC, mode), '.2f')
          for who in shown
        ]
      )
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def failures(record):
  """Who could not be timed in which cases, by reason."""
  reasons = {}
  for name, entry in record['cases'].items():
    for who, result in entry['results'].items():
      if 'failed' in result:
        reason = result['failed'].split('\n')[0][:300]
        reasons.setdefault((who, reason), []).append(name)
  return [
    f'- {who}: {reason} ({len(names)}: {"; ".join(names)})'
    for (who, reason), names in reasons.items()
  ]


def text(record):
  """README.md of the record."""
  rehearsal = any(run.get('rehearsal') for run in record['runs'])
  parts = ['# Attention on a GPU, against everybody else\n']
  if rehearsal:
    parts.append('**A rehearsal on a CPU: no figure here means anything.**\n')
  parts.append(
    'Numerics first (`errors` in results.json), then times in turns; useful '
    'TFLOP/s count unmasked pairs only. A ratio above 1 says that longjax is '
    'faster. "of matmul" and "of copy": shares of the rates measured in the '
    'same run; bytes are the fewest possible. Peak memory includes inputs and '
    'results. Forward+backward is one program. (host): the host was slower '
    'than the device. Every figure, command, version and kernel time: '
    '`results.json`.\n'
  )
  for run in record['runs']:
    rates = ', '.join(
      f'{role} {r["flops"] / 1e12:.0f} TFLOP/s and {r["bytes"] / 1e12:.2f} TB/s'
      for role, r in run.get('rates', {}).items()
      if 'flops' in r
    )
    device = run.get('rates', {}).get('jax', {}).get('device', {})
    parts.append(
      f'- {run["date"]}, commit {run["commit"]}, {device.get("kind", "?")}: '
      f'bf16 matmul and copy by {rates or "nobody"}'
    )
  parts.append('')
  parts.append(table(record))
  parts.append('\n## Targets\n')
  for name, value, bound, below in targets(record):
    sign = '<=' if below else '>='
    parts.append(
      f'- {verdict(value, bound, below)}: {name} = {_cell(value, ".2f")} '
      f'({sign} {bound})'
    )
  parts.append('\n## Not timed\n')
  parts += failures(record) or ['- nothing']
  for run in record['runs']:
    if run.get('not_reached'):
      parts.append(
        f'- no time left in the run of {run["date"]}: '
        f'{"; ".join(run["not_reached"])}'
      )
  return '\n'.join(parts) + '\n'
