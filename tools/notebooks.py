"""Runs notebooks: NAME.py, which is what people write, becomes NAME.ipynb.

  python tools/notebooks.py                  all of notebooks/, as committed
  python tools/notebooks.py 01_patterns
  python tools/notebooks.py --smoke --out=FOLDER 01_patterns
  python tools/notebooks.py --text 01_patterns    texts only, nothing is run

A source is a script in cells (`# %%`, the "percent format" of jupytext); the
.ipynb beside it holds the same cells with what they printed and drew, and is
never edited. It has no execution counts, no times and no versions, so that it
changes only where a cell or a result does.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import sys
import time

import jupytext
import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'notebooks'
MOST_BYTES = 300_000
SMOKE = 'LONGJAX_SMOKE'
# Absolute paths of a machine, as far as outputs could hold them.
PLACES = re.compile(
  r'(?<![\w.])/(?:home|root|tmp|usr|opt|var|work|mnt|private|Users)/[^\s\'"]*'
)


def sources() -> list[pathlib.Path]:
  """The notebooks in their order."""
  return sorted(FOLDER.glob('[0-9]*.py'))


def read(source: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook of a source, without outputs."""
  notebook = jupytext.read(source, fmt='py:percent')
  notebook.metadata = nbformat.from_dict(
    {
      'kernelspec': {
        'display_name': 'Python 3',
        'language': 'python',
        'name': 'python3',
      },
      'language_info': {'name': 'python'},
    }
  )
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'
    cell.metadata = {}
  return notebook


def execute(source: pathlib.Path, *, smoke: bool) -> nbformat.NotebookNode:
  """The notebook of a source with outputs, run in a kernel of its own.

  Args:
    source: the script.
    smoke: whether in the small form that tests run, which says nothing.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed; shows it.
  """
  notebook = read(source)
  environment = {
    **os.environ,
    SMOKE: '1' if smoke else '',
    # Tests draw to files; here figures go into the notebook.
    'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
  }
  if smoke:
    # Most of the time is compiling then.
    environment['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  nbclient.NotebookClient(
    notebook,
    kernel_name='python3',
    # It would warn that others on this machine could listen to the cells.
    extra_arguments=['--log-level=ERROR'],
    resources={'metadata': {'path': str(source.parent)}},
    coalesce_streams=True,
    record_timing=False,
  ).execute(env=environment)
  for cell in notebook.cells:
    cell.metadata = {}
    if cell.cell_type == 'code':
      cell.execution_count = None
      for output in cell.outputs:
        if 'execution_count' in output:
          output.execution_count = None
        data = output.get('data', {})
        if 'image/png' in data:
          data['image/png'] = _smaller(data['image/png'])
          data.pop('text/plain', None)  # '<Figure size ...>'
  return notebook


def with_outputs_of(
  made: nbformat.NotebookNode, source: pathlib.Path
) -> nbformat.NotebookNode:
  """The notebook of a source of which only texts have changed since it ran.

  Raises:
    ValueError: cells of code have changed too.
  """
  notebook = read(source)
  new, old = (
    [cell for cell in book.cells if cell.cell_type == 'code']
    for book in (notebook, made)
  )
  if [cell.source for cell in new] != [cell.source for cell in old]:
    raise ValueError(f'{source.stem} has other code than when it ran: run it')
  for cell, ran in zip(new, old, strict=True):
    cell.outputs, cell.execution_count = ran.outputs, None
  return notebook


def _smaller(png: str) -> str:
  """A picture in a palette of 256 colours: plots have hardly more."""
  image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
  file = io.BytesIO()
  # Of the methods this one keeps the colours of thin lines.
  palette = image.quantize(
    256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
  )
  palette.save(file, 'png', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def problems(notebook: nbformat.NotebookNode) -> list[str]:
  """What keeps a notebook from being committed, a line each."""
  found = []
  size = len(nbformat.writes(notebook).encode())
  if size > MOST_BYTES:
    found.append(f'{size:,} bytes are more than {MOST_BYTES:,}')
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  outputs = [output for cell in code for output in cell.outputs]
  if not any('image/png' in output.get('data', {}) for output in outputs):
    found.append('there is no picture')
  for output in outputs:
    if output.output_type == 'error':
      found.append(f'a cell failed: {output.ename}: {output.evalue}')
    texts = [output.get('text', '')]
    texts += [
      text
      for kind, text in output.get('data', {}).items()
      if not kind.startswith('image/')
    ]
    for text in texts:
      found += [f'an output names {place}' for place in PLACES.findall(text)]
  counts = [cell.execution_count for cell in code]
  counts += [output.get('execution_count') for output in outputs]
  if any(count is not None for count in counts):
    found.append('there are execution counts')
  return found


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', metavar='NAME', help='all by default')
  parser.add_argument('--smoke', action='store_true', help='small, as in tests')
  parser.add_argument(
    '--text', action='store_true', help='keep outputs, where only texts changed'
  )
  parser.add_argument('--out', type=pathlib.Path, default=FOLDER)
  args = parser.parse_args(argv)
  known = {source.stem: source for source in sources()}
  for name in args.names:
    if name not in known:
      parser.error(f'notebook {name!r} is not one of {", ".join(known)}')
  if args.smoke and args.out.resolve() == FOLDER:
    parser.error('--smoke needs --out: what is committed is not made in small')
  args.out.mkdir(parents=True, exist_ok=True)
  failed = 0
  for name in args.names or known:
    started = time.perf_counter()
    try:
      if args.text:
        made = nbformat.read(args.out / f'{name}.ipynb', as_version=4)
        notebook = with_outputs_of(made, known[name])
      else:
        notebook = execute(known[name], smoke=args.smoke)
    except (nbclient.exceptions.CellExecutionError, ValueError) as error:
      print(f'{name}: {error}', file=sys.stderr)
      failed += 1
      continue
    nbformat.write(notebook, args.out / f'{name}.ipynb')
    print(f'{name}: {time.perf_counter() - started:.0f} s')
    for problem in problems(notebook):
      print(f'{name}: {problem}', file=sys.stderr)
      failed += 1
  return int(bool(failed))


if __name__ == '__main__':
  sys.exit(main())
