"""Fine-tuning on labelled examples through the loop, tiny and learnable."""

import json
import random

import numpy as np
import pytest
from flax import nnx

from longjax import interop, training
from longjax.training.settings import make_settings
from longjax.training.stages import make_stages
from longjax.training.tasks import make_task

pytestmark = pytest.mark.usefixtures('compile_once')

MODEL = dict(
  num_layers=1,
  features=32,
  num_heads=2,
  max_positions=64,
  max_globals=16,
  implementation='reference',
)
WORDS = ['red', 'blue', 'cat', 'dog', 'house', 'tree', 'over', 'under']


def _text(generator, count=20):
  return [generator.choice(WORDS) for _ in range(count)]


def sequence_classification(generator, number):
  """Which of two words the text has."""
  label = generator.choice(['fine', 'poor'])
  words = _text(generator, 16)
  words[::2] = [{'fine': 'sunny', 'poor': 'rainy'}[label]] * 8
  return {'text': ' '.join(words), 'label': label}


def token_classification(generator, number):
  """Names are spans, the rest is not."""
  words = _text(generator, generator.randint(4, 12))
  at = generator.randrange(len(words) - 1)
  words[at : at + 2] = ['Ada', 'King']
  tags = ['O'] * len(words)
  tags[at : at + 2] = ['B-name', 'I-name']
  return {'tokens': words, 'tags': tags}


def question_answering(generator, number):
  """Where the gold is."""
  words = _text(generator, generator.randint(10, 20))
  at = generator.randrange(len(words))
  words[at] = 'GOLD'
  context = ' '.join(words)
  start = context.index('GOLD')
  answers = {'text': ['GOLD'], 'answer_start': [start]}
  return {'question': 'where is gold?', 'context': context, 'answers': answers}


def multiple_choice(generator, number):
  """The choice that says yes."""
  label = generator.randrange(3)
  choices = ['no', 'no', 'no']
  choices[label] = 'yes'
  text = ' '.join(_text(generator, 8))
  return {'question': text, 'choices': choices, 'label': label}


MAKERS = {
  f.__name__: f
  for f in (
    sequence_classification,
    token_classification,
    question_answering,
    multiple_choice,
  )
}


def write(path, task, count=120, seed=0, change=None):
  generator = random.Random(seed)
  records = [MAKERS[task](generator, n) for n in range(count)]
  for number, record in enumerate(records):
    record['id'] = f'{path.stem}{number}'
  if change:
    line, values = change
    records[line - 1] |= values
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return str(path)


def tiny(folder, task, change=None, **changes):
  stage = dict(length=48, batch_size=8, steps=40, learning_rate=1e-2)
  return {
    'task': task,
    'data': dict(
      train=write(folder / 'train.jsonl', task, change=change),
      test=write(folder / 'test.jsonl', task, 21, seed=1),
      held_out=(0.1, 0.0),
      vocab_size=330,
      buckets=(),
      loader='numpy',
    ),
    'model': MODEL,
    'pattern': 'sliding_window',
    'stages': (stage | dict(windows=8),),
    'optimizer': dict(weight_decay=0.0, clip_norm=1.0),
    'evaluation': dict(batch_size=8),
    'log_every': 10,
    'checkpoint_every': 20,
    'tensorboard': False,
    **changes,
  }


def examine(config, workdir=None):
  return make_task(make_settings(config), workdir)


@pytest.mark.parametrize(
  ('task', 'score', 'least'),
  [
    ('sequence_classification', 'accuracy', 0.9),
    ('multiple_choice', 'accuracy', 0.9),
    pytest.param('token_classification', 'f1', 0.9, marks=pytest.mark.full),
    pytest.param(
      'question_answering', 'exact_match', 0.9, marks=pytest.mark.full
    ),
  ],
)
def test_learns_and_writes_predictions(tmp_path, task, score, least):
  config = tiny(tmp_path, task)
  workdir = tmp_path / 'run'
  result = training.train_and_evaluate(config, workdir)
  assert result[score] >= least and result['examples'] == 21
  lines = (workdir / 'predictions.jsonl').read_text().splitlines()
  predictions = [json.loads(line) for line in lines]
  assert [p['id'] for p in predictions] == [f'test{n}' for n in range(21)]
  right = sum(
    p['prediction'] in (p['label'], *np.atleast_1d(p['label']).tolist())
    for p in predictions
  )
  assert right / 21 >= 0.8


def test_goes_on_bit_for_bit(tmp_path):
  """Through batches of two lengths, some rows of the last not filled."""
  config = tiny(tmp_path, 'question_answering', micro_batches=2)
  config['stages'] = (config['stages'][0] | dict(steps=34),)
  config['model'] = MODEL | dict(dropout_rate=0.1)
  config['data']['buckets'] = (32,)
  config['evaluation']['every'] = 20
  whole = training.train_and_evaluate(config, tmp_path / 'whole')
  validated = [
    r
    for r in training.read_metrics(tmp_path / 'whole')
    if 'validation/exact_match' in r
  ]
  assert [r['step'] for r in validated] == [20]
  (tmp_path / 'part' / 'checkpoints').mkdir(parents=True)
  for name in ('checkpoints/20', 'tokenizer'):
    (tmp_path / 'whole' / name).rename(tmp_path / 'part' / name)
  assert training.train_and_evaluate(config, tmp_path / 'part') == whole
  # Evaluated once more, in batches of another size.
  config['evaluation']['batch_size'] = 5
  again = training.evaluate(config, tmp_path / 'part')
  assert again['f1'] == whole['f1']
  assert again['loss'] == pytest.approx(whole['loss'], rel=1e-4)


def test_from_a_pretrained_encoder(tmp_path):
  """All but the head is the folder's; its tokenizer too."""
  config = tiny(tmp_path, 'sequence_classification')
  task = examine(config, tmp_path / 'first')
  (stage,) = make_stages(config['stages'])
  model = task.make_model(stage, nnx.Rngs(1))
  folder = tmp_path / 'folder'
  interop.save_pretrained(model, folder, interop.config_of_longformer(model))
  (tmp_path / 'first' / 'tokenizer' / 'tokenizer.json').rename(
    folder / 'tokenizer.json'
  )
  config = tiny(
    tmp_path, 'question_answering', pretrained=str(folder), pattern=''
  )
  config['model'] = dict(implementation='reference')
  config['stages'][0].pop('windows')
  task = examine(config, tmp_path / 'second')
  (stage,) = make_stages(config['stages'])
  assert task.make_model(stage, nnx.Rngs(0)).patterns == model.patterns
  given = task.pretrained()
  layer = 'layers.0.attention.query.kernel'
  np.testing.assert_array_equal(
    given[layer], model.layers[0].attention.query.kernel[...]
  )
  assert given['head.output.kernel'].shape == (32, 2)


def test_what_is_cut_off_is_not_learned_from(tmp_path):
  config = tiny(tmp_path, 'question_answering')
  context = ' '.join(['house'] * 60 + ['GOLD'])
  far = dict(context=context, answers={'text': ['GOLD']})
  far['answers']['answer_start'] = [context.index('GOLD')]
  config['data']['train'] = write(
    tmp_path / 'far.jsonl', 'question_answering', change=(3, far)
  )
  task = examine(config, tmp_path / 'run')
  encoded = task.encode_split('train', 48)
  assert [e.example.id for e in encoded if not e.learned] == ['far2']
  assert max(e.length for e in encoded) == 48
  # What is left of it is scored all the same.
  outputs = np.zeros(48), np.zeros(48)
  lost = next(e for e in encoded if not e.learned)
  assert task.predict(lost, outputs)['label'] == ['GOLD']


def test_tags_are_those_of_first_tokens(tmp_path):
  task = examine(tiny(tmp_path, 'token_classification'), tmp_path / 'run')
  encoded = task.encode_split('test', 48)[:2]
  batch = task.collate([*encoded, None], 48)
  assert batch['tokens'].shape == batch['labels'].shape == (3, 48)
  assert (batch['tokens'][2] == 1).all() and (batch['labels'][2] == -1).all()
  log_p = np.log(np.full((3, 48, 3), 1 / 3, np.float32))
  losses, weights, _ = task.outputs(lambda tokens, dropout_key: log_p, batch)
  counts = [len(e.example.words) for e in encoded]
  assert weights.sum(axis=1).tolist() == [*counts, 0]
  assert float(losses.sum()) == pytest.approx(sum(counts) * np.log(3))
  # The right tags, found again; what is cut off has the usual one.
  for e, row in zip(encoded, batch['labels'], strict=False):
    found = task.predict(e, row)
    assert found['prediction'] == found['label'] == list(e.example.tags)
    words = list(e.example.words)
    assert task.tokenizer.decode(e.arrays['tokens']) == ' '.join(words)
  cut = task.encode(encoded[0].example, 5)
  assert task.predict(cut, batch['labels'][0])['prediction'][-1] == 'O'
  assert training.default_settings('token_classification').task == (
    'token_classification'
  )


def test_any_right_answer_counts(tmp_path):
  """-log of the probability of all right places together."""
  task = examine(tiny(tmp_path, 'question_answering'), tmp_path / 'run')
  tokens = np.full((2, 8), 1)
  tokens[0, :6] = 7
  spans = np.full((2, 16, 2), -1)
  spans[0, :3] = [[2, 3], [2, 4], [5, 5]]
  logits = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)

  def model(tokens, dropout_key):
    return logits[0], logits[1]

  losses, weights, _ = task.outputs(model, {'tokens': tokens, 'spans': spans})
  assert weights.tolist() == [1.0, 0.0] and losses[1] == 0

  def log_p(z, places):
    p = np.exp(z[:6]) / np.exp(z[:6]).sum()
    return np.log(p[places].sum())

  wanted = -(log_p(logits[0, 0], [2, 5]) + log_p(logits[1, 0], [3, 4, 5])) / 2
  assert losses[0] == pytest.approx(wanted, abs=1e-5)


def test_no_answer(tmp_path):
  config = tiny(tmp_path, 'question_answering')
  none = dict(answers={'text': [], 'answer_start': []})
  config['data']['train'] = write(
    tmp_path / 'none.jsonl', 'question_answering', change=(1, none)
  )
  task = examine(config, tmp_path / 'run')
  encoded = task.encode_split('train', 48)[0]
  assert encoded.learned and encoded.arrays['spans'] == [(0, 0)]
  first = encoded.arrays['context'][0]
  start, end = np.zeros(48), np.zeros(48)
  start[first + 1] = 2.0
  found = task.predict(encoded, (start, end))['prediction']
  assert found and encoded.example.context.count(found)
  start[0] = 3.0
  assert task.predict(encoded, (start, end))['prediction'] == ''


@pytest.mark.parametrize(
  ('task', 'values', 'message'),
  [
    ('sequence_classification', dict(text=''), "line 5: 'text' is empty"),
    ('sequence_classification', dict(label=1.5), "'label' is 1.5, not a str"),
    ('sequence_classification', dict(label=3), 'line 5: the label 3 is a int'),
    (
      'sequence_classification',
      dict(id='train0'),
      "line 5: the id 'train0' is",
    ),
    ('token_classification', dict(tags=['O']), r'words have 1 tags'),
    ('token_classification', dict(tokens='a b'), "line 5: 'tokens' is 'a b'"),
    (
      'question_answering',
      dict(answers={'text': ['x']}),
      "line 5: there is no 'answer_start', only",
    ),
    (
      'question_answering',
      dict(answers={'text': ['GOLD'], 'answer_start': [99]}),
      "line 5: the context has no 'GOLD' at character 99",
    ),
    (
      'question_answering',
      dict(question='why ' * 20),
      'line 5: the question has .* raise config.model.max_globals',
    ),
    ('multiple_choice', dict(label=3), 'line 5: the label 3 is none of 3'),
    ('multiple_choice', dict(choices=['a', 'b'], label=0), 'are 2 choices'),
    (
      'multiple_choice',
      dict(choices=['a ' * 20, 'b', 'c']),
      'line 5: a choice has .* raise config.model.max_globals',
    ),
  ],
)
def test_bad_lines_by_number(tmp_path, task, values, message):
  config = tiny(tmp_path, task, change=(5, values))
  with pytest.raises(ValueError, match=message):
    examine(config, tmp_path / 'run')


def test_a_line_without_an_id_that_is_there_again_is_one_example(tmp_path):
  config = tiny(tmp_path, 'sequence_classification')
  path = tmp_path / 'train.jsonl'
  lines = path.read_text().splitlines()
  again = json.loads(lines[0])
  del again['id']
  path.write_text('\n'.join([*lines, *[json.dumps(again)] * 3]))
  task = examine(config, tmp_path / 'run')
  assert sum(map(len, task.examples.values())) == 120 + 21 + 1
  assert task.description.endswith('; 2 lines that are there twice, once')


def test_other_mistakes(tmp_path):
  task = 'sequence_classification'
  config = tiny(tmp_path, task)
  path = tmp_path / 'train.jsonl'
  whole = path.read_text()
  path.write_text(whole + '{"text": "x", \n')
  with pytest.raises(ValueError, match='train.jsonl line 121 is not JSON'):
    examine(config, tmp_path / 'run')
  path.write_text(whole.replace('"label": "poor"', '"label": "fine"'))
  with pytest.raises(ValueError, match="all labels .* are 'fine': there must"):
    examine(config, tmp_path / 'run')
  path.write_text(whole)
  for change, message in (
    (dict(held_out=(0.0, 0.0)), 'the split validation has no example'),
    (dict(held_out=(0.9, 0.3)), 'must be shares of validation and test'),
    (dict(train=''), 'config.data.train names no file'),
    (dict(fields=dict(text='txt')), "line 1: there is no 'txt', only"),
    (dict(fields=dict(txt='x')), "'txt' in config.data.fields: did you mean"),
  ):
    data = config['data'] | dict(test='') | change
    with pytest.raises(ValueError, match=message):
      examine(config | {'data': data}, tmp_path / 'other')
  for change, message in (
    (dict(vocab_size=100), 'vocab_size=100 must be at least 261'),
    (dict(tokenizer='none.json'), 'none.json does not exist'),
  ):
    data = config['data'] | change
    with pytest.raises((ValueError, OSError), match=message):
      examine(config | {'data': data}, tmp_path / 'other')
  other = write(tmp_path / 'other.jsonl', task, 9, change=(2, {'label': 'odd'}))
  data = config['data'] | dict(test=other)
  with pytest.raises(
    ValueError, match="line 2: the label 'odd' is none of the"
  ):
    examine(config | {'data': data}, tmp_path / 'run')
