"""The task of summaries: a run end to end, its loss, its mistakes."""

import dataclasses
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longjax import interop, training
from longjax.data import bpe
from longjax.models import LED
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages
from longjax.training.state import split
from longjax.training.tasks import make_task
from tests.training.test_train import arrays

pytestmark = pytest.mark.usefixtures('compile_once')

WORDS = [a + b + c for a in 'bdfg' for b in 'aeiou' for c in 'klmn']


def write_papers(path, count=40, seed=0):
  """Papers of random words, whose summaries are their last words."""
  generator = random.Random(seed)
  with open(path, 'w') as file:
    for number in range(count):
      words = generator.choices(WORDS, k=generator.randint(20, 60))
      record = {
        'article_id': f'{seed}-{number}',
        'article_text': [' '.join(words) + '.', 'It ends.'],
        'abstract_text': ['<S> ' + ' '.join(words[-4:]) + ' . </S>'],
      }
      file.write(json.dumps(record) + '\n')
  return str(path)


def tiny(folder, **changes):
  further = write_papers(folder / 'more.jsonl', count=3, seed=1)
  return {
    'task': 'summarization',
    'data': dict(
      path=write_papers(folder / 'papers.jsonl'),
      held_out=(0.1, 0.2),
      vocab_size=300,
      buckets=(),
      tests=(dict(name='further', path=further),),
      loader='numpy',
    ),
    'model': dict(
      num_encoder_layers=1,
      num_decoder_layers=1,
      features=16,
      num_encoder_heads=2,
      num_decoder_heads=2,
      max_positions=64,
      max_target_positions=24,
      max_globals=1,
      dropout_rate=0.1,
      implementation='reference',
    ),
    'stages': (
      stage(24, objective='opening', target_length=8),
      stage(64),
    ),
    'target_length': 16,
    'evaluation': dict(
      batch_size=4,
      # As of validation: one search to compile.
      num_beams=1,
      max_length=10,
      every=4,
      validation_papers=2,
    ),
    'log_every': 1,
    'checkpoint_every': 2,
    'keep_checkpoints': 9,
    'tensorboard': False,
    **changes,
  }


def stage(length, **keys):
  return dict(
    length=length,
    batch_size=4,
    steps=3,
    learning_rate=1e-2,
    windows=4,
    **keys,
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, folder, result) of a run of the second stage alone."""
  folder = tmp_path_factory.mktemp('summaries')
  config = tiny(folder, stages=(stage(64) | dict(steps=6),))
  return config, folder, training.train_and_evaluate(config, folder / 'run')


def test_what_a_run_leaves(run):
  _, folder, result = run
  found = json.loads((folder / 'run' / 'result.json').read_text())
  assert found == json.loads(json.dumps(result))
  assert result['step'] == 6
  sets = result['sets']
  assert list(sets) == ['test', 'further']
  rows = [(r['system'], r['input_tokens']) for r in sets['test']['systems']]
  assert rows[:2] == [('model', 64), ("model, another paper's text", 64)]
  assert result['loss'] == sets['test']['systems'][0]['loss']
  assert result['rouge1'] == sets['test']['systems'][0]['rouge1']['mean']
  assert sets['further']['papers'] == 3
  assert len(sets['further']['systems']) == 4
  lines = (folder / 'run' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == sets['test']['papers'] + 3
  for name in ('summaries.json', 'rouge_by_length.png', 'loss.png'):
    assert (folder / 'run' / name).exists()
  records = training.read_metrics(folder / 'run')
  losses = [r['train/loss'] for r in records if 'train/loss' in r]
  assert len(losses) == 6 and np.isfinite(losses).all()
  (validation,) = (r for r in records if 'validation/loss' in r)
  assert validation['step'] == 4 and 0 <= validation['validation/rouge1'] <= 100


def test_resumed_is_bit_equal(run, tmp_path):
  """From the middle of a run, with the papers as they lie."""
  config, folder, result = run
  shutil.copytree(folder / 'run', tmp_path / 'run')
  for step in (5, 6):
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step), True)
  made = (tmp_path / 'run' / 'papers' / 'test' / 'about.json').stat().st_mtime
  again = training.train_and_evaluate(config, tmp_path / 'run')
  about = tmp_path / 'run' / 'papers' / 'test' / 'about.json'
  assert about.stat().st_mtime == made
  wanted = arrays(folder / 'run', 6)
  for name, array in arrays(tmp_path / 'run', 6).items():
    np.testing.assert_array_equal(array, wanted[name], err_msg=name)
  assert again['sets'] == result['sets']
  evaluated = training.evaluate(config, tmp_path / 'run')
  assert evaluated['rouge1'] == result['rouge1']
  # Of a checkpoint elsewhere the tokenizer and the papers come along.
  shutil.rmtree(tmp_path / 'run' / 'papers')
  elsewhere = training.load(config, tmp_path / 'none', tmp_path / 'run')
  assert elsewhere.task.tokenizer.vocab_size == 300


@pytest.fixture(scope='module')
def task(run):
  _, folder, _ = run
  config = tiny(folder)
  config['data'] |= dict(buckets=(48,))
  return make_task(make_settings(config), folder / 'run')


def test_a_batch_teaches_the_summary(task):
  last = make_stages(task.settings.stages)[1]
  batches = task.make_batches(last, 1)
  papers = {}
  for _ in range(batches.batches_per_epoch):
    batch = next(batches)
    assert batch['tokens'].shape in ((4, 48), (4, 64))
    assert batch['labels'].shape == batch['decoder_tokens'].shape == (4, 16)
    for tokens, labels in zip(batch['tokens'], batch['labels'], strict=True):
      papers[task._text(tokens)] = task._text(labels)
  papers.pop('', None)  # a filler
  assert len(papers) == len(task.prepared.train)
  for article, summary in papers.items():
    # What was cut off of a long article cannot be in it.
    if article.endswith('It ends.'):
      words = article.removesuffix('. It ends.').split('\n')[0].rstrip('.')
      assert ' '.join(words.split()[-4:]) == summary.removesuffix(' .')


def test_a_first_stage_teaches_openings(task):
  first = make_stages(task.settings.stages)[0]
  batch = next(task.make_batches(first, 0))
  assert batch['tokens'].shape == (4, 24) and batch['labels'].shape == (4, 8)
  np.testing.assert_array_equal(batch['labels'][:, :7], batch['tokens'][:, :7])
  assert task.tokens(batch) == 4 * 24 + 4 * 8


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_loss_is_the_mean_over_labels(task, smoothing):
  """By hand, of logits that are given; padding and fillers do not count."""
  task = _with(task, label_smoothing=smoothing)
  logits = jax.random.normal(jax.random.key(0), (3, 4, 7))
  labels = np.array([[0, 5, 2, 1], [0, 2, 1, 1], [1, 1, 1, 1]])
  batch = {'tokens': None, 'decoder_tokens': None, 'labels': labels}
  loss, weight = task.loss(lambda *_, **__: logits, batch, None)
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  wanted = [
    -(1 - smoothing) * log_p[r, t, labels[r, t]]
    - smoothing * log_p[r, t].mean()
    for r, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
  ]
  np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-6)
  assert weight == 5
  batch['labels'] = np.ones((3, 4), int)
  assert task.loss(lambda *_, **__: logits, batch, None) == (0, 0)


def _with(task, **changes):
  made = object.__new__(type(task))
  made.__dict__ |= task.__dict__
  made.settings = dataclasses.replace(task.settings, **changes)
  return made


@pytest.mark.full  # Three models, op by op.
def test_bfloat16_and_recomputed_blocks_change_little(task):
  last = make_stages(task.settings.stages)[1]
  batch = next(task.make_batches(last, 1))
  losses = {}
  for name, changes in {
    'plain': {},
    'remat': dict(remat=True),
    'bfloat16': dict(dtype='bfloat16'),
  }.items():
    made = _with(task)
    made._keywords = {**task._keywords, **changes}
    model = made.make_model(last, nnx.Rngs(0))
    losses[name] = float(made.loss(model, batch, None)[0])
    assert model.dtype == changes.get('dtype', jnp.float32)
  assert losses['remat'] == pytest.approx(losses['plain'], rel=1e-6)
  assert losses['bfloat16'] == pytest.approx(losses['plain'], rel=2e-2)
  assert losses['bfloat16'] != losses['plain']


def test_a_run_begins_with_a_pretrained_model(tmp_path):
  config = tiny(tmp_path)
  sizes = {**config['model']}
  for name in ('dropout_rate', 'implementation'):
    sizes.pop(name)
  texts = pathlib.Path(config['data']['path']).read_text().splitlines()
  folder = tmp_path / 'pretrained'
  bpe.train(texts, 280, folder / 'tokenizer.json')
  model = LED(
    280,
    patterns=training.Stage(**stage(8)).layer_patterns(
      'sliding_window', 1, causal=False
    ),
    **sizes,
    rngs=nnx.Rngs(5),
  )
  interop.save_pretrained(model, folder, interop.config_of_led(model))
  config |= {
    'pretrained': str(folder),
    'model': dict(implementation='reference'),
    'stages': (stage(64) | dict(windows=None),),
  }
  task = make_task(make_settings(config), tmp_path / 'run')
  (only,) = make_stages(config['stages'])
  begun = task.make_model(only, nnx.Rngs(0))
  assert begun.patterns == model.patterns
  np.testing.assert_array_equal(
    task.pretrained()['embedding.embedding'], model.embedding.embedding[...]
  )
  assert set(task.pretrained()) == set(split(begun)[1])
  config['model'] = dict(features=16)
  with pytest.raises(ValueError, match='config.model.features is not set by h'):
    make_task(make_settings(config), tmp_path / 'run')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(model={}), 'config.model lacks the key num_encoder_layers, and'),
    (dict(target_length=25), r'config.target_length 25 must lie in 3 ... 24'),
    (dict(label_smoothing=1.0), r'config.label_smoothing must lie in \[0, 1\)'),
    (dict(stages=(stage(65),)), 'stage 0: length 65 must lie in 3 ... 64'),
    (
      dict(stages=(stage(64, objective='mlm'),)),
      "stage 0: objective 'mlm' is not one of",
    ),
    (
      dict(stages=(stage(64, target_length=2),)),
      'stage 0: target_length 2 must lie in 3 ... 24',
    ),
  ],
)
def test_mistakes_are_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    make_task(make_settings(tiny(tmp_path, **changes)), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(path=''), 'config.data.path is empty'),
    (dict(path='absent.jsonl'), 'no such file: absent.jsonl'),
    (dict(name='arXiv'), "config.data.name 'arXiv' is not one of"),
    (dict(name='arxiv'), 'is of no use to arxiv'),
    (
      dict(tests=(dict(name='a'),)),
      r"config.data.tests\[0\] lacks the key 'pa",
    ),
    (dict(tests=(dict(nme='a'),)), "unknown key 'nme' in config.data.tests"),
    (
      dict(tests=(dict(name='a/b', path='p'),)),
      "name 'a/b' must be a plain word",
    ),
    (dict(fields=dict(summry='a')), "unknown key 'summry' in config.data.fiel"),
    (dict(fields=dict(summary='a')), "papers.jsonl line 1 has no 'a'"),
    (dict(vocab_size=20), 'vocab_size=20 must be at least 261'),
  ],
)
def test_mistakes_of_data_are_named(tmp_path, changes, message):
  config = tiny(tmp_path)
  config['data'] |= changes
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    make_task(make_settings(config), tmp_path / 'run')


def test_a_summary_needs_papers_to_train_on(tmp_path):
  config = tiny(tmp_path)
  config['data'] |= {'held_out': (0.0, 1.0), 'tokenizer': ''}
  with pytest.raises(ValueError, match='there is no text to train byte-pair'):
    make_task(make_settings(config), tmp_path / 'run')
