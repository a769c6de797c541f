"""XLA's path and the definition pass what every implementation has to.

Those of the kernels are in tests/ops/pallas/test_backend_*.py, so that test
files stay side by side; cuDNN, which cannot run here, in test_cudnn.py.
"""

from tests.ops.attention_tests import AttentionTests


class TestXla(AttentionTests):
  name = 'xla'


class TestReference(AttentionTests):
  name = 'reference'
  test_against_the_definition = None  # it is the definition
