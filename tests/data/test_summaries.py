import itertools
import json

import numpy as np
import pytest

from longjax.data import papers, ragged, summaries
from longjax.data.papers import Fields


def write(path, count=60, **changes):
  records = [
    {
      'article_id': f'p{i}',
      'article_text': [f'body {i}', 'b' * (i % 7)],
      'abstract_text': [f'summary {i}'],
      **changes,
    }
    for i in range(count)
  ]
  path.write_text('\n'.join(json.dumps(record) for record in records))
  return papers.local(path, Fields(), (0.2, 0.2))


def encode(texts):
  return [list(text.encode()) for text in texts]


def prepare(folder, source, **changes):
  options = dict(opening=0, encode=encode, vocab_size=256, tokenizer='bytes')
  return summaries.prepare(folder, source, **options | changes)


def test_every_paper_is_tokenized_into_its_split(tmp_path):
  source = write(tmp_path / 'p.jsonl')
  prepared = prepare(tmp_path / 'out', source)
  wanted = {}
  for split, paper in source.papers():
    wanted.setdefault(split, []).append(paper)
  for split, mine in wanted.items():
    found = getattr(prepared, split)
    assert len(found) == len(mine) == prepared.about['papers'][split]
    for i, paper in enumerate(mine):
      assert bytes(found.article[i]).decode() == paper.article
      assert bytes(found.summary[i]).decode() == paper.summary
    assert found.article.lengths.tolist() == [len(p.article) for p in mine]
  texts = prepared.texts('test')
  assert texts == [
    {'id': p.id, 'article': p.article, 'summary': p.summary}
    for p in wanted['test']
  ]


def test_it_is_done_once(tmp_path):
  source = write(tmp_path / 'p.jsonl')
  first = prepare(tmp_path / 'out', source)
  again = prepare(tmp_path / 'out', source, encode=None)
  assert again.about == first.about
  for changes, name in (
    (dict(opening=9), 'opening'),
    (dict(tokenizer='other'), 'tokenizer'),
  ):
    with pytest.raises(ValueError, match=f'was prepared with {name}='):
      prepare(tmp_path / 'out', source, **changes)
  other = write(tmp_path / 'q.jsonl', count=59)
  with pytest.raises(ValueError, match='was prepared with sha256='):
    prepare(tmp_path / 'out', other)


def test_half_a_folder_is_none(tmp_path):
  source = write(tmp_path / 'p.jsonl')
  calls = itertools.count()

  def fails(texts):
    if next(calls):
      raise KeyboardInterrupt
    return encode(texts)

  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / 'out', source, encode=fails)
  assert len(prepare(tmp_path / 'out', source).train)


def test_what_is_left_out_is_said(tmp_path):
  source = write(tmp_path / 'p.jsonl', abstract_text=[' '])
  said = prepare(tmp_path / 'out', source).describe()
  assert said.endswith(
    '0 train, 0 validation, 0 test; left out: 60 empty summary or abstract'
  )
  with pytest.raises(ValueError, match='no papers are left for train'):
    prepare(tmp_path / 'new', source, needed=('train',))


def test_training_texts_are_the_training_splits(tmp_path):
  source = write(tmp_path / 'p.jsonl')
  texts = list(summaries.training_texts(source, 0))
  train = [paper for split, paper in source.papers() if split == 'train']
  assert texts == [x for paper in train for x in (paper.article, paper.summary)]


def test_ragged_sequences_come_back(tmp_path):
  rows = [[1, 2, 3], [], [70000]]
  with ragged.RaggedWriter(tmp_path / 'r', np.uint32) as writer:
    for row in rows:
      writer.append(row)
  found = ragged.Ragged(tmp_path / 'r', np.uint32)
  assert [row.tolist() for row in found] == rows
  assert found[2].dtype == np.uint32
  with pytest.raises(IndexError, match='no sequence 3 among 3'):
    found[3]
  with pytest.raises(ValueError, match='has 16 bytes in place of 8'):
    ragged.Ragged(tmp_path / 'r', np.uint16)


def test_no_sequences_at_all(tmp_path):
  with ragged.RaggedWriter(tmp_path / 'r', np.uint8):
    pass
  assert list(ragged.Ragged(tmp_path / 'r', np.uint8)) == []
