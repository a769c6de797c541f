import json

import numpy as np
import pytest

from longjax.evaluation import rouge, summaries
from longjax.evaluation.summaries import Outputs, Written

WORDS = np.random.default_rng(0).permutation(
  [a + b + c for a in 'bdfg' for b in 'aeiou' for c in 'klmn']
)


def paper(i):
  article = ' '.join(
    f'The {a} is {b}.' for a, b in WORDS[i * 10 : i * 10 + 10].reshape(5, 2)
  )
  return {'id': f'p{i}', 'article': article, 'summary': rouge.lead(article, 2)}


PAPERS = [paper(i) for i in range(6)]


@pytest.fixture
def outputs():
  """A model that writes a paper's summary, whichever paper it is given."""
  others = rouge.derangement(len(PAPERS))
  references = [p['summary'] for p in PAPERS]
  return Outputs(
    'made up',
    PAPERS,
    {
      64: Written([text.split('\n')[0] for text in references], 2.0),
      128: Written(references, 1.0),
    },
    others,
    Written([references[i] for i in others], 9.0),
  )


def test_every_system_is_scored(outputs, tmp_path):
  found = summaries.report(
    {'test': outputs}, tmp_path, seed=3, about={'decoding': {'num_beams': 4}}
  )['test']
  rows = {(r['system'], r['input_tokens']): r for r in found['systems']}
  assert list(rows) == [
    ('model', 64),
    ('model', 128),
    ("model, another paper's text", 128),
    ('lead-3', None),
    ('random-3', None),
  ]
  assert rows['model', 128]['rouge1'] == dict(mean=100, low=100, high=100)
  assert rows['model', 128]['loss'] == 1.0
  assert rows['lead-3', None]['loss'] is None
  lead = rows['lead-3', None]['rouge1']
  # Twelve of the lead's words are in the reference of eight.
  assert lead['mean'] == pytest.approx(100 * 2 * 8 / (8 + 12))
  assert rows['random-3', None]['rouge2']['mean'] < lead['mean']
  falls = {r['less']: r['rouge2'] for r in found['differences']}
  assert falls["model, another paper's text"]['low'] > 50
  # What is said of another paper shares "the ... is ..." and no more.
  another = rows["model, another paper's text", 128]
  assert another['loss'] == 9.0 and another['rouge2']['mean'] < 30


def test_the_files(outputs, tmp_path):
  alone = Outputs('one paper', PAPERS[:1], {128: Written(['The x.'], 3.0)})
  found = summaries.report({'test': outputs, 'alone': alone}, tmp_path)
  lines = [
    json.loads(line)
    for line in (tmp_path / 'predictions.jsonl').read_text().splitlines()
  ]
  assert [line['set'] for line in lines] == ['test'] * 6 + ['alone']
  first = lines[0]
  assert first['id'] == 'p0' and first['reference'] == PAPERS[0]['summary']
  assert first['predictions']['128'] == PAPERS[0]['summary']
  assert first['rouge']['rouge1'] == 100
  other = first['another']
  assert other['id'] != 'p0'
  assert other['prediction'] == PAPERS[int(other['id'][1])]['summary']
  assert 'another' not in lines[-1]
  assert summaries.score({'test': outputs, 'alone': alone}) == found
  record = json.loads((tmp_path / 'summaries.json').read_text())
  assert record['intervals']['resamples'] == 1000
  for name, result in record['sets'].items():
    for row, short in zip(
      result['systems'], found[name]['systems'], strict=True
    ):
      mean = np.mean(row['scores']['rougeL'])
      assert mean == pytest.approx(row['rougeL']['mean'])
      assert len(result['ids']) == result['papers']
      assert {k: row[k] for k in short} == short
  assert (tmp_path / 'rouge_by_length.png').stat().st_size > 10_000
  text = summaries.table(found)
  assert 'model, 128 tokens' in text and '100.00 [100.00, 100.00]' in text
