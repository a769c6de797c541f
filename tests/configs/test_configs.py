"""Every config loads, says what it should, and takes a step."""

import importlib
import pathlib
import re

import ml_collections
import pytest

from configs import common
from experiments.measure import variants
from longjax import training
from longjax.models import DecoderLM
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages
from longjax.training.tasks.summarization_settings import led_keywords
from tests.training.helpers import write_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARGUMENTS = {
  'enwik8_longformer': ('', 'small', 'large', 'budget', 'small,runlocal'),
  'text8_longformer': ('', 'small', 'large', 'budget', 'runlocal'),
  'enwik8_longnet': ('', 'budget', 'runlocal'),
  'longnet_stack': (
    '',
    'length=8192',
    'dense,length=2048',
    '350m,bytes',
    '2.7b,rope',
    'sparse',
    'sparse,length=8192',
    'dense,runlocal',
    'sparse,runlocal',
    'runlocal',
  ),
  'enwik8_lm_infinite': ('', 'budget', 'runlocal'),
  'demo': ('', 'runlocal'),
  'text8_rope_lm_infinite': ('', 'runlocal'),
  'text8_windows': ('windows=fixed,seed=1', 'windows=decreasing', 'sweep'),
  'longnet_context': (
    '',
    'attention=dense,length=8192',
    'attention=sparse,length=512,seed=1',
    'runlocal',
  ),
}
# Of models that are measured and not trained.
MEASURED = {
  'lm_infinite_gptj': ('',),
  'lm_infinite_llama': ('',),
  'lm_infinite_llama2': ('',),
  'lm_infinite_mpt': ('',),
  'lm_infinite_stories': ('', 'stream', 'runlocal', 'stream,runlocal'),
  'text8_rope_lm_infinite': ('measure', 'measure,runlocal'),
}
# Of encoder-decoders that summarize papers.
SUMMARIES = {
  'arxiv_led': ('', 'large4k', 'base', 'runlocal', 'base,runlocal'),
  'scisummnet_led': ('', 'folder=papers', 'runlocal', 'runlocal,folder=papers'),
}
# Of encoders: masked language models and fine-tuning.
ENCODERS = {
  'text8_mlm': ('', 'pretrained=folder', 'pretrained=f,positions', 'runlocal'),
  'longformer_mlm': ('', 'folder=folder,large', 'runlocal'),
  'longformer_classification': ('', 'epochs=3,examples=100', 'runlocal'),
  'longformer_qa': ('', 'length=2048', 'runlocal'),
}
ALL = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def get_config(name, arg=''):
  return importlib.import_module(f'configs.{name}').get_config(arg)


def test_no_config_is_left_out():
  files = {p.stem for p in (ROOT / 'configs').glob('*.py')}
  assert files - {'__init__', 'common'} == {
    *ARGUMENTS,
    *MEASURED,
    *SUMMARIES,
    *ENCODERS,
  }


@pytest.mark.parametrize(('name', 'arg'), ALL)
def test_loads_with_its_patterns(name, arg):
  config = get_config(name, arg)
  assert config.is_locked
  settings = make_settings(config)
  stages = make_stages(settings.stages)
  for stage in stages:
    for pattern in stage.layer_patterns(
      settings.pattern, settings.model['num_layers']
    ):
      assert pattern.causal
      pattern.check_heads(settings.model['num_heads'])
  assert settings.evaluation.stride <= settings.evaluation.length


@pytest.mark.parametrize('name', [*ARGUMENTS, *MEASURED, *SUMMARIES, *ENCODERS])
def test_docstring_has_the_command_and_whether_it_was_run(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  assert f'--config=configs/{name}.py' in text
  assert re.search(r'https://arxiv.org/abs/\d{4}\.\d{5}|arXiv \d{4}', text)
  assert re.search('by us|Measured|Ours', text)


@pytest.mark.parametrize(
  ('name', 'arg'), [(n, arg) for n, args in MEASURED.items() for arg in args]
)
def test_measurements(name, arg):
  config = get_config(name, arg)
  assert config.is_locked
  model = config.model
  assert set(config.variants) <= set(
    variants(model.trained_length, model.start)
  )
  asked = config.loss_by_position.length, config.streaming.length
  assert any(asked) and (not asked[0] or asked[0] > model.trained_length)
  assert len(config.passkey.lengths) and len(config.passkey.depths)


@pytest.mark.parametrize(
  ('name', 'arg'), [(n, arg) for n, args in SUMMARIES.items() for arg in args]
)
def test_summaries(name, arg):
  """Sizes fit each other; a model comes from nothing or from a folder."""
  config = get_config(name, arg)
  assert config.is_locked and config.task == 'summarization'
  settings = make_settings(config)
  stages = make_stages(settings.stages)
  evaluation = settings.evaluation
  assert max(evaluation.lengths) <= stages[-1].length
  assert evaluation.min_length < evaluation.max_length
  if 'num_encoder_layers' not in settings.model:
    assert stages[0].windows is None  # the folder's
    return
  led_keywords(settings)
  positions = settings.model['max_positions']
  assert max(s.length for s in stages) == positions
  assert settings.target_length <= settings.model['max_target_positions']
  for stage in stages:
    layers = stage.layer_patterns('sliding_window', 2, causal=False)
    assert all(p.left == p.right == stage.windows for p in layers)
  if 'folder' in arg:
    assert settings.data.fields.summary == 'human_summary'
    assert [t['name'] for t in settings.data.tests] == ['arxiv', 'unarxive']
  else:
    assert settings.data.name == (
      'python_modules' if 'run' in arg else 'papers'
    )


@pytest.mark.parametrize(
  ('name', 'arg'), [(n, arg) for n, args in ENCODERS.items() for arg in args]
)
def test_encoders(name, arg):
  """From a folder with its own patterns, or from nothing with ours."""
  config = get_config(name, arg)
  assert config.is_locked
  settings = make_settings(config)
  for stage in make_stages(settings.stages):
    if 'features' not in settings.model:
      assert settings.pattern == '' and stage.windows is None
      continue
    for pattern in stage.layer_patterns(
      settings.pattern, settings.model['num_layers'], causal=False
    ):
      assert not pattern.causal
    assert stage.length <= settings.model['max_positions']


def test_the_papers_pretraining_and_fine_tuning():
  (stage,) = make_stages(get_config('longformer_mlm').stages)
  assert (stage.length, stage.batch_size, stage.steps) == (4096, 64, 65_000)
  (stage,) = make_stages(get_config('longformer_classification').stages)
  assert stage.steps == 242  # 15 epochs of 516 articles
  (stage,) = make_stages(get_config('longformer_qa').stages)
  assert (stage.steps, stage.warmup_steps) == (17_289, 1000)
  with pytest.raises(ValueError, match='positions goes with pretrained'):
    get_config('text8_mlm', 'positions')


def test_the_paper_of_leds_batches():
  (stage,) = make_stages(get_config('arxiv_led').stages)
  assert (stage.length, stage.batch_size) == (16384, 16)
  assert stage.steps == 63_449  # five epochs
  with pytest.raises(ValueError, match='of large16k, large4k and base only'):
    get_config('arxiv_led', 'base,large4k')


@pytest.mark.parametrize('name', ARGUMENTS)
def test_takes_a_step(name, tmp_path):
  """What runlocal trains where there is one, for one step of a short stage."""
  config = get_config(name, ARGUMENTS[name][-1])
  config.data.name = 'text'
  config.data.path = str(write_text(tmp_path / 'text.txt', words=2000))
  config.data.loader = 'numpy'
  if 'min_document_bytes' in config.data:
    config.data.min_document_bytes = 0
  config.model.update(features=16, mlp_features=32)
  config.model.num_heads = 4
  stage = dict(config.stages[0]) | dict(
    length=64, batch_size=2, steps=1, warmup_steps=0
  )
  config.model.num_layers = 2
  if isinstance(stage.get('windows'), tuple):
    stage['windows'] = stage['windows'][:2]
  config.stages = (stage,)
  config.evaluation.update(
    length=64, stride=64, batch_size=2, test_characters=100
  )
  config.tensorboard = False
  config.report = False
  result = training.train_and_evaluate(config, tmp_path / 'run')
  assert result['step'] == 1 and result['characters'] == 100


def test_the_five_phases():
  """Table 12's two ends, and the rule between them."""
  for arg, total in (('small', 570_000), ('large', 395_000)):
    stages = make_stages(get_config('enwik8_longformer', arg).stages)
    assert [s.length for s in stages] == [2048, 4096, 8192, 16384, 23040]
    assert [s.batch_size for s in stages] == [32, 32, 16, 16, 16]
    assert sum(s.steps for s in stages) == total
    assert [s.learning_rate for s in stages] == [
      2.5e-4 / 2**phase for phase in range(5)
    ]
    assert (stages[0].windows[0], stages[0].windows[-1]) == (32, 512)
    assert (stages[4].windows[0], stages[4].windows[-1]) == (512, 8192)
    assert [s.warmup_steps for s in stages] == [
      min(s.steps // 10, 10_000) for s in stages
    ]


def test_windows_have_the_mean_of_the_ablation():
  windows = common.doubling_windows(32, 512, 12)
  assert [windows.count(w) for w in (32, 64, 128, 256, 512)] == [2, 2, 2, 3, 3]
  assert 229 < sum(windows) / 12 < 230
  assert list(windows) == sorted(windows)
  assert common.doubling_windows(8, 8, 3) == (8, 8, 8)
  for bottom, top, layers in ((32, 500, 12), (32, 512, 4), (64, 32, 12)):
    with pytest.raises(ValueError, match=f'from {bottom} to {top}'):
      common.doubling_windows(bottom, top, layers)


def test_two_of_eight_heads_are_dilated():
  stages = make_stages(get_config('enwik8_longformer', 'small').stages)
  strides = [heads[-1] for heads in stages[0].dilations]
  assert strides == [1] * 6 + [2] * 2 + [3] * 2 + [4] * 2
  assert all(heads[:6] == (1,) * 6 for heads in stages[0].dilations)
  large = make_stages(get_config('enwik8_longformer', 'large').stages)
  strides = [heads[-1] for heads in large[0].dilations]
  assert strides == [1] * 15 + [2] * 5 + [3] * 5 + [4] * 5


def test_paper_models_have_the_papers_sizes():
  from flax import nnx

  from longjax.training.state import split

  for arg, count in (('small', 41_055_232), ('large', 102_479_872)):
    config = get_config('enwik8_longformer', arg)
    stage = make_stages(config.stages)[0]
    model = nnx.eval_shape(
      lambda config=config, stage=stage: DecoderLM(
        vocab_size=204,
        patterns=stage.layer_patterns(
          'sliding_window', config.model.num_layers
        ),
        rngs=nnx.Rngs(0),
        **config.model.to_dict(),
      )
    )
    assert sum(p.size for p in split(model)[1].values()) == count


def test_parse_arg():
  parsed = common.parse_arg('large,steps=5', large=False, steps=1, run=False)
  assert parsed.to_dict() == dict(large=True, steps=5, run=False)
  assert common.parse_arg(None, large=False).large is False
  with pytest.raises(ValueError, match="'larg' is not one of large"):
    common.parse_arg('larg', large=False)
  with pytest.raises(ValueError, match='a value is wanted'):
    common.parse_arg('steps', steps=1)
  with pytest.raises(ValueError, match="'steps=x': steps is a int"):
    common.parse_arg('steps=x', steps=1)
  with pytest.raises(ValueError, match='a plain name is wanted'):
    common.parse_arg('large=1', large=False)


def test_a_config_refuses_keys_that_there_are_not():
  config = common.make_config()
  with pytest.raises((AttributeError, KeyError), match='log_every'):
    config.log_evry = 3
  with pytest.raises((AttributeError, KeyError), match='length'):
    config.evaluation.lenght = 3
  assert isinstance(config, ml_collections.ConfigDict)
  with pytest.raises(ValueError, match='of small, large and budget only one'):
    get_config('enwik8_longformer', 'large,budget')


def test_longnet_has_the_papers_tokens_and_flops():
  config = get_config('longnet_stack')
  (stage,) = config.stages
  assert stage['batch_size'] * stage['length'] == 524_288
  assert stage['steps'] == 300_000
  assert stage['ratios'] == (1, 2, 4, 6, 12)
  # Table 2's batch sizes.
  for length, batch in ((2048, 256), (8192, 64), (16384, 32)):
    (stage,) = get_config('longnet_stack', f'length={length}').stages
    assert stage['batch_size'] == batch
  # Dense attention at 16K costs 2.4 times the FLOPs a token (figure 6).
  (dense,) = get_config('longnet_stack', 'dense,length=16384').stages
  assert 2.4 < 300_000 / dense['steps'] < 2.45
  (dense,) = get_config('longnet_stack', 'dense,length=2048').stages
  assert dense['steps'] == 300_000
  (large,) = get_config('longnet_stack', '2.7b').stages
  assert large['batch_size'] * large['length'] * large['steps'] / 1e9 == (
    pytest.approx(300, abs=0.01)
  )
  (sparse,) = get_config('longnet_stack', 'sparse').stages
  assert (sparse['block'], sparse['summary']) == (2048, 139)
  assert sparse['steps'] == 300_000
  with pytest.raises(ValueError, match='of dense and sparse only one'):
    get_config('longnet_stack', 'dense,sparse')
  with pytest.raises(ValueError, match="'3b' is not one of size, length"):
    get_config('longnet_stack', '3b')
  with pytest.raises(ValueError, match='size=3b is not one of 125m, 350m'):
    get_config('longnet_stack', 'size=3b')
  with pytest.raises(ValueError, match='length 1024 is below'):
    get_config('longnet_stack', 'length=1024')
