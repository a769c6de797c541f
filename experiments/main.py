"""The main program: trains, evaluates or samples from what a config describes.

  python -m experiments.main --config=configs/demo.py --workdir=runs/demo
  python -m experiments.main --config=configs/demo.py --workdir=runs/demo \
    --mode=evaluate
  python -m experiments.main --config=configs/demo.py --workdir=runs/demo \
    --mode=sample --prompt='def '
  python -m experiments.main --config=configs/lm_infinite_stories.py \
    --workdir=runs/stories --mode=measure

  python -m experiments.main --config=... --workdir=... --distributed

The last one is said by each of many processes; README tells how they are
launched.

A setting is changed by its name, --config.evaluation.stride=256, also within a
stage, --config.stages[0].steps=100. Run again with the same --workdir, training
goes on from the newest checkpoint. Results go to stdout, progress to stderr.
starts.jsonl keeps the command, commit, device and versions of each start, and
--profile writes a trace of five steps, by JAX's profiler, into profile/.

Exit code: 0 when done; 2 for a mistake on the command line or in the config; 1
for anything else, in one line unless --debug; 143 after SIGTERM, 130 after
Ctrl-C, with the state saved.
"""

import contextlib
import json
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import cli, measure, stamp
from longjax import training
from longjax.training import processes

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File of the config, with its argument after a colon.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate', 'sample', 'measure'], 'What to do.'
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', '', "Evaluate or sample this one, not the workdir's newest."
)
_PROMPT = flags.DEFINE_string('prompt', None, 'Text that a sample continues.')
_PROFILE = flags.DEFINE_bool(
  'profile', False, 'Write a profiler trace of a few steps of training.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One of many processes, as SLURM, Open MPI, Kubernetes or a TPU pod says.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of process 0, where nobody says.'
)
_PROCESSES = flags.DEFINE_integer(
  'processes', 0, 'How many processes there are, where nobody says.'
)
_PROCESS = flags.DEFINE_integer(
  'process', -1, 'Which of them this is, from 0, where nobody says.'
)
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')

# Errors whose text is written for the user of this program.
_EXPECTED = (
  ValueError,
  OSError,
  ImportError,
  NotImplementedError,
  training.CheckpointError,
  training.NonFiniteError,
)


def main(argv):
  if argv[1:]:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  if not flags.FLAGS['verbosity'].present:
    # orbax logs every file it opens, and again each error that it raises.
    logging.set_verbosity(logging.FATAL)
  config, workdir = _CONFIG.value, _WORKDIR.value
  if not _DISTRIBUTED.value:
    for flag in (_COORDINATOR, _PROCESSES, _PROCESS):
      if flag.present:
        raise ValueError(f'--{flag.name} is given without --distributed')
    return run(config, workdir)
  processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  with processes.ending_together(report):
    processes.check_same('config', config.to_dict())
    processes.check_same('flags', {'mode': _MODE.value})
    run(config, workdir)


def run(config, workdir):
  """One process' part, which is all where there is one."""
  is_first = jax.process_index() == 0
  if _MODE.value == 'measure':
    result = measure.measure(config, workdir)
  elif 'stages' not in config:
    raise ValueError('this config trains nothing: it is for --mode=measure')
  elif _MODE.value == 'train':
    if is_first:
      with contextlib.suppress(OSError):  # which training says better
        stamp.write_start(workdir, stamp.command('experiments.main'))
    result = training.train_and_evaluate(
      config, workdir, profile=_PROFILE.value
    )
  elif _MODE.value == 'evaluate':
    result = training.evaluate(config, workdir, _CHECKPOINT.value)
  else:
    if _PROMPT.value is not None:
      config.sampling.prompt = _PROMPT.value
    prompt, continuation = training.sample(config, workdir, _CHECKPOINT.value)
    print((prompt + continuation).decode(errors='replace'))
    return
  if is_first:
    print(json.dumps(result, indent=2))


def report(error):
  """Says what one of many processes ends of; the exit code."""
  if isinstance(error, training.Preempted):
    print(error, file=sys.stderr)
    return error.exit_code
  where = f'process {jax.process_index()} of {jax.process_count()}'
  text = ' '.join(str(error).split())
  if not isinstance(error, _EXPECTED):
    text = f'{type(error).__name__}: {text[:500]}'
    if isinstance(error, jax.errors.JaxRuntimeError):
      text = f'another process may be gone ({text})'
  print(f'error: {where}: {text}', file=sys.stderr)
  return 1


def _main(argv):
  try:
    main(argv)
  except training.Preempted as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
  except KeyboardInterrupt:
    sys.exit(130)
  except _EXPECTED as e:
    cli.fail(1, str(e))


if __name__ == '__main__':
  app.run(_main, flags_parser=cli.parse_flags)
