"""Training on a mesh is training on one device."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import longjax
from longjax import training
from longjax.models import longnet
from longjax.training import devices as devices_lib
from longjax.training.checkpoint import Checkpoints
from longjax.training.devices import Devices
from longjax.training.loss import target_losses
from longjax.training.optimizer import make_optimizer
from longjax.training.state import make_train_step, split
from longjax.training.tasks.masked_lm import masked_losses
from tests.training import test_finetuning, test_masked_lm
from tests.training.helpers import tiny, write_text

BATCH, LENGTH, TARGET, VOCABULARY = 4, 32, 4, 17
SEQUENCES = ('tokens', 'targets', 'mask')
DROPOUT = dict(dropout_rate=0.2, attention_dropout_rate=0.1)


def character_lm():
  return longjax.DecoderLM(
    VOCABULARY,
    1,
    16,
    2,
    patterns=longjax.SlidingWindow(11),
    position='transformer_xl',
    mlp_bias=True,
    **DROPOUT,
    rngs=nnx.Rngs(0),
  )


def long_net():
  options = dict(
    vocab_size=VOCABULARY,
    num_layers=1,
    features=16,
    num_heads=2,
    mlp_features=32,
    position='rope',
    patterns=longjax.Dilated((4, 32), (1, 2)),
    dropout_rate=0.2,
    mlp_piece=3,
    remat='block',
    scan_layers=True,
  )
  return longjax.DecoderLM(**longnet('125m', **options), rngs=nnx.Rngs(0))


def led():
  return longjax.LED(
    VOCABULARY,
    1,
    1,
    16,
    2,
    2,
    patterns=longjax.SlidingWindow(5, 5),
    max_positions=LENGTH,
    max_target_positions=TARGET,
    max_globals=4,
    **DROPOUT,
    rngs=nnx.Rngs(0),
  )


def next_tokens(model, batch, key):
  losses = target_losses(
    model, batch['tokens'], batch['targets'], dropout_key=key, logits=170
  )
  return losses.mean(), None


def summaries(model, batch, key):
  """Weighted by how many labels count, which differs between devices."""
  logits = model(
    batch['tokens'],
    batch['summary'],
    global_mask=batch['mask'],
    dropout_key=key,
  )
  counts = batch['labels'] > 5
  log_p = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_p, batch['labels'][..., None], axis=-1)
  total = counts.sum()
  return -(chosen[..., 0] * counts).sum() / jnp.maximum(total, 1), total


def longformer():
  return longjax.Longformer(
    VOCABULARY,
    1,
    16,
    2,
    patterns=longjax.SlidingWindow(5, 5),
    max_positions=LENGTH,
    head='masked_lm',
    max_globals=0,
    **DROPOUT,
    rngs=nnx.Rngs(0),
  )


def masked_words(model, batch, key):
  losses = masked_losses(
    model, batch['tokens'], batch['places'], batch['masked'], key
  )
  return losses.mean(), None


def batch_of(names):
  draw = np.random.default_rng(0).integers
  tokens, targets = draw(3, VOCABULARY, (2, BATCH, LENGTH)).astype(np.int32)
  summary, labels = draw(3, VOCABULARY, (2, BATCH, TARGET)).astype(np.int32)
  # As many as no number of devices divides.
  places, masked = draw(3, VOCABULARY, (2, BATCH, 7)).astype(np.int32)
  # A shard of nothing but padding, which the model finds in the tokens.
  if 'summary' in names:
    tokens[1, 20:] = tokens[3, 5:] = 1
  mask = np.zeros((BATCH, LENGTH), np.int32)
  mask[:, 0] = mask[0, 17] = mask[1, 9] = mask[2, 31] = 1
  every = locals()
  return {name: every[name] for name in names}


LM = next_tokens, ('tokens', 'targets')
# model, loss and what is in a batch, further options of the step.
CASES = {
  'character LM': (character_lm, *LM, dict(micro_batches=2)),
  'LongNet': (long_net, *LM, {}),
  'LED': (led, summaries, ('tokens', 'summary', 'labels', 'mask'), {}),
  'masked words': (
    longformer,
    masked_words,
    ('tokens', 'places', 'masked'),
    {},
  ),
}


class Run:
  """Steps of one case on some devices."""

  def __init__(self, name, sizes, split_parameters=False):
    make, loss, names, options = CASES[name]
    merge, params = split(make())
    optimizer = make_optimizer(lambda step: 1e-2, clip_norm=1.0)
    self.batch = batch_of(names)
    self.devices = sizes and Devices(sizes, split_parameters=split_parameters)
    if self.devices:
      self.sequences = [n for n in names if n in SEQUENCES]
      self.batch = self.devices.shard(self.batch, self.sequences)
      options = options | dict(
        sum_over_parts=functools.partial(
          self.devices.sum_over_parts, sequences=self.sequences
        )
      )
    state = {'params': params, 'opt_state': optimizer.init(params)}
    if self.devices:
      state = jax.device_put(state, self.devices.shardings(state))
    self.state, self.number, self.losses = state, 0, []
    step = make_train_step(loss, merge, optimizer, seed=3, **options)
    self.step = jax.jit(step)

  def go(self, steps):
    for _ in range(steps):
      self.state, outputs = self.step(
        self.state, self.batch, np.int32(self.number)
      )
      self.number += 1
      self.losses.append([float(x) for x in outputs.values()])
    return self


@functools.cache
def alone(name):
  return Run(name, None).go(3)


@pytest.mark.parametrize('name', CASES)
def test_three_steps_are_those_of_one_device(name):
  got, wanted = Run(name, {'data': 2, 'seq': 4}).go(3), alone(name)
  np.testing.assert_allclose(got.losses, wanted.losses, rtol=1e-4)
  for key, value in wanted.state['params'].items():
    np.testing.assert_allclose(
      got.state['params'][key], value, atol=1e-4, err_msg=key
    )


@pytest.mark.full
def test_parameters_may_be_split(monkeypatch):
  monkeypatch.setattr(devices_lib, '_SMALL', 0)
  run = Run('LongNet', {'data': 2, 'seq': 4}, split_parameters=True).go(3)
  np.testing.assert_allclose(run.losses, alone('LongNet').losses, rtol=1e-4)
  for part in ('params', 'opt_state'):
    arrays = jax.tree.leaves(run.state[part])
    whole = sum(x.nbytes for x in arrays)
    here = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    # Biases of 16 and 32 are split as well.
    assert here < whole / 7.5


@pytest.mark.full
def test_a_checkpoint_moves_from_eight_devices_to_two_and_to_one(
  tmp_path, monkeypatch
):
  wanted = Run('LongNet', None).go(6).losses
  losses, every = [], jax.devices()
  for count, sizes, parameters in (
    (8, {'data': 1, 'seq': 8}, True),
    (2, {'data': 2, 'seq': 1}, False),
    (1, {'data': -1}, False),
  ):
    monkeypatch.setattr(jax, 'devices', lambda count=count: every[:count])
    run = Run('LongNet', sizes, parameters)
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(run.state)
    if losses:
      run.state, run.number = restored.state, restored.step
    losses += run.go(2).losses
    checkpoints.save(run.number, run.state, {})
    checkpoints.close()
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)


def settings(tmp_path, **changes):
  text = write_text(tmp_path / 'text.txt')
  config = tiny(text, **changes)
  config['model'] |= dict(num_layers=1)
  config['stages'] = (config['stages'][0] | dict(steps=3),)
  return config


@pytest.mark.full
def test_a_run_on_a_mesh(tmp_path, monkeypatch):
  """From its config, with evaluation, and going on on fewer devices."""
  results = []
  for count, mesh in ((8, dict(data=2, seq=4)), (1, {})):
    config = settings(tmp_path, mesh=mesh, log_every=1)
    results.append(run(config, tmp_path / f'on_{count}', count))
  (sharded, losses), (whole, wanted) = results
  assert sharded['windows'] > 8
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)
  assert len(wanted) == 3
  assert sharded['bits_per_character'] == pytest.approx(
    whole['bits_per_character'], rel=1e-4
  )
  every = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda: every[:1])
  again = training.evaluate(config, tmp_path / 'on_8' / 'run')
  assert again['bits_per_character'] == pytest.approx(
    sharded['bits_per_character'], rel=1e-5
  )


@pytest.mark.full
@pytest.mark.parametrize(
  'task',
  [
    'masked_lm',
    'sequence_classification',
    'token_classification',
    'question_answering',
  ],
)
def test_encoders_on_a_mesh(task, tmp_path):
  """From their configs: rows and sequences split, the same losses."""
  results = []
  for count, mesh in ((8, dict(data=2, seq=4)), (1, {})):
    folder = tmp_path / f'on_{count}'
    folder.mkdir()
    if task == 'masked_lm':
      config = test_masked_lm.tiny(write_text(folder / 'text.txt'))
    else:
      config = test_finetuning.tiny(folder, task)
      config['data']['buckets'] = (32,)
      config['stages'] = (config['stages'][0] | dict(steps=6),)
    # The definition is for whole sequences.
    config['model'] = config['model'] | dict(implementation=None)
    config |= dict(mesh=mesh, log_every=1)
    results.append(run(config, folder, count))
  (sharded, losses), (whole, wanted) = results
  assert len(wanted) == 6
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)
  name = 'bits_per_token' if task == 'masked_lm' else 'loss'
  assert sharded[name] == pytest.approx(whole[name], rel=1e-3)


def run(config, folder, count):
  """(result, losses of the steps) on so many devices."""
  every = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: every[:count])
    result = training.train_and_evaluate(config, folder / 'run')
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('train/loss') for line in lines]
  return result, [x for x in losses if x is not None]


@pytest.mark.parametrize(
  ('mesh', 'changes', 'message'),
  [
    (dict(data=3, seq=2), {}, 'mesh data 3 x seq 2 x model 1 does not make'),
    (dict(seq=3), {}, 'seq 3 x model 1 does not make the 8 devices there are'),
    (dict(data=8), {}, 'stage 0 batch_size 4 does not divide over 8 devices'),
    (
      dict(data=1, seq=8),
      dict(evaluation=dict(length=36, batch_size=8)),
      r'config.evaluation.length: .* that can: 32 and 40',
    ),
    (
      dict(data=1, seq=8),
      dict(
        stages=(
          dict(length=30, batch_size=4, steps=1, learning_rate=1.0, windows=4),
        )
      ),
      'stage 0 length: a sequence of 30 tokens .* that can: 24 and 32',
    ),
  ],
)
def test_bad_meshes(tmp_path, mesh, changes, message):
  config = settings(tmp_path, mesh=mesh) | changes
  with pytest.raises(ValueError, match=message):
    training.train_and_evaluate(config, tmp_path)


def test_tasks_that_split_no_sequences(tmp_path):
  class Other:
    sequences = ()
    settings = training.default_settings('language_modelling')

  with pytest.raises(ValueError, match="seq' is 8, but language_modelling spl"):
    Devices({'seq': 8}).check_sequences(Other())
  with pytest.raises(ValueError, match="mesh axis 'model' is 2: training spl"):
    Devices({'data': 4, 'model': 2})
