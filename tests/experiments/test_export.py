"""A run's encoder in a folder; the conversion of a short model."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import mlm_conversion, stamp
from experiments.export import export
from longjax import training
from longjax.interop import load_pretrained, load_tokenizer
from longjax.models import Longformer
from longjax.patterns import Full
from longjax.training import scoring
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages
from longjax.training.tasks import make_task
from tests.training.helpers import write_text


def test_export(tmp_path, monkeypatch):
  """Weights, labels and tokenizer; the copies that MLM calls for."""
  text = write_text(tmp_path / 'text.txt', words=800)
  config = {
    'task': 'masked_lm',
    'data': dict(
      name='text', path=str(text), loader='numpy', tokenizer='train'
    ),
    'model': dict(
      num_layers=1,
      features=8,
      num_heads=2,
      max_positions=32,
      max_globals=4,
      implementation='reference',
    ),
    'pattern': 'sliding_window',
    'stages': (
      dict(length=16, batch_size=2, steps=1, learning_rate=1e-3, windows=4),
    ),
    'evaluation': dict(length=16, batch_size=2, test_characters=64),
    'tensorboard': False,
  }
  config['data']['vocab_size'] = 270
  workdir, folder = tmp_path / 'run', tmp_path / 'folder'
  settings = make_settings(config)
  task = make_task(settings, workdir)
  (stage,) = make_stages(settings.stages)
  trained = task.make_model(stage, nnx.Rngs(0))
  monkeypatch.setattr(
    training, 'load', lambda *args: scoring.Trained(trained, task, settings, 1)
  )
  export(config, workdir, folder)
  model = load_pretrained(folder)
  # Without global tokens their projections do not matter.
  tokens = jnp.array([load_tokenizer(folder).encode('the quick')])
  np.testing.assert_allclose(model(tokens), trained(tokens), atol=1e-6)
  attention = model.layers[0].attention
  np.testing.assert_array_equal(
    attention.global_key.kernel[...], attention.key.kernel[...]
  )
  with pytest.raises(FileExistsError, match='exists already'):
    export(config, workdir, folder)


def test_only_encoders(tmp_path, monkeypatch):
  task = type('Settings', (), {'task': 'language_modelling'})
  model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
  trained = scoring.Trained(model, None, task, 0)
  monkeypatch.setattr(training, 'load', lambda *args: trained)
  with pytest.raises(ValueError, match='language_modelling has no encoder'):
    export({}, tmp_path, tmp_path / 'folder')


def test_mistakes_are_one_line(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.export',
      '--config=configs/text8_mlm.py:runlocal',
      f'--workdir={tmp_path}/none',
      f'--folder={tmp_path}/folder',
    ],
    cwd=stamp.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.startswith('error: no checkpoint: there is no folder')
  assert len(done.stderr.splitlines()) == 1


def test_random_positions_are_only_the_new_ones():
  model = Longformer(
    20,
    1,
    8,
    2,
    patterns=Full(causal=False),
    max_positions=40,
    rngs=nnx.Rngs(0),
  )
  before = np.array(model.position_embedding.embedding[...])
  mlm_conversion.randomize(model, 16, seed=1)
  after = np.array(model.position_embedding.embedding[...])
  known = 16 + 2
  np.testing.assert_array_equal(after[:known], before[:known])
  assert (after[known:] != before[known:]).all()
  assert after[known:].std() == pytest.approx(0.02, rel=0.2)


def test_the_picture(tmp_path):
  rows = [
    {'row': name, 'updates': updates, 'bits_per_token': bits, 'data': 'text'}
    for name, updates, bits in (
      ('the short model', 0, 3.0),
      ('tiled positions', 0, 3.1),
      ('tiled positions', 10, 2.9),
      ('tiled positions, only they trained', 10, 3.0),
    )
  ]
  mlm_conversion.draw(rows, tmp_path / 'bits.png')
  assert (tmp_path / 'bits.png').stat().st_size > 5000
