"""The GPU benchmark: what it counts, checks and concludes; a rehearsal."""

import dataclasses
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longjax
from experiments.benchmarks import (
  attention,
  cases,
  jax_worker,
  numerics,
  report,
)
from experiments.benchmarks.cases import Branch, Case
from experiments.benchmarks.process import Failed, Hangs, Process

SEGMENTS = (
  Branch(segment=10),
  Branch(stride=2, segment=21),
  Branch(stride=4, segment=40),
)
SMALL = [
  cases.window(60, 7, 8, tokens=120, heads=2),
  cases.window(60, 0, 8, tokens=60, heads=1),
  Case('LongNet', 'longnet', 1, 50, 3, 8, SEGMENTS),
  cases.dilation(60, 5, 4, 8, tokens=60, heads=1),
  dataclasses.replace(cases.longformer(60, 3, side=4, tokens=60), heads=2),
  cases.longformer(60, 9, side=4, layer=True, tokens=60),
  dataclasses.replace(cases.longformer(60, 0, side=4, tokens=60), heads=1),
  cases.lambda_mask(60, 8, 5, size=8, tokens=60, heads=1),
  cases.lambda_mask(60, 80, 5, size=8, tokens=60, heads=1),
]


def dense_counts(case):
  """[heads, length, length] from longjax's patterns."""
  pattern = jax_worker.pattern_of(case)
  i, j = np.arange(case.length)[:, None], np.arange(case.length)
  seen = np.stack(
    [pattern.multiplicity(i, j, head, case.heads) for head in range(case.heads)]
  )
  globals_ = (i < case.num_globals) | (j < case.num_globals)
  return np.maximum(seen, globals_)


@pytest.mark.parametrize('case', SMALL, ids=lambda case: case.name)
def test_counts_are_those_of_the_patterns(case):
  i, j = np.arange(case.length)[:, None], np.arange(case.length)
  wanted = dense_counts(case)
  for head in range(case.heads):
    got = cases.counts(case, i, j, head)
    np.testing.assert_array_equal(got, wanted[head])
  assert cases.pairs(case) == case.batch * wanted.sum()


def test_cases_of_the_issue():
  known = cases.all_cases()
  assert len({case.name for case in known}) == len(known)
  for case in known:
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    if case.family == 'longnet':
      assert case.batch * case.length == cases.LONGNET_TOKENS
  windows = {
    (case.branches[0].left + 1, case.length, case.size)
    for case in known
    if case.family == 'window'
  }
  for length in (8192, 32768, 131072):
    for size in (64, 128):
      for width in (128, 512, 2048, 8192, cases.UNBOUNDED + 1):
        # At 8,192 tokens a window of 8,192 is full attention.
        same = width == length
        assert ((width, length, size) in windows) != same
  assert {
    (case.family, case.num_globals, case.length)
    for case in known
    if case.family in ('longformer', 'layer')
  } == {
    (family, count, length)
    for family in ('longformer', 'layer')
    for count in (0, 1, 64)
    for length in (4096, 16384)
  }
  # 4 T^2 D / 2 operations a head for full causal attention.
  full = cases.window(32768, 0, 128)
  flops = cases.useful_flops(full, 'forward')
  assert flops == pytest.approx(2 * 32768**2 * 128 * 8 * 4, rel=1e-4)
  assert cases.useful_flops(full, 'forward+backward') == 3.5 * flops


def results_of(pattern, inputs):
  q, k, v, dout = inputs

  @jax.jit
  def both(q, k, v):
    out, pull = jax.vjp(
      lambda *x: longjax.attention(*x, pattern, implementation='reference'),
      q,
      k,
      v,
    )
    return out, *pull(dout)

  return dict(zip(numerics.NAMES, both(q, k, v), strict=True))


@pytest.mark.parametrize(
  'case, detached',
  [(SMALL[0], False), (SMALL[2], False), (SMALL[2], True)],
  ids=['window', 'LongNet', 'detached LongNet'],
)
def test_the_check_accepts_what_is_right_and_nothing_else(
  case, detached, monkeypatch
):
  # Several blocks of queries, and slices of the keys.
  monkeypatch.setattr(numerics, 'BLOCK', 20)
  pattern = jax_worker.pattern_of(case)
  if detached:
    pattern = dataclasses.replace(pattern, detach_weights=True)
  rng = np.random.default_rng(0)
  shape = case.batch, case.length, case.heads, case.size
  inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)]
  results = results_of(pattern, inputs)

  def check(results, **options):
    return numerics.check(jnp, case, inputs, results, jit=jax.jit, **options)

  errors = check(results, detached=detached)
  assert errors.keys() == set(numerics.NAMES) and max(errors.values()) < 1e-5
  if detached:
    with pytest.raises(ArithmeticError, match='dq .*, dk '):
      check(results)
  for name in numerics.NAMES:
    wrong = results | {name: results[name].at[-1, -1, -1].multiply(5.0)}
    with pytest.raises(ArithmeticError, match=f'not timed: off by {name} '):
      check(wrong, detached=detached)
  missing = results | {'out': results['out'].at[0, 3, 0, 0].set(jnp.nan)}
  with pytest.raises(ArithmeticError, match='out nan'):
    check(missing, detached=detached)


def test_long_pieces_are_what_nothing_else_influences():
  long = cases.longnet(1 << 20, 'table 2')
  (row, head, rows, part), last = numerics.pieces(long)
  assert (row, head, rows, part.length) == (0, 0, slice(0, 32768), 32768)
  assert last[:2] == (0, 11) and last[2].start == (1 << 20) - 32768
  assert next(iter(numerics.pieces(SMALL[2])))[3] == SMALL[2]
  # A window's keys: as many for each block, and all that it sees.
  case = cases.window(8192, 2048, 64)
  for first in range(0, 8192, numerics.BLOCK):
    keys = numerics._keys(case, first)
    assert keys.stop - keys.start == 2047 + numerics.BLOCK
    assert keys.start <= max(0, first - 2047)
    assert keys.stop >= first + numerics.BLOCK


def test_processes_fail_alone():
  worker = Process(sys.executable, 'tests.experiments.misbehaving_worker')
  try:
    assert worker('add', a=1, b=2) == {'sum': 3}
    first = worker.ready['pid']
    assert worker('chat') == {}
    with pytest.raises(Failed, match='NotImplementedError: not for file.py'):
      worker('refuse')
    assert worker('add', a=1, b=2) and worker.ready['pid'] == first
    with pytest.raises(Failed, match='die: .* ended with exit code 3'):
      worker('die')
    started = time.monotonic()
    with pytest.raises(Hangs, match='hang: no answer within 1 s'):
      worker('hang', within=1)
    assert time.monotonic() - started < 20
    assert worker('add', a=2, b=2) == {'sum': 4}
    assert worker.ready['pid'] != first
  finally:
    worker.close()


def test_heavy_cases_run_alone():
  light = [cases.window(8192, w, 64) for w in (128, 512, 2048)]
  heavy = cases.longnet(1 << 20, 'table 2')
  assert list(attention.batches([*light, heavy, light[0]], lanes=2)) == [
    light[:2],
    light[2:],
    [heavy],
    light[:1],
  ]


def synthetic_record():
  def entry(case, times, **memory):
    return {
      'run': 0,
      'case': case.to_json(),
      'results': {
        who: {
          mode: {'seconds': seconds, 'host_share': 0.1}
          for mode, seconds in zip(cases.MODES, pair, strict=True)
        }
        | {'memory': dict.fromkeys(cases.MODES, memory.get(who, 1e9))}
        for who, pair in times.items()
      },
    }

  window = cases.window(32768, 2048, 128)
  layer = cases.longformer(16384, 64, layer=True)
  nets = [cases.longnet(n, 'table 2') for n in (8192, 32768)]
  flops = cases.useful_flops(window, 'forward')
  ours = flops / 500e12
  record = {
    'runs': [
      {
        'date': 'today',
        'commit': 'c0ffee',
        'rates': {
          'jax': {'flops': 780e12, 'bytes': 4.2e12, 'device': {'kind': 'H'}},
          'torch': {'flops': 800e12, 'bytes': 4.0e12},
          'none': {'failed': 'no such library'},
        },
        'not_reached': ['a case'],
      }
    ],
    'cases': {
      window.name: entry(
        window,
        {
          cases.MOSAIC: (ours, 3 * ours),
          cases.CUDNN: (1.2 * ours, 3.1 * ours),
          cases.FLEX: (1.1 * ours, 9 * ours),
        },
      ),
      layer.name: entry(
        layer,
        {cases.MOSAIC: (1.0, 1.0), cases.HF: (9.0, 9.0)},
        **{cases.MOSAIC: 3e8},
      ),
      nets[0].name: entry(
        nets[0], {cases.MOSAIC: (1.0, 2.0), cases.GATHER: (3.0, 4.0)}
      ),
      nets[1].name: entry(nets[1], {cases.MOSAIC: (1.5, 4.0)}),
    },
  }
  record['cases'][nets[1].name]['results'][cases.GATHER] = {
    'failed': 'Hangs: no answer\nlong trace'
  }
  return record


def test_targets_and_table():
  record = synthetic_record()
  found = {
    name: (value, report.verdict(value, bound, below))
    for name, value, bound, below in report.targets(record)
  }

  def verdict(start):
    (name,) = [name for name in found if name.startswith(start)]
    return found[name]

  window, layer, short, long = record['cases']
  value, met = verdict(f'{window}: forward, cuDNN')
  assert value == pytest.approx(1.2) and met == 'met'
  value, met = verdict(f'{window}: forward, FlexAttention')
  assert value == pytest.approx(1.1) and met == 'MISSED'
  value, met = verdict(f'{window}: backward')
  assert value == pytest.approx(1.9 / 2) and met == 'MISSED'
  value, met = verdict(f'{window}: forward, of the matmul rate')
  assert value == pytest.approx(500 / 800) and met == 'met'
  assert verdict(f'{layer}: forward+backward, Hugging')[1] == 'met'
  value, met = verdict(f'{layer}: forward+backward, peak memory')
  assert value == pytest.approx(0.3) and met == 'MISSED'
  assert verdict(f'{short}: forward, ')[1] == 'met'
  assert verdict(f'{short}: forward+backward, ')[1] == 'MISSED'
  value, met = verdict(f'{long}: forward, ')
  assert math.isnan(value) and met == 'not measured'
  assert verdict('LongNet table 2: forward, slowest')[1] == 'met'
  assert verdict('LongNet table 2: forward+backward, slowest')[1] == 'MISSED'

  text = report.text(record)
  (row,) = [line for line in text.splitlines() if f'| {window} |' in line]
  cells = [cell.strip() for cell in row.split('|')[1:-1]]
  assert cells[1:5] == [
    'forward',
    f'{1e3 * cells_ms(record):.3f}',
    '500',
    '62%',
  ]
  assert cells[7:9] == ['1.20', '1.10']
  assert text.count('MISSED') == sum(v[1] == 'MISSED' for v in found.values())
  assert f'gather-flash-scatter: Hangs: no answer (1: {long})' in text
  assert 'long trace' not in text
  assert 'no time left in the run of today: a case' in text


def cells_ms(record):
  entry = record['cases']['window 2k, 32k, D128']
  return report.seconds(entry, cases.MOSAIC, 'forward')


def test_rehearsal(tmp_path, capsys):
  """The whole benchmark on a CPU, our kernels interpreted."""
  folder = tmp_path / 'record'
  arguments = ['--rehearse', f'--record={folder}', '--repeats=1']
  attention.main([*arguments, '--only=^window'])
  record = json.loads((folder / 'results.json').read_text())
  (entry,) = record['cases'].values()
  results = entry['results']
  assert results.keys() == {cases.MOSAIC, *SMALL[0].rivals()}
  for who in (cases.MOSAIC, cases.XLA):
    result = results[who]
    assert 'failed' not in result, result
    assert result['errors'].keys() == {*numerics.NAMES, 'forward'}
    assert max(result['errors'].values()) <= numerics.TOLERANCE
    assert all(result[mode]['seconds'] > 0 for mode in cases.MODES)
    assert result['memory'].keys() == set(cases.MODES)
  # What cannot be had here says why.
  assert 'cuDNN' in results[cases.CUDNN]['failed']
  if (attention.ROOT / '.venv-goldens').exists():
    assert 'failed' not in results[cases.FLASH]
  else:
    print('no .venv-goldens (make goldens): PyTorch was not rehearsed')
    assert 'exit code' in results[cases.FLASH]['failed']
  readme = (folder / 'README.md').read_text()
  assert 'A rehearsal on a CPU' in readme and readme in capsys.readouterr().out
  # What is in a record is not run again, and what time does not allow is named.
  resume = f'--resume={folder / "results.json"}'
  attention.main([*arguments, resume, '--budget-seconds=0', '--only=^window|Λ'])
  record = json.loads((folder / 'results.json').read_text())
  assert len(record['cases']) == 1 and len(record['runs']) == 2
  assert record['runs'][1]['not_reached'] == ['Λ 64+4, 256']
