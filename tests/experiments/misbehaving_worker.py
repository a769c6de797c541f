"""A worker of experiments.benchmarks.process that does what GPU code may do."""

import os
import time

from experiments.benchmarks import process


def refuse():
  raise NotImplementedError('not for /some/folder/file.py')


process.serve(
  {
    'add': lambda a, b: {'sum': a + b},
    'refuse': refuse,
    'hang': lambda: time.sleep(60),
    'die': lambda: os._exit(3),
    'chat': lambda: print('what a library prints'),
  },
  pid=os.getpid(),
)
