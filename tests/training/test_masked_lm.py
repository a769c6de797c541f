"""Masked language modelling through the loop, on a tiny encoder and text."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import interop, training
from longjax.models import Longformer
from longjax.patterns import Full, SlidingWindow
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages
from longjax.training.state import split
from longjax.training.tasks import make_task
from longjax.training.tasks.masked_lm import masked_losses
from tests.training.helpers import write_text

pytestmark = pytest.mark.usefixtures('compile_once')

MODEL = dict(
  num_layers=2,
  features=16,
  num_heads=2,
  max_positions=40,
  max_globals=0,
  dropout_rate=0.1,
  implementation='reference',
)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp('text') / 'text.txt')


def tiny(text, **changes):
  stage = dict(length=32, batch_size=4, steps=6, learning_rate=1e-2)
  return {
    'task': 'masked_lm',
    'data': dict(name='text', path=str(text), loader='numpy'),
    'model': MODEL,
    'pattern': 'full',
    'stages': (stage,),
    'evaluation': dict(
      length=24, batch_size=4, validation_characters=200, test_characters=300
    ),
    'log_every': 2,
    'checkpoint_every': 4,
    'tensorboard': False,
    **changes,
  }


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = tiny(text, micro_batches=2)
  config['evaluation']['every'] = 3
  return config, workdir, training.train_and_evaluate(config, workdir)


def test_what_a_run_leaves(trained):
  _, workdir, result = trained
  assert json.loads((workdir / 'result.json').read_text()) == result
  assert result['step'] == 6 and result['masked'] == 45
  assert result['bits_per_character'] == result['bits_per_token']
  lines = training.read_metrics(workdir)
  losses = [x['train/loss'] for x in lines if 'train/loss' in x]
  assert len(losses) == 3 and losses[-1] < losses[0]
  assert lines[0]['train/bits_per_token'] == losses[0] / math.log(2)
  assert lines[0]['train/tokens'] == 2 * 4 * 32
  validated = [x for x in lines if 'validation/bits_per_token' in x]
  assert [x['step'] for x in validated] == [3, 6]
  assert (workdir / 'loss.png').exists()


def test_goes_on_bit_for_bit(trained, tmp_path, monkeypatch):
  config, workdir, result = trained
  (tmp_path / 'checkpoints').mkdir()
  (workdir / 'checkpoints' / '4').rename(tmp_path / 'checkpoints' / '4')
  assert training.train_and_evaluate(config, tmp_path) == result
  whole, resumed = (
    split(training.load(config, where).model)[1]
    for where in (workdir, tmp_path)
  )
  for name, value in whole.items():
    np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_evaluate_is_the_same_whatever_the_batch(trained):
  config, workdir, result = trained
  protocol = config['evaluation'] | dict(batch_size=7)
  again = training.evaluate(config | {'evaluation': protocol}, workdir)
  assert again['bits_per_token'] == pytest.approx(
    result['bits_per_token'], abs=1e-5
  )
  with pytest.raises(ValueError, match='masked_lm has nothing to sample'):
    training.sample(config, workdir)


def test_loss_is_that_of_all_logits():
  model = Longformer(
    30,
    **MODEL,
    patterns=SlidingWindow(3, 3),
    head='masked_lm',
    rngs=nnx.Rngs(0),
  )
  tokens = np.random.default_rng(0).integers(5, 30, (2, 20))
  places = np.array([[1, 4, 18], [2, 3, 7]])
  targets = np.array([[6, 7, 8], [9, 10, 11]])
  log_p = jax.nn.log_softmax(model(tokens))
  rows = np.arange(2)[:, None]
  np.testing.assert_allclose(
    masked_losses(model, jnp.array(tokens), places, targets),
    -log_p[rows, places, targets],
    atol=1e-5,
  )


def test_from_a_pretrained_folder(text, tmp_path):
  """With its own tokenizer, windows and weights; a longer one of tiling."""
  short = tmp_path / 'short'
  config = tiny(text)
  config['data'] |= dict(tokenizer='train', vocab_size=280)
  task = make_task(make_settings(config), tmp_path / 'run')
  (stage,) = make_stages(config['stages'])
  model = task.make_model(stage, nnx.Rngs(1))
  tokens = task.encode(task.corpus.test[:100])
  assert model.vocab_size == 280 and len(tokens) < 90
  interop.save_pretrained(model, short, interop.config_of_longformer(model))
  (tmp_path / 'run' / 'tokenizer' / 'tokenizer.json').rename(
    short / 'tokenizer.json'
  )
  interop.lengthen(short, tmp_path / 'long', 80, window=8)

  config = tiny(text, pretrained=str(tmp_path / 'long'), pattern='')
  config['model'] = dict(implementation='reference', dropout_rate=0.0)
  config['data'] |= dict(tokenizer='pretrained')
  config['stages'] = ({**config['stages'][0], 'length': 70},)
  task = make_task(make_settings(config), tmp_path / 'other')
  (stage,) = make_stages(config['stages'])
  longer = task.make_model(stage, nnx.Rngs(0))
  assert longer.max_positions == 80
  assert longer.patterns == (SlidingWindow(4, 4),) * 2
  given, wanted = task.pretrained(), split(model)[1]
  assert given.keys() == split(longer)[1].keys()
  for name, value in wanted.items():
    if name != 'position_embedding.embedding':
      np.testing.assert_array_equal(given[name], value, err_msg=name)
  positions = given['position_embedding.embedding']
  np.testing.assert_array_equal(positions[42:82], positions[2:42])
  # The loop begins with them: at a rate of 0 they are what it ends with.
  config['stages'][0].update(steps=1, learning_rate=0.0)
  training.train_and_evaluate(config, tmp_path / 'other')
  after = split(training.load(config, tmp_path / 'other').model)[1]
  for name, value in after.items():
    np.testing.assert_array_equal(value, given[name], err_msg=name)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(pattern=''), "pattern is '', which is a pretrained model's own"),
    (dict(pattern='lambda'), "'lambda' is causal: an encoder has one of"),
    (dict(model=MODEL | dict(head='pooler')), 'config.model.head is not set'),
    (dict(model=dict(num_layers=2)), 'lacks the key features'),
    (dict(data=dict(share=0.0)), r'share must lie in \(0, 1\), got 0.0'),
    (dict(data=dict(shar=0.1)), "'shar' in config.data: did you mean 'share'"),
    (dict(data=dict(tokenizer='x.json')), 'x.json does not exist'),
    (
      dict(data=dict(tokenizer='train', vocab='bytes')),
      "vocab 'bytes' is of no use with a tokenizer",
    ),
    (
      dict(data=dict(tokenizer='pretrained')),
      "'pretrained' without config.pretrained",
    ),
    (dict(pretrained='/no/where'), '/no/where is no folder'),
    (dict(task='masked'), "config.task 'masked' is not one of"),
    (
      dict(stages=(dict(length=64, batch_size=4, steps=1, learning_rate=0.1),)),
      "length 64 is beyond the model's 40 positions: .*convert",
    ),
  ],
)
def test_mistakes_are_found_before_training(text, tmp_path, change, message):
  config = tiny(text)
  if 'data' in change:
    change = {'data': config['data'] | change['data']}
  with pytest.raises((ValueError, OSError), match=message):
    training.train_and_evaluate(config | change, tmp_path)
  assert not (tmp_path / 'metrics.jsonl').exists()


def test_a_folder_of_another_kind(text, tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "led"}')
  with pytest.raises(ValueError, match='is a led: an encoder is wanted'):
    make_task(make_settings(tiny(text, pretrained=str(tmp_path))), tmp_path)


def test_a_folder_with_other_tokens(text, tmp_path):
  model = Longformer(
    31, **MODEL, patterns=Full(causal=False), head='masked_lm', rngs=nnx.Rngs(0)
  )
  interop.save_pretrained(model, tmp_path, interop.config_of_longformer(model))
  with pytest.raises(ValueError, match='have vocab_size 261, but the model in'):
    make_task(make_settings(tiny(text, pretrained=str(tmp_path))), tmp_path)
