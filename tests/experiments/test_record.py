"""Records: what they must have, and that README.md's table is theirs."""

import json
import shutil
import subprocess

import pytest

from experiments import record, stamp

RECORDS = sorted(p for p in record.RECORDS.iterdir() if p.is_dir())


@pytest.mark.parametrize('folder', RECORDS, ids=lambda folder: folder.name)
def test_record_is_whole(folder):
  assert record.problems(folder) == []


def test_readme_has_the_table_of_the_records():
  text = record.README.read_text()
  assert record.with_table(text, record.table()) == text, (
    'run python -m experiments.record readme'
  )


@pytest.fixture
def good(tmp_path):
  folder = tmp_path / '2026-11-20_demo'
  shutil.copytree(record.RECORDS / folder.name, folder)
  return folder


def change(folder, **values):
  path = folder / record.FILE
  changed = json.loads(path.read_text()) | values
  kept = {k: v for k, v in changed.items() if v is not ...}
  path.write_text(json.dumps(kept))


def change_run(folder, **values):
  run = json.loads((folder / record.FILE).read_text())['runs'][0] | values
  change(folder, runs=[{k: v for k, v in run.items() if v is not ...}])


BREAKS = {
  'unknown key': (lambda f: change(f, sed=1), "'sed': did you mean 'seed'?"),
  'no summary': (lambda f: change(f, summary=...), "lacks 'summary'"),
  'no seed': (lambda f: change(f, seed=...), "lacks 'seed'"),
  'other seed': (lambda f: change(f, seed=3), 'seed is 3, in config.json 0'),
  'words for a seed': (lambda f: change(f, seed='one'), "'one' is no number"),
  'no runs': (lambda f: change(f, runs=[]), 'has no runs'),
  'no command': (lambda f: change_run(f, command=...), "lacks 'command'"),
  'no device': (lambda f: change_run(f, device=''), "lacks 'device'"),
  'short commit': (lambda f: change_run(f, commit='cf0e4a4'), "'cf0e4a4' is"),
  'no jax': (lambda f: change_run(f, versions={'python': '3'}), "of 'jax'"),
  'a place': (
    lambda f: change_run(f, command='make demo OUT=/home/me/runs/demo'),
    'record.json names a place on a machine',
  ),
  'a password': (
    lambda f: change_run(f, command='--storage=postgresql://me:secret@host/db'),
    'or a password',
  ),
  'figures by hand': (
    lambda f: change(f, summary='1.83 bits/char'),
    'takes no figure from a file',
  ),
  'no such figure': (
    lambda f: change(f, summary='{result.json/bits_per_charcter:.3f}'),
    "did you mean 'bits_per_character'?",
  ),
  'no such file': (
    lambda f: change(f, summary='{results.json/bits:.3f}'),
    "no file for the figure 'results.json/bits'",
  ),
  'no format': (
    lambda f: change(f, summary='{result.json/step:} and {result.json/step}'),
    '{result.json/step} has no format',
  ),
  'no number': (
    lambda f: change(f, summary='{result.json/data:.3f}'),
    "'python_source', which '.3f' cannot format",
  ),
  'superseded by nothing': (
    lambda f: change(f, superseded_by='2027-01-01_demo'),
    "'2027-01-01_demo', which is not there",
  ),
  'no record': (lambda f: (f / 'record.json').unlink(), 'record.json is miss'),
  'no JSON': (lambda f: (f / 'record.json').write_text('{'), 'record.json: '),
  'no README': (lambda f: (f / 'README.md').unlink(), 'README.md is missing'),
  'no title': (lambda f: (f / 'README.md').write_text('x'), 'with its title'),
  'a picture unnamed': (
    lambda f: (f / 'README.md').write_text('# Demo\n\n![a](loss.png)\n'),
    'README.md does not name patterns.png',
  ),
  'a picture lost': (lambda f: (f / 'loss.png').unlink(), 'shows loss.png, wh'),
  'no config': (lambda f: (f / 'config.json').unlink(), 'config.json is miss'),
  'a heavy file': (
    lambda f: (f / 'all.json').write_bytes(b'0' * (record.LARGEST + 1)),
    'all.json has more than 1,048,576 bytes',
  ),
  'a prefix not named': (
    lambda f: (f / 'text.json').write_text('"a prefix or other text and ..."'),
    'the summary must say so',
  ),
}


@pytest.mark.parametrize(('spoil', 'message'), BREAKS.values(), ids=BREAKS)
def test_what_is_wrong_is_found(spoil, message, good):
  assert record.problems(good) == []
  spoil(good)
  found = record.problems(good)
  assert any(message in line for line in found), found
  assert all(line.startswith('2026-11-20_demo: ') for line in found)


def test_an_older_record_says_what_is_not_known(good):
  change_run(good, device='')
  change(good, unknown={'device': 'not written down at the time'})
  assert record.problems(good) == []


def test_figures(tmp_path):
  (tmp_path / 'a.json').write_text(
    '{"x/y": {"n=1: a / b": [1, 4]}, "low": {"at 5": 0.5}}'
  )
  assert (
    record.render(
      tmp_path,
      '{a.json/x/y/n=1: a / b/-1:.1f}, {a.json/x/y/n=1: a / b/1 over '
      'a.json/low/at 5:d}'.replace(':d', ':.0f')
      + ' and {a.json/x/y/n=1: a / b/0 minus a.json/low/at 5:.2f}',
    )
    == '4.0, 8 and 0.50'
  )


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / 'runs' / 'x'
  folder.mkdir(parents=True)
  demo = record.RECORDS / '2026-11-20_demo'
  for name in ('metrics.jsonl', 'result.json', 'loss.png'):
    shutil.copy(demo / name, folder)
  config = json.loads((demo / 'config.json').read_text())
  config['data']['path'] = '/home/me/text8.zip'
  (folder / 'config.json').write_text(json.dumps(config))
  stamp.write_start(
    folder,
    stamp.command(
      'experiments.main', ['--config.data.path=/home/me/text8.zip']
    ),
  )
  return folder


def make(workdir, *more, name='x'):
  record.main(
    [
      'make',
      f'--workdir={workdir}',
      f'--name={name}',
      f'--records={workdir.parent.parent}',
      '--summary={result.json/bits_per_character:.2f} bits',
      *more,
    ]
  )


def test_a_record_is_made_of_a_workdir(workdir, capsys):
  make(workdir)
  [folder] = workdir.parent.parent.glob('*_x')
  assert capsys.readouterr().out.strip() == str(folder)
  assert record.problems(folder) == []
  made = json.loads((folder / record.FILE).read_text())
  [run] = made['runs']
  assert run['command'] == (
    'python -m experiments.main --config.data.path=text8.zip'
  )
  assert made['seed'] == 0
  config = json.loads((folder / 'config.json').read_text())
  assert config['data']['path'] == 'text8.zip'
  text = (folder / 'README.md').read_text()
  assert text.startswith('# x\n\n1.83 bits.\n')
  assert '| bits_per_character | 1.83065 |' in text
  assert '![loss](loss.png)' in text
  with pytest.raises(SystemExit):
    make(workdir)
  assert 'exists: choose another name' in capsys.readouterr().err


MISTAKES = {
  'no folder': (lambda w: shutil.rmtree(w), (), 'is no folder'),
  'nothing known': (
    lambda w: (w / stamp.STARTS).unlink(),
    (),
    'says what ran there: there is no starts.jsonl',
  ),
  'no seed': (
    lambda w: (w / 'config.json').write_text('{}'),
    (),
    'says the seed: give --seed',
  ),
  'a wrong seed': (lambda w: None, ('--seed=one',), '--seed=one is no number'),
}


@pytest.mark.parametrize(
  ('spoil', 'more', 'message'), MISTAKES.values(), ids=MISTAKES
)
def test_what_cannot_be_recorded(spoil, more, message, workdir, capsys):
  spoil(workdir)
  with pytest.raises(SystemExit) as error:
    make(workdir, *more)
  assert error.value.code == 1
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


def test_files_with_stamps_of_their_own(workdir):
  (workdir / stamp.STARTS).unlink()
  values = stamp.stamp('python -m experiments.measure', device='a TPU')
  (workdir / 'figures.json').write_text(json.dumps(values))
  make(workdir, '--seed=0,1', name='y')
  [folder] = workdir.parent.parent.glob('*_y')
  made = json.loads((folder / record.FILE).read_text())
  assert made['runs'][0]['device'] == 'a TPU' and made['seed'] == [0, 1]
  assert record.problems(folder) == []


def test_markers():
  text = f'a\n{record.BEGIN}\nold\n{record.END}\nb\n'
  assert record.with_table(text, 'new') == text.replace('old', 'new')
  with pytest.raises(record.RecordError, match='lacks the lines'):
    record.with_table('a', 'new')


# Stamps.


@pytest.mark.parametrize(
  ('given', 'published'),
  [
    ('--config.data.path=/home/me/text8.zip', '--config.data.path=text8.zip'),
    ('--storage=postgresql://u:pw@h/db', '--storage=postgresql://u:***@h/db'),
    ('runs/a/b', 'runs/a/b'),
    ('/tmp/x/y.py:small,a=/q/r', 'y.py:small,a=r'),
    ('1/19 of a', '1/19 of a'),
    ('https://arxiv.org/abs/1', 'https://arxiv.org/abs/1'),
    (['/a/b', {'c': '/d/e', 'f': 1}], ['b', {'c': 'e', 'f': 1}]),
  ],
)
def test_places_and_passwords_are_not_published(given, published):
  assert stamp.without_places(given) == published


def test_a_stamp_is_of_this_tree(monkeypatch):
  monkeypatch.delenv('COMMIT', raising=False)
  found = stamp.stamp(stamp.command('a.b', ['--c=d e']))
  assert found['command'] == "python -m a.b '--c=d e'"
  assert set(record.RUN_KEYS) <= set(found)
  assert 'cores' in found['device']
  if (stamp.ROOT / '.git').exists():
    head = subprocess.run(
      ['git', 'rev-parse', 'HEAD'],
      cwd=stamp.ROOT,
      capture_output=True,
      text=True,
    ).stdout.strip()
    assert found['commit'].rstrip('+') == head
  monkeypatch.setenv('COMMIT', 'given')
  assert stamp.commit() == 'given'
