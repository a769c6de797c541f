"""What `main.py` needs to answer a user's mistake with one line."""

import dataclasses
import re
import sys
import warnings

from absl import flags

from longjax.training.settings import nearest
from longjax.training.stages import Stage


def parse_flags(argv):
  """Parses absl's flags; a misspelt key of the config names the nearest one."""
  try:
    rest = flags.FLAGS(argv)
    for name in ('config', 'workdir'):
      if flags.FLAGS[name].value is None:
        raise flags.IllegalFlagValueError(f'--{name} is missing')
    # A file that could not be loaded raises only once the config is used.
    flags.FLAGS.config.lock()
    return rest
  except (KeyError, AttributeError) as e:
    # ml_collections finds the nearest key, but not among the keys of a stage.
    text = str(e).replace('\\', '')
    key = re.search(r"'(\w+)'", text)[1]
    meant = re.search(r'mean "(\w+)"', text)
    known = [field.name for field in dataclasses.fields(Stage)]
    hint = f'did you mean {meant[1]!r}?' if meant else nearest(key, known)
    fail(2, f'unknown key {key!r} in the config: {hint}')
  except OSError as e:
    fail(2, f'cannot load the config: {str(e).strip().splitlines()[-1]}')
  except (flags.Error, IndexError, TypeError, ValueError) as e:
    # Of an error in a config file ml_collections gives all of the traceback.
    last_line = str(e).strip().splitlines()[-1]
    in_file = 'Traceback' in str(e)
    fail(2, last_line.partition(': ')[2] if in_file else str(e))


def fail(exit_code: int, message: str):
  """Ends with one line on stderr; with --debug the error is raised on.

  To be called where an exception is handled.
  """
  if '--debug' in sys.argv:
    raise
  # Destructors that still complain while the program ends have nothing to add,
  # nor have coroutines that an error kept from being awaited.
  sys.unraisablehook = lambda unraisable: None
  warnings.simplefilter('ignore')
  print('error: ' + ' '.join(message.split()), file=sys.stderr)
  sys.exit(exit_code)
