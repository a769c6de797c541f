"""Tests on eight fake devices, each file in a process of its own.

The number of devices is settled when JAX starts, so these files are not
collected with the others: `tests/test_multi_device.py` runs them.
"""

import os

FLAG = 'LONGJAX_FAKE_DEVICES'

if FLAG in os.environ:
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={os.environ[FLAG]}'
  )
else:
  collect_ignore_glob = ['test_*.py']
