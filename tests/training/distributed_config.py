"""What two processes train in tests/training/test_processes.py."""

import os

from configs import common


def get_config(arg=None):
  del arg
  config = common.make_config()
  config.data.update(
    name='text', path=os.environ['LONGJAX_TEST_TEXT'], loader='numpy'
  )
  config.model = dict(num_layers=1, features=16, num_heads=2, dropout_rate=0.1)
  config.stages = (
    dict(length=32, batch_size=4, steps=24, learning_rate=1e-2, windows=8),
  )
  config.mesh.update(data=1, seq=2)
  config.evaluation.update(
    length=32, stride=16, batch_size=8, test_characters=100
  )
  config.update(log_every=1, checkpoint_every=4, tensorboard=False)
  return config
