"""Records: a folder with all that stands behind a figure that is claimed.

  python -m experiments.record make --workdir=runs/demo --name=demo \
    --summary='{result.json/bits_per_character:.3f} bits/char of the test split'
  python -m experiments.record check
  python -m experiments.record readme

`make` copies what a run left (config, metrics, results, tables, pictures) into
experiments/records/<date>_<name>/ and adds record.json and a README.md to be
written on. `check` says what is wrong with records, all or those named.
`readme` writes the table of README.md anew from all record.json.

record.json has

  summary        the line of README.md's table. Figures are taken from the
                 record's files: {FILE/KEY/...:FORMAT}, also the difference
                 {A minus B:.3f} and the ratio {A over B:.2f} of two
  runs           for each start of a program its command, commit (with + where
                 files differed from it), date, device and versions
  seed           one, a list of them, or null where nothing is random
  superseded_by  only where another record has the table's line
  unknown        only of records older than this check: {key: why not known}
"""

import argparse
import datetime
import difflib
import json
import pathlib
import re
import shutil
import sys

from experiments import stamp

RECORDS = stamp.ROOT / 'experiments' / 'records'
README = stamp.ROOT / 'README.md'
FILE = 'record.json'
RUN_KEYS = ('command', 'commit', 'date', 'device', 'versions')
COPIED = ('.csv', '.json', '.jsonl', '.png')
TEXT = (*COPIED[:3], '.md')
LARGEST = 2**20  # bytes of a file
BEGIN, END = '<!-- records: begin -->', '<!-- records: end -->'

_NAME = re.compile(r'(\d{4}-\d\d-\d\d)_[a-z0-9_]+')
_FIGURE = re.compile(r'\{([^{}]+):([^{}:]*)\}')
_LINK = re.compile(r'!?\[[^\]]*\]\(([^)#:]+)\)')


class RecordError(ValueError):
  """What is wrong, in a line."""


def _nearest(key, known):
  # As in longjax.training.settings, without importing JAX.
  [close] = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
  return f'did you mean {close!r}?'


# Figures.


def figure(folder: pathlib.Path, path: str):
  """A value in a JSON file of a record.

  Args:
    path: 'FILE/KEY/...'; the keys of lists are numbers, -1 the last.

  Raises:
    RecordError: where there is no such file or key, naming the nearest one.
  """
  file, _, rest = path.strip().partition('/')
  if not (folder / file).is_file() or not rest:
    raise RecordError(f'no file for the figure {path!r}')
  value = json.loads((folder / file).read_text())
  while rest:
    known = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
      known = [str(number) for number in range(-len(value), len(value))]
    # Keys may themselves have slashes.
    fits = [key for key in known if rest == key or rest.startswith(f'{key}/')]
    if not fits:
      hint = f': {_nearest(rest, known)}' if known else ''
      raise RecordError(f'no key for {rest!r} of the figure {path!r}{hint}')
    key = max(fits, key=len)
    value = value[int(key) if isinstance(value, list) else key]
    rest = rest[len(key) + 1 :]
  return value


def render(folder: pathlib.Path, summary: str) -> str:
  """The summary with its figures."""

  def value(found):
    path, spec = found.groups()
    for word, operation in (
      ('minus', lambda a, b: a - b),
      ('over', lambda a, b: a / b),
    ):
      left, between, right = path.partition(f' {word} ')
      if between:
        number = operation(figure(folder, left), figure(folder, right))
        break
    else:
      number = figure(folder, path)
    try:
      return format(number, spec)
    except (TypeError, ValueError):
      raise RecordError(
        f'{path!r} is {str(number)[:40]!r}, which {spec!r} cannot format'
      ) from None

  return _FIGURE.sub(value, summary)


# Checking.


def problems(folder: pathlib.Path) -> list[str]:
  """What is wrong with a record, a line each; [] if nothing is."""
  found = []
  say = found.append
  if not _NAME.fullmatch(folder.name):
    say('the folder must be called <year-month-day>_<name in small letters>')
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  for path in files:
    if path.stat().st_size > LARGEST:
      say(f'{path.name} has more than {LARGEST:,} bytes')
    elif path.suffix in TEXT:
      text = path.read_text()
      if stamp.without_places(text) != text:
        say(f'{path.name} names a place on a machine, or a password')
  if not (folder / FILE).is_file():
    say(f'{FILE} is missing: experiments/record.py says what it has')
    return [f'{folder.name}: {line}' for line in found]
  try:
    record = json.loads((folder / FILE).read_text())
    found += _problems_of(record, folder)
  except json.JSONDecodeError as error:
    say(f'{FILE}: {error}')
  found += _problems_of_readme(folder, files)
  if (folder / 'result.json').exists():
    for name in ('config.json', 'metrics.jsonl'):
      if not (folder / name).exists():
        say(f'{name} is missing beside result.json')
  return [f'{folder.name}: {line}' for line in found]


def _problems_of(record, folder):
  unknown = record.get('unknown', {})
  allowed = ('summary', 'runs', 'seed', 'superseded_by', 'unknown')
  for key in record:
    if key not in allowed:
      yield f'{FILE} has the unknown key {key!r}: {_nearest(key, allowed)}'
  for key in ('summary', 'runs', 'seed'):
    if key not in record and key not in unknown:
      yield f'{FILE} lacks {key!r}'
  for number, run in enumerate(record.get('runs', [])):
    for key in RUN_KEYS:
      if not run.get(key) and key not in unknown:
        yield f'run {number} lacks {key!r}'
    if not re.fullmatch(r'[0-9a-f]{40}\+?', run.get('commit') or ''):
      yield f'run {number}: {run.get("commit")!r} is no commit of 40 digits'
    if 'versions' in run and not {'python', 'jax'} <= set(run['versions']):
      yield f"run {number} lacks the version of 'python' or of 'jax'"
  if 'runs' in record and not record['runs']:
    yield f'{FILE} has no runs'
  seeds = record.get('seed')
  for seed in seeds if isinstance(seeds, list) else [seeds]:
    if not isinstance(seed, int | None):
      yield f'seed {seed!r} is no number, list of numbers or null'
  config = folder / 'config.json'
  if config.exists() and seeds is not None:
    trained = json.loads(config.read_text()).get('seed')
    if trained not in (seeds if isinstance(seeds, list) else [seeds]):
      yield f'seed is {seeds}, in config.json {trained}'
  other = record.get('superseded_by')
  if other and not (folder.parent / other).is_dir():
    yield f'superseded_by names {other!r}, which is not there'
  summary = record.get('summary', '')
  if not _FIGURE.search(summary):
    yield 'the summary takes no figure from a file: {FILE/KEY/...:FORMAT}'
  try:
    left = re.search(r'\{[^{}]*\}', render(folder, summary))
    if left:
      yield f'{left[0]} has no format: end it with : or, say, :.3f'
  except RecordError as error:
    yield str(error)
  if 'prefix' not in summary and _on_a_prefix(folder):
    yield 'figures on a prefix of a text: the summary must say so'


def _on_a_prefix(folder):
  return any(
    'a prefix or other text' in path.read_text()
    for path in folder.glob('*.json')
    if path.name != FILE
  )


def _problems_of_readme(folder, files):
  path = folder / 'README.md'
  if not path.is_file():
    yield 'README.md is missing'
    return
  text = path.read_text()
  if not text.startswith('# '):
    yield 'README.md must begin with its title, "# ..."'
  links = set(_LINK.findall(text))
  for link in sorted(links):
    if not (folder / link).exists():
      yield f'README.md shows {link}, which is not there'
  for file in files:
    if file.suffix == '.png' and file.name not in text:
      yield f'README.md does not name {file.name}'


# README.md.


def table(records: pathlib.Path = RECORDS) -> str:
  """The table of README.md."""
  lines = ['| record | what it says |', '|---|---|']
  for folder in sorted(p for p in records.iterdir() if p.is_dir()):
    record = json.loads((folder / FILE).read_text())
    if not record.get('superseded_by'):
      lines.append(
        f'| [`{folder.name}`](experiments/records/{folder.name}) | '
        f'{render(folder, record["summary"])} |'
      )
  return '\n'.join(lines)


def with_table(text: str, table: str) -> str:
  """README's text with the table between its markers.

  Raises:
    RecordError: where there are no markers.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not (begin and end):
    raise RecordError(f'README.md lacks the lines {BEGIN} and {END}')
  return f'{before}{BEGIN}\n{table}\n{END}{after}'


# Making.


def make(
  workdir: pathlib.Path,
  folder: pathlib.Path,
  *,
  summary: str,
  title: str,
  seed: int | list[int] | None,
) -> list[str]:
  """Makes a record of what a program left; returns its problems.

  Raises:
    RecordError: where the folder does not say what ran there, or the record
      exists.
  """
  if folder.exists():
    raise RecordError(f'{folder} exists: choose another name')
  runs = stamp.read_starts(workdir)
  files = [
    path
    for path in sorted(workdir.iterdir())
    if path.suffix in COPIED and path.name not in (stamp.STARTS, FILE)
  ]
  for path in files:
    if path.suffix == '.json':
      values = json.loads(path.read_text())
      if isinstance(values, dict) and set(RUN_KEYS) <= set(values):
        runs.append({key: values[key] for key in RUN_KEYS})
  if not runs:
    raise RecordError(
      f'nothing in {workdir} says what ran there: there is no {stamp.STARTS}, '
      f'and no file with {", ".join(RUN_KEYS)}'
    )
  folder.mkdir(parents=True)
  for path in files:
    if path.suffix in TEXT:
      (folder / path.name).write_text(_published(path))
    else:
      shutil.copy(path, folder / path.name)
  record = {
    'summary': summary,
    'runs': stamp.without_places(_unlike(runs)),
    'seed': seed,
  }
  (folder / FILE).write_text(json.dumps(record, indent=2) + '\n')
  (folder / 'README.md').write_text(_readme(folder, record, title))
  return problems(folder)


def _published(path):
  """A text file without places: string by string, so that JSON stays JSON."""
  if path.suffix == '.json':
    values = stamp.without_places(json.loads(path.read_text()))
    return json.dumps(values, indent=2) + '\n'
  return stamp.without_places(path.read_text())


def _unlike(runs):
  """Without the runs that only say again what another says."""
  kept = {
    (run['command'], run['commit'], str(run['date'])): {
      key: run[key] for key in RUN_KEYS
    }
    for run in runs
  }
  return list(kept.values())


def _readme(folder, record, title):
  run = record['runs'][-1]
  commands = dict.fromkeys(run['command'] for run in record['runs'])
  commits = ', '.join(dict.fromkeys(run['commit'] for run in record['runs']))
  versions = ', '.join(f'{k} {v}' for k, v in run['versions'].items())
  seed = 'no seed' if record['seed'] is None else f'seed {record["seed"]}'
  parts = [f'# {title}', render(folder, record['summary']) + '.']
  parts.append('\n'.join(f'    {command}' for command in commands))
  parts.append(f'Commit {commits}; {run["device"]}; {versions}; {seed}.')
  if (folder / 'result.json').exists():
    result = json.loads((folder / 'result.json').read_text())
    rows = [
      f'| {name} | {value:,.6g} |'
      for name, value in result.items()
      if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    parts.append('\n'.join(['| | |', '|---|---|', *rows]))
    if result.get('description'):
      parts.append(f'The text: {result["description"]}.')
  pictures = sorted(folder.glob('*.png'))
  parts += [f'![{path.stem}]({path.name})' for path in pictures]
  return '\n\n'.join(parts) + '\n'


def _seed(workdir, given):
  if given is not None:
    if given == 'none':
      return None
    try:
      seeds = [int(seed) for seed in given.split(',')]
    except ValueError:
      raise RecordError(
        f"--seed={given} is no number, numbers with commas, or 'none'"
      ) from None
    return seeds if len(seeds) > 1 else seeds[0]
  for name in ('config.json', 'study.json'):
    path = workdir / name
    values = json.loads(path.read_text()) if path.exists() else {}
    if 'seed' in values:
      return values['seed']
  raise RecordError(f'nothing in {workdir} says the seed: give --seed')


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest='do', required=True)
  add = commands.add_parser(
    'make', help='a record of a work folder'
  ).add_argument
  add('--workdir', type=pathlib.Path, required=True)
  add('--name', required=True, help='in small letters, without the date')
  add('--summary', required=True, help="the line of README.md's table")
  add('--title', help='of its README.md; the name by default')
  add(
    '--seed', help="numbers with commas, or 'none'; of config.json by default"
  )
  add('--records', type=pathlib.Path, default=RECORDS)
  add = commands.add_parser('check', help='say what is wrong').add_argument
  add('folders', type=pathlib.Path, nargs='*', help='all of them by default')
  commands.add_parser('readme', help="write README.md's table")
  args = parser.parse_args(argv)
  try:
    found = _do(args)
  except (RecordError, OSError) as error:
    parser.exit(1, f'error: {error}\n')
  if found:
    parser.exit(1, ''.join(f'{line}\n' for line in found))


def _do(args):
  if args.do == 'make':
    if not args.workdir.is_dir():
      raise RecordError(f'--workdir={args.workdir} is no folder')
    folder = args.records / f'{datetime.date.today()}_{args.name}'
    found = make(
      args.workdir,
      folder,
      summary=args.summary,
      title=args.title or args.name.replace('_', ' '),
      seed=_seed(args.workdir, args.seed),
    )
    print(folder)
    return found
  if args.do == 'readme':
    README.write_text(with_table(README.read_text(), table()))
    return []
  folders = args.folders or sorted(p for p in RECORDS.iterdir() if p.is_dir())
  for folder in folders:
    if not folder.is_dir():
      raise RecordError(f'{folder} is no folder')
  found = [line for folder in folders for line in problems(folder)]
  print(f'{len(folders)} records, {len(found)} problems')
  return found


if __name__ == '__main__':
  sys.exit(main())
