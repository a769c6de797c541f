"""Notebooks run, in their small form, and are committed with outputs."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('nbclient', reason='longjax[notebooks] is not installed')
pytest.importorskip('jupytext', reason='longjax[notebooks] is not installed')

import nbformat
from nbformat import v4

from tools import notebooks

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = notebooks.sources()


def run(*arguments):
  return subprocess.run(
    [sys.executable, 'tools/notebooks.py', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_every_notebook_has_a_source_and_there_are_some():
  made = {path.stem for path in notebooks.FOLDER.glob('*.ipynb')}
  assert made == {source.stem for source in SOURCES} and made


@pytest.mark.parametrize('source', SOURCES, ids=lambda source: source.stem)
def test_runs(source, tmp_path):
  done = run('--smoke', f'--out={tmp_path}', source.stem)
  assert done.returncode == 0, done.stdout + done.stderr
  assert (tmp_path / f'{source.stem}.ipynb').exists()


@pytest.mark.parametrize('source', SOURCES, ids=lambda source: source.stem)
def test_is_committed_as_it_is_written(source):
  """The same cells as the source, with outputs, small, of no machine."""
  made = nbformat.read(source.with_suffix('.ipynb'), as_version=4)
  nbformat.validate(made)
  assert [(cell.cell_type, cell.source) for cell in made.cells] == [
    (cell.cell_type, cell.source) for cell in notebooks.read(source).cells
  ], f'{source.stem}: run python tools/notebooks.py {source.stem}'
  assert notebooks.problems(made) == []


def notebook(*outputs, count=None):
  picture = v4.new_output('display_data', {'image/png': 'AAAA'})
  cell = v4.new_code_cell('1', outputs=[picture, *outputs])
  cell.execution_count = count
  return v4.new_notebook(cells=[cell])


def test_a_good_notebook_has_no_problems():
  output = v4.new_output('stream', text='a/b/c, ../home, 1/2 and /, 3.5/tmp')
  assert notebooks.problems(notebook(output)) == []


@pytest.mark.parametrize(
  ('bad', 'problem'),
  [
    (
      notebook(v4.new_output('stream', text='x' * 400_000)),
      'are more than 300,000',
    ),
    (notebook(v4.new_output('stream', text='in /tmp/abc')), 'names /tmp/abc'),
    (
      notebook(
        v4.new_output('execute_result', {'text/plain': "'/home/me/runs'"})
      ),
      'names /home/me/runs',
    ),
    (notebook(v4.new_output('error', ename='E', evalue='x')), 'failed: E: x'),
    (notebook(count=3), 'execution counts'),
    (v4.new_notebook(cells=[v4.new_code_cell('1')]), 'no picture'),
  ],
)
def test_problems_are_found(bad, problem):
  (found,) = notebooks.problems(bad)
  assert problem in found


def test_texts_change_without_a_run(tmp_path):
  source = tmp_path / 'a.py'
  source.write_text('# %% [markdown]\n# Old\n\n# %%\n1\n')
  made = notebooks.read(source)
  made.cells[1].outputs = [v4.new_output('stream', text='1')]
  source.write_text('# %% [markdown]\n# New\n\n# %%\n1\n')
  changed = notebooks.with_outputs_of(made, source)
  assert changed.cells[0].source == 'New'
  assert changed.cells[1].outputs == made.cells[1].outputs
  source.write_text('# %%\n2\n')
  with pytest.raises(ValueError, match='a has other code than when it ran'):
    notebooks.with_outputs_of(made, source)


def test_a_cell_that_fails_is_shown(tmp_path):
  source = tmp_path / 'broken.py'
  source.write_text('# %% [markdown]\n# A text\n\n# %%\nprint(1 / 0)\n')
  with pytest.raises(Exception, match='ZeroDivisionError'):
    notebooks.execute(source, smoke=True)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['01_pattern'], "notebook '01_pattern' is not one of 01_patterns"),
    (['--smoke'], '--smoke needs --out'),
  ],
)
def test_mistakes(arguments, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    notebooks.main(arguments)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err
