"""The demo: a small Longformer learns Python from Python's own source.

A character LM of 0.8M parameters whose windows double from 16 keys in the
bottom layer to 128 in the top one (Longformer, arXiv 2004.05150, section 4.2:
increasing windows were best), with rotary positions, RMSNorm, QK-norm, squared
ReLU and Muon, reads the source of the standard library, which is on every
machine. At the end it is compared with Markov models of order 0, 1 and 2 that
were counted on all of the same training split, continues a prompt, and draws
its loss and its patterns.

  make demo
  python -m experiments.main --config=configs/demo.py --workdir=runs/demo

Measured (CPython 3.12.1's source, the first 64 KiB of its validation split):
1.95 bits/char after training, 7.27 before it; 2.78, 3.49 and 4.47 for the
Markov models of order 2, 1 and 0.
"""

from configs import common


def get_config(arg=None):
  """The config; arg 'runlocal' for a run of about a minute."""
  arg = common.parse_arg(arg, runlocal=False)
  config = common.make_config()
  config.data.name = 'python_source'
  config.data.loader = 'numpy'
  config.model = common.modern_model(num_layers=4, features=128, num_heads=4)
  steps = 60 if arg.runlocal else 450
  config.pattern = 'sliding_window'
  config.stages = (
    dict(
      length=512,
      batch_size=8,
      steps=steps,
      learning_rate=4e-3,
      warmup_steps=steps // 20,
      schedule='linear',
      windows=common.doubling_windows(16, 128, 4),
    ),
  )
  config.optimizer.update(name='muon', weight_decay=0.01, clip_norm=1.0)
  config.evaluation.update(
    length=512,
    stride=256,
    batch_size=16,
    test_characters=64 * 1024,
  )
  config.log_every = 20
  config.checkpoint_every = 200
  config.sampling.update(prompt='def ', num_tokens=300, temperature=0.7)
  config.report = True
  return config
