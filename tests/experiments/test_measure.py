"""main.py --mode=measure on a tiny model with a tokenizer of bytes."""

import importlib
import json

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

import longjax
from experiments import measure
from experiments.subject import Subject
from longjax import training
from longjax.evaluation import length as evaluation
from longjax.interop import config_of, save_pretrained
from longjax.models import gptj, llama, mpt
from tests.training.helpers import write_text

TRAINED, START = 32, 4
ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()


SIZES = dict(vocab_size=256, num_layers=1, features=8, num_heads=2)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A folder as of a pretrained model, random, and a text beside it."""
  folder = tmp_path_factory.mktemp('pretrained')
  return write_pretrained(folder, llama(**SIZES, mlp_features=8))


def write_pretrained(folder, keywords):
  model = longjax.DecoderLM(
    **keywords, patterns=longjax.Full(), rngs=nnx.Rngs(0)
  )
  model = jax.tree.map(lambda x: 10 * x, model)
  save_pretrained(model, folder, config_of(keywords, max_length=TRAINED))
  vocabulary = {symbol: number for number, symbol in enumerate(ALPHABET)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.save(str(folder / 'tokenizer.json'))
  words = np.random.default_rng(0).choice(['a story', 'of', 'words'], 60)
  (folder / 'text.txt').write_text(' '.join(words[:30]) + '|' + ' '.join(words))
  return folder


def make_config(folder):
  config = importlib.import_module('configs.common').measurements(
    TRAINED, START
  )
  with config.unlocked():
    config.model.path = str(folder)
    config.text.update(path=str(folder / 'text.txt'), separator='|')
    config.loss_by_position.update(length=96, documents=2, chunk=32)
    config.variants = ('vanilla', 'LM-Infinite', 'truncation')
  return config


def test_every_measurement(pretrained, tmp_path):
  config = make_config(pretrained)
  config.streaming.update(length=1000, chunk=100)
  config.variants = (*config.variants, 'independent blocks')
  for task in (config.passkey, config.key_value):
    task.update(lengths=(500,), depths=(0.5,), samples=1)
  config.passkey.update(middle_keys=2, middle_first_layer=0)
  config.overlap.update(milestones=(20, 60), tokens=10, documents=2)
  result = measure.measure(config, tmp_path)
  assert result.keys() == {
    'loss_by_position',
    'streaming',
    'passkey',
    'key_value',
    'overlap',
  }
  assert result['loss_by_position'].keys() == set(config.variants)
  record = json.loads((tmp_path / 'loss_by_position.json').read_text())
  curve = record['results']['vanilla']
  assert curve['edges'][0] == 1 and curve['edges'][-1] == 96
  assert len(curve['mean']) == len(curve['edges']) - 1
  assert curve['documents'] == 2 and curve['seconds'] > 0
  assert list(curve['octaves']) == ['16-32', '32-64', '64-96']
  np.testing.assert_allclose(
    np.mean(curve['beyond_by_document']), curve['beyond_trained_length']
  )
  # Nothing about this machine's folders.
  assert str(pretrained.parent) not in json.dumps(record)
  stream = json.loads((tmp_path / 'streaming.json').read_text())
  stream = stream['results']['LM-Infinite']
  assert len(stream['nats']) == 10 and stream['repeats_of_text'] > 1
  assert stream['begun_at'] == [0] and stream['cache_bytes'] > 0
  for name in ('seconds_per_chunk', 'processor_seconds_per_chunk'):
    first, *others = stream[name]
    # The chunk that compiles is not counted.
    assert first is None and len(others) == 9 and min(others) > 0
  assert 'LM-Infinite, top 2' in result['passkey']
  for name in result:
    picture = (tmp_path / f'{name}.png').read_bytes()
    assert picture.startswith(b'\x89PNG')


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'keywords'),
  [
    ('llama2', llama(**SIZES, num_kv_heads=1, mlp_features=8)),
    ('gptj', gptj(**SIZES, mlp_features=32, rotary_dim=2)),
    ('mpt', mpt(**SIZES, mlp_features=32)),
  ],
)
def test_the_configs_of_the_papers_models(name, keywords, tmp_path):
  """All they ask for and every variant, on a tiny model of the family."""
  folder = tmp_path / 'model'
  folder.mkdir()
  write_pretrained(folder, keywords)
  config = importlib.import_module(f'configs.lm_infinite_{name}').get_config()
  given = config.copy_and_resolve_references()
  config.model.update(path=str(folder), trained_length=TRAINED, start=START)
  config.text.update(path=str(folder / 'text.txt'), separator='|')
  config.loss_by_position.update(length=70, documents=2, chunk=32)
  for task in (config.passkey, config.key_value):
    task.update(lengths=(500,), depths=(0.5,), samples=1)
  config.passkey.middle_first_layer = 0
  config.overlap.update(milestones=(20, 60), tokens=5, documents=2)
  result = measure.measure(config, tmp_path / 'measured')
  losses = result['loss_by_position']
  assert losses.keys() == set(given.variants)
  assert np.isfinite([*losses.values()]).all()
  for task in ('passkey', 'key_value', 'overlap'):
    assert {'vanilla', 'LM-Infinite'} <= result[task].keys()
  top = f'LM-Infinite, top {given.passkey.middle_keys}'
  assert (top in result['passkey']) == bool(given.passkey.middle_keys)


def test_what_is_finished_is_kept(pretrained, tmp_path, monkeypatch):
  config = make_config(pretrained)
  config.variants = ('LM-Infinite',)
  first = measure.measure(config, tmp_path)
  config.variants = ('LM-Infinite', 'window only')
  asked = []
  losses = measure._Run._losses

  def spy(self, label, texts, chunk):
    asked.append(label)
    return losses(self, label, texts, chunk)

  monkeypatch.setattr(measure._Run, '_losses', spy)
  second = measure.measure(config, tmp_path)
  assert asked == ['window only']
  assert (
    second['loss_by_position']['LM-Infinite']
    == first['loss_by_position']['LM-Infinite']
  )
  config.loss_by_position.length = 90
  with pytest.raises(ValueError, match='measured with other settings'):
    measure.measure(config, tmp_path)


def test_blocks_know_nothing_of_each_other(pretrained, tmp_path):
  """The plain model on each block by itself, its first token scored too."""
  config = make_config(pretrained)
  config.variants = ('independent blocks',)
  run = measure._Run(config, tmp_path)
  texts = run.subject.texts(2, 96)
  got = run._losses('independent blocks', texts, 32)
  model = run.subject.load(longjax.Full())
  for start in (0, 32, 64):
    block = texts[:, start : start + TRAINED + 1]
    logp = jax.nn.log_softmax(model(block[:, :-1]))
    wanted = -np.take_along_axis(np.asarray(logp), block[:, 1:, None], -1)
    # Of a model with large weights: losses up to 20, and rounding as large.
    np.testing.assert_allclose(
      got[:, start : start + TRAINED], wanted[..., 0], rtol=1e-4, atol=1e-4
    )


def test_texts_that_begin_with_a_document(pretrained):
  config = make_config(pretrained)
  documents = (pretrained / 'text.txt').read_text().split('|')
  config.text.stride = 1
  one, two = Subject(config).texts(2, 50)
  tokenizer = Subject(config).tokenizer
  assert tokenizer.decode(one) == ''.join(documents)[:50]
  assert tokenizer.decode(two) == documents[1][:50]
  config.text.stride = 2
  with pytest.raises(ValueError, match='has 0 from document 2 on'):
    Subject(config).texts(2, 50)


def test_a_stream_that_was_stopped_goes_on(pretrained, tmp_path, monkeypatch):
  config = make_config(pretrained)
  config.loss_by_position.length = 0
  config.streaming.update(length=1000, chunk=7)
  whole = measure.measure(config, tmp_path / 'whole')
  write = measure._Run.write

  def stop(self, name, results):
    write(self, name, results)
    if len(results['LM-Infinite']['nats']) == 40:
      raise KeyboardInterrupt

  monkeypatch.setattr(measure._Run, 'write', stop)
  with pytest.raises(KeyboardInterrupt):
    measure.measure(config, tmp_path / 'stopped')
  monkeypatch.undo()
  stopped = measure.measure(config, tmp_path / 'stopped')
  assert stopped['streaming']['nats'] == whole['streaming']['nats']
  a, b = (
    json.loads((tmp_path / name / 'streaming.json').read_text())['results'][
      'LM-Infinite'
    ]
    for name in ('whole', 'stopped')
  )
  assert a['position'] == b['position'] and len(a['position']) == 100
  assert a['begun_at'] == [0] and b['begun_at'][0] == 0 < b['begun_at'][1]
  assert not (tmp_path / 'stopped' / 'streaming_checkpoints').exists()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of ours, of a step."""
  folder = tmp_path_factory.mktemp('trained')
  config = importlib.import_module('configs.text8_rope_lm_infinite').get_config(
    'runlocal'
  )
  config.data.name = 'text'
  config.data.path = str(write_text(folder / 'text.txt', words=2000))
  config.data.loader = 'numpy'
  config.model.update(num_layers=1, features=8, num_heads=2)
  stage = dict(config.stages[0]) | dict(
    length=TRAINED, batch_size=2, steps=1, warmup_steps=0
  )
  config.stages = (stage,)
  config.evaluation.update(
    length=TRAINED, stride=TRAINED, batch_size=2, test_characters=100
  )
  config.tensorboard = False
  training.train_and_evaluate(config, folder / 'run')
  return folder / 'run'


def test_a_run_of_ours(trained, tmp_path):
  config = make_config(trained)
  config.text.path = ''
  config.overlap.update(milestones=(20,), tokens=10, documents=1)
  result = measure.measure(config, tmp_path)
  record = json.loads((tmp_path / 'loss_by_position.json').read_text())
  assert record['settings']['run']['data'] == 'text'
  assert str(trained.parent) not in json.dumps(record)
  run = measure._Run(config, tmp_path)
  # Its own parameters, whatever the pattern, and its own test split.
  found = training.load(
    json.loads((trained / 'config.json').read_text()), trained
  )
  texts = found.task.corpus.test[: 2 * 96].reshape(2, 96)
  np.testing.assert_array_equal(run.subject.texts(2, 96), texts)
  assert run.model('LM-Infinite').patterns == (longjax.Lambda(TRAINED, START),)
  losses = evaluation.streamed_losses(found.model, texts)
  np.testing.assert_allclose(
    losses[:, TRAINED:].mean(),
    result['loss_by_position']['vanilla'],
    rtol=1e-5,
  )
  config.text.stride = 1
  with pytest.raises(ValueError, match='stride=1: the test split of a run is'):
    Subject(config).texts(2, 96)
  for name in ('tokenizer', 'dtype'):
    config = make_config(trained)
    config.model[name] = str(trained)
    with pytest.raises(ValueError, match=f'config.model.{name}=.* has its own'):
      measure.measure(config, tmp_path)


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('model.path', '', 'config.model.path is empty'),
    ('model.path', 'nowhere', 'config.model.path=nowhere does not exist'),
    ('model.tokenizer', 'no.json', 'config.model.tokenizer=no.json does not'),
    ('model.start', 32, r'start=32 must lie in 0 \.\.\. 31'),
    ('variants', ('vanila',), r"variants \['vanila'\] are not in"),
    ('text.path', '', 'config.text.path is empty'),
    ('text.stride', -1, 'config.text.stride=-1 must not be negative'),
    ('loss_by_position.length', 32, 'length=32 must exceed the trained'),
    ('loss_by_position.documents', 99, '9504 tokens are needed'),
  ],
)
def test_bad_input(pretrained, tmp_path, name, value, message):
  config = make_config(pretrained)
  config.update_from_flattened_dict({name: value})
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    measure.measure(config, tmp_path)


@pytest.mark.parametrize(
  ('trained', 'length'), [(32, 96), (512, 1024), (512, 32768), (8, 9)]
)
def test_edges_grow(trained, length):
  edges = measure._edges(trained, length)
  assert edges[0] == 1 and edges[-1] == length
  assert all(a < b for a, b in zip(edges, edges[1:], strict=False))
