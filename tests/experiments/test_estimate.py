"""Estimates of memory: exact where they can be, near the compiler elsewhere."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from experiments import activations, estimate, flops, targets
from longjax import DecoderLM
from longjax.training.settings import make_settings

pytestmark = pytest.mark.usefixtures('optimised')

MIB = 2**20
SHEET = jax.ShapeDtypeStruct((512, 512), jnp.float32)  # of one MiB


def mib(f, *arguments):
  return activations.peak(f, *arguments) / MIB


def test_elementwise_results_take_no_memory():
  assert mib(lambda x: jnp.sum(jnp.tanh(x * 2 + 1) ** 2), SHEET) < 0.01


def test_a_result_may_take_the_place_of_an_argument():
  assert mib(lambda x: x + 1, SHEET) == 0
  assert mib(lambda x: (x + 1, x * 2), SHEET) == 1


def test_products_and_what_they_read_are_held():
  # The product; and the elementwise result that a second one reads.
  assert mib(lambda x: jnp.sum(x @ x), SHEET) == pytest.approx(1, abs=0.01)
  assert mib(lambda x: jnp.sum((x @ x + 1) @ x), SHEET) == pytest.approx(
    2, abs=0.01
  )


def test_the_backward_pass_holds_what_it_needs_and_remat_less():
  def loss(ws, x, block):
    for w in ws:
      x = block(w, x)
    return jnp.sum(x)

  def block(w, x):
    return jnp.tanh(jnp.tanh(x @ w) @ w)

  ws = [SHEET] * 4
  all_kept = mib(jax.grad(lambda w, x: loss(w, x, block)), ws, SHEET)
  inputs = mib(
    jax.grad(lambda w, x: loss(w, x, jax.checkpoint(block))), ws, SHEET
  )
  # Two for each block, and next to nothing else; of remat the blocks' inputs.
  assert 8 <= all_kept <= 10
  assert inputs <= all_kept - 2


def test_a_loop_needs_its_body_once():
  def body(x, _):
    return jnp.tanh(x @ x), None

  def run(x, steps):
    return jax.lax.scan(body, x, None, length=steps)[0]

  short, long = (mib(lambda x, n=n: run(x, n), SHEET) for n in (2, 50))
  assert short == long and 1 <= long <= 3


def config(**model):
  config = common.make_config()
  config.model = common.modern_model(
    num_layers=2, features=64, num_heads=2, implementation='xla', **model
  )
  config.stages = (
    dict(length=64, batch_size=8, steps=2, learning_rate=1e-3, windows=16),
    dict(length=128, batch_size=4, steps=2, learning_rate=1e-3, windows=16),
  )
  config.optimizer.name = 'muon'
  config.ema_decay = 0.9
  return config


def test_parameters_and_optimizer_state_are_exact():
  from longjax.training import stages
  from longjax.training.optimizer import make_optimizer
  from longjax.training.state import split

  made = config()
  settings = make_settings(made)
  kinds = [*targets.mesh('h200').devices.flat]
  step = estimate.make_step(settings, 1, kinds, 50)
  stage = stages.make_stages(settings.stages)[1]
  model = DecoderLM(
    50,
    patterns=stage.layer_patterns('sliding_window', 2),
    rngs=nnx.Rngs(0),
    **made.model,
  )
  _, params = split(model)
  optimizer = make_optimizer(lambda step: 1e-3, **made.optimizer)
  state = {
    'params': params,
    'opt_state': optimizer.init(params),
    'ema': params,
  }

  def nbytes(tree):
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))

  # The step's own count of the steps, which the schedule reads.
  for part in ('params', 'ema'):
    assert estimate.bytes_per_device(step.state[part]) == nbytes(state[part])
  wanted = jax.eval_shape(lambda: state['opt_state'])
  assert jax.tree.map(jnp.shape, step.state['opt_state']) == jax.tree.map(
    jnp.shape, wanted
  )
  assert estimate.bytes_per_device(step.state['opt_state']) == nbytes(
    state['opt_state']
  )


# Activations by the compiler for one H200 (jax 0.11.2), in MiB.
COMPILED = {
  'demo': ('', 172.4),
  'enwik8_longformer': ('small,runlocal', 28.3),
  'enwik8_longnet': ('runlocal', 26.5),
  'enwik8_lm_infinite': ('runlocal', 16.9),
  'text8_rope_lm_infinite': ('', 157.0),
}


@pytest.mark.full
@pytest.mark.parametrize('name', COMPILED)
def test_what_is_counted_is_near_what_the_compiler_says(name):
  argument, _ = COMPILED[name]
  made = importlib.import_module(f'configs.{name}').get_config(argument)
  kinds = [*targets.mesh('h200').devices.flat]
  step = estimate.make_step(
    make_settings(made), len(made.stages) - 1, kinds, 256
  )
  ratio = step.activation_bytes() / estimate.compiled_bytes(step.compile())
  assert 0.7 <= ratio <= 1.3


@pytest.mark.parametrize('name', ['demo', 'enwik8_lm_infinite'])
def test_what_is_counted_is_near_what_the_compiler_said(name):
  argument, said = COMPILED[name]
  made = importlib.import_module(f'configs.{name}').get_config(argument)
  kinds = [*targets.mesh('h200').devices.flat]
  step = estimate.make_step(
    make_settings(made), len(made.stages) - 1, kinds, 256
  )
  assert 0.7 <= step.activation_bytes() / MIB / said <= 1.3


def test_several_stages_and_flops(tmp_path, capsys):
  text = estimate.describe(
    config(), stage=2, device='h200', vocab_size=50, compile_it=False
  )
  assert text.startswith('stage 2 of 2: length 128, batch size 4, on 1 x h200')
  forward = flops.of_config(config(), 128, 50).total
  assert f'{forward / 1e9:,.3f} GFLOP forward' in text
  assert 'peak' not in text


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (['--config=configs/none.py'], 2, 'No such file'),
    (['--config=configs/lm_infinite_llama.py'], 2, 'trains nothing'),
    (['--config=configs/demo.py', '--stage=2'], 2, 'is not one of 1 to 1'),
    (['--config=configs/demo.py', '--device=b200'], 2, "'b200' is not one of"),
    (['--config=configs/demo.py', '--vocab_size=0'], 2, 'at least 1, got 0'),
  ],
)
def test_mistakes(arguments, code, message, capsys):
  with pytest.raises(SystemExit) as error:
    estimate.main([*arguments, '--nocompile'])
  assert error.value.code == code
  assert message in capsys.readouterr().err.splitlines()[-1]
