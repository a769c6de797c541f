"""Starts tests/gpu/correctness.py; `--help` tells more.

A library that installs a `tests` package of its own would hide ours, which is
none in Python's eyes: it has no __init__.py.
"""

import sys
import types

from experiments.benchmarks.process import ROOT

package = types.ModuleType('tests')
package.__path__ = [str(ROOT / 'tests')]
sys.modules['tests'] = package

if __name__ == '__main__':
  from tests.gpu import correctness

  sys.exit(correctness.main())
