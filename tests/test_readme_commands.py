"""Every command of README.md: what it names exists, and something runs it.

Which test runs which command is said here; what none runs is listed, with the
reason, in README.md. Commands of the program are run as they stand there, but
for small models, texts and steps, by `make test-full`.
"""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from flax import nnx
from ml_collections import config_flags

import longjax
from longjax import interop
from longjax.data import bpe
from longjax.models import llama
from tests.experiments.test_measure import SIZES, write_pretrained
from tests.training.helpers import write_text
from tests.training.test_summarization import write_papers

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = re.sub(
  '^```.*?^```$', '', (ROOT / 'README.md').read_text(), flags=re.M | re.S
)
NOT_RUN = 'Commands that no test runs'


def commands():
  """Of indented blocks and between backquotes, each once, in their order."""
  text, _, _ = README.partition(f'### {NOT_RUN}')
  found = []
  for block in re.findall(r'^    (?! )(.+(?:\n {4,}.*)*)', text, re.M):
    for line in re.sub(r'\\\n\s*', '', block).splitlines():
      found += [part.partition('  #')[0].strip() for part in line.split('&&')]
  found += re.findall(r'`([^`\n]+)`', text)
  programs = 'cd|gcloud|git|make|pip|python|srun'
  return [
    command
    for command in dict.fromkeys(found)
    if re.match(rf'({programs})( |$)', command)
  ]


MAIN = 'python -m experiments.main'
ONE_STEP = (
  '--config.stages[0].length=64',
  '--config.stages[0].batch_size=4',
  '--config.stages[0].steps=1',
  '--config.stages[0].warmup_steps=0',
)
SCORED = ('--config.evaluation.length=64', '--config.evaluation.batch_size=4')
MASKED = (
  *ONE_STEP,
  *SCORED,
  '--config.micro_batches=1',
  '--config.evaluation.validation_characters=300',
  '--config.evaluation.test_characters=300',
)
# The beginning of a command: what makes it small, the argument of its config or
# flags. They are run one after the other in the folder `things`.
SMALL = {
  f'{MAIN} --config=configs/enwik8_longformer.py:small': (
    ':small,runlocal',
    *ONE_STEP,
    *SCORED,
    '--config.evaluation.stride=64',
    '--config.evaluation.test_characters=300',
  ),
  'python -m experiments.estimate': (),
  'python -m experiments.sweep': (
    '--config.data.path=text.txt',
    '--config.stages[0].length=64',
    '--config.stages[0].steps=40',
    '--config.evaluation.length=64',
    '--config.evaluation.stride=64',
    '--trials=2',
  ),
  'python -m longjax.interop.convert roberta-base longformer-4096': (),
  f'{MAIN} --workdir=runs/longformer': (
    *MASKED,
    '--config.data.path=text.txt',
  ),
  'python -m experiments.export': (*MASKED, '--config.data.path=text.txt'),
  f'{MAIN} --workdir=runs/reviews': ONE_STEP,
  f'{MAIN} --config=configs/arxiv_led.py': (
    *ONE_STEP,
    '--config.data.name=papers',
    '--config.pretrained=led',
    '--config.data.path=papers.jsonl',
    '--config.target_length=16',
    '--config.evaluation.lengths=(64,)',
    '--config.evaluation.min_length=2',
    '--config.evaluation.max_length=10',
  ),
  f'{MAIN} --mode=measure': (
    '--config.model.path=llama',
    '--config.text.path=llama/text.txt',
    '--config.text.separator=|',
    '--config.model.trained_length=32',
    '--config.model.start=4',
    '--config.loss_by_position.length=70',
    '--config.loss_by_position.documents=2',
    '--config.loss_by_position.chunk=32',
    '--config.passkey.lengths=(500,)',
    '--config.passkey.depths=(0.5,)',
    '--config.passkey.samples=1',
    '--config.passkey.middle_first_layer=0',
    '--config.key_value.lengths=(500,)',
    '--config.key_value.depths=(0.5,)',
    '--config.key_value.samples=1',
    '--config.overlap.milestones=(20,)',
    '--config.overlap.tokens=5',
    '--config.overlap.documents=2',
  ),
  'python -m longjax.interop.convert roberta-base my-longformer': (),
  f'{MAIN} --config=... --workdir=... --config.mesh.data=2': (
    '--config=configs/demo.py:runlocal',
    '--workdir=runs/mesh',
    *ONE_STEP,
    *SCORED,
    '--config.evaluation.stride=64',
    '--config.evaluation.test_characters=300',
  ),
}
# The beginning of a command: the test that runs it, or its small form.
_THIS = 'tests/test_readme_commands.py::test_make_has_the_targets'
_PROCESSES = (
  'tests/training/test_processes.py::'
  'test_a_killed_process_ends_the_run_which_goes_on_bit_equal'
)
ELSEWHERE = {
  'make': _THIS,
  'python tools/notebooks.py': 'tests/test_notebooks.py::test_runs',
  'python -m experiments.record': (
    'tests/experiments/test_record.py::test_a_record_is_made_of_a_workdir'
  ),
  'python -m experiments.benchmarks.tune': (
    'tests/experiments/test_tune.py::test_rehearsal'
  ),
  f'{MAIN} --config=... --workdir=SHARED --distributed': _PROCESSES,
  f'{MAIN} ... --distributed --coordinator': _PROCESSES,
  'python -m experiments.scale': (
    'tests/experiments/test_scale.py::test_a_step_on_four_devices'
  ),
}


def not_run():
  """{the beginning of a command: why} of README's list."""
  text = README.partition(f'### {NOT_RUN}')[2].partition('\n#')[0]
  return dict(re.findall(r'^\| `([^`]+)` \| (.+) \|$', text, re.M))


def key_of(command):
  """The longest beginning that is said something of, or None."""
  known = [*SMALL, *ELSEWHERE, *not_run()]
  return max(filter(command.startswith, known), key=len, default=None)


@pytest.mark.parametrize('command', commands())
def test_something_runs_it_or_it_is_listed(command):
  assert key_of(command), f'say in {pathlib.Path(__file__).name} what runs it'


def test_nothing_else_is_said_to_be_run():
  known = [*SMALL, *ELSEWHERE, *not_run()]
  assert len(set(known)) == len(known)
  assert {key_of(command) for command in commands()} == set(known)


@pytest.mark.parametrize('test', sorted(set(ELSEWHERE.values())))
def test_there_is_such_a_test(test):
  file, _, name = test.partition('::')
  tree = ast.parse((ROOT / file).read_text())
  assert name in {
    node.name for node in tree.body if isinstance(node, ast.FunctionDef)
  }


def test_make_has_the_targets():
  listed = subprocess.run(
    ['make'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  for command in commands():
    if command.startswith('make '):
      assert re.search(rf'^ *{command}\b', listed, re.M), command


PROGRAMS = [c for c in commands() if c.startswith('python -m ')]


# ml_collections loads configs in a way that Python has left.
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize('command', PROGRAMS)
def test_what_it_names_exists(command, monkeypatch):
  """The program, its flags, the config, its argument and its keys."""
  module, *arguments = shlex.split(command)[2:]
  source = ROOT.joinpath(*module.split('.')).with_suffix('.py').read_text()
  config = []
  for argument in arguments:
    name, _, value = argument.partition('=')
    if name.startswith('--config'):
      config.append(argument)
    elif name.startswith('--'):
      assert re.search(rf"['\"](--)?{name[2:]}['\"]", source), name
  if not config or '--config=...' in config:
    return
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  # Refuses what is not a key, and a value that cannot be.
  monkeypatch.setattr(sys, 'argv', ['main', *config])
  values(sys.argv)


@pytest.fixture(scope='module')
def things(tmp_path_factory):
  """A folder with what the commands take, small."""
  folder = tmp_path_factory.mktemp('readme')
  text = write_text(folder / 'text.txt')
  write_papers(folder / 'papers.jsonl')
  (folder / 'reviews.jsonl').write_text(
    ''.join(
      json.dumps({'text': f'{n} {label} books ' * 9, 'label': label}) + '\n'
      for n, label in enumerate(['good', 'bad'] * 40)
    )
  )
  sizes = dict(
    patterns=longjax.SlidingWindow(4, 4), max_positions=64, rngs=nnx.Rngs(0)
  )
  for name, model in {
    'roberta-base': longjax.Longformer(280, 1, 16, 2, **sizes),
    'led': longjax.LED(280, 1, 1, 16, 2, 2, max_target_positions=24, **sizes),
  }.items():
    bpe.train([text.read_text()], 280, folder / name / 'tokenizer.json')
    is_led = isinstance(model, longjax.LED)
    made = interop.config_of_led if is_led else interop.config_of_longformer
    interop.save_pretrained(model, folder / name, made(model))
  (folder / 'llama').mkdir()
  write_pretrained(folder / 'llama', llama(**SIZES, mlp_features=8))
  return folder


def small(command):
  """The words of the command after `python`, with the changes of SMALL."""
  words = shlex.split(command)[1:]
  for change in SMALL[key_of(command)]:
    name = change.partition('=')[0]
    if change.startswith(':'):
      words = [re.sub(r'(?<=\.py):.*', change, word) for word in words]
      continue
    same = [word for word in words if word.partition('=')[0] == name]
    if same:
      words[words.index(same[0])] = change
    else:
      words.append(change)
  return words


@pytest.mark.full
def test_they_run(things):
  """Those of SMALL, each with what the ones before it left."""
  for name in ('configs', 'experiments', 'longjax'):
    (things / name).symlink_to(ROOT / name)
  for command in commands():
    if key_of(command) not in SMALL:
      continue
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    if 'mesh' in command:
      environment['JAX_NUM_CPU_DEVICES'] = '8'
    done = subprocess.run(
      [sys.executable, *small(command)],
      cwd=things,
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, f'{small(command)}\n{done.stderr[-3000:]}'
