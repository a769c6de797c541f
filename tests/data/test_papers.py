import importlib.util
import json
import sys

import pytest
import tensorflow_datasets as tfds

from longjax.data import papers
from longjax.data.papers import Fields, Paper, Sieve

LINE = {
  'article_id': 'a1',
  'article_text': ['one sentence .', 'and another .'],
  'abstract_text': ['<S> short . </S>', '<S> very . </S>'],
}


def write(path, *records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def read(path, fields=None, held_out=(0, 0)):
  return list(papers.local(path, fields or Fields(), held_out).papers())


def test_a_record_of_scientific_papers(tmp_path):
  short = 'short .\nvery .'
  paper = Paper('a1', 'one sentence .\nand another .', short, short)
  assert read(write(tmp_path / 'p', LINE)) == [('train', paper)]


def test_fields_may_be_named(tmp_path):
  record = {
    'id': 'x',
    'body': [['In a', 'b'], [], ['c', '']],
    'human': 'On  Titles.\nIt sums up.',
    'abstract': 'Abstract it is.',
    'title': 'On titles',
  }
  fields = Fields('id', 'body', 'human', 'abstract', 'title')
  ((_, paper),) = read(write(tmp_path / 'p', record), fields)
  assert paper == Paper('x', 'In a\nb\nc', 'It sums up.', 'Abstract it is.')
  record['title'] = 'Another'
  ((_, paper),) = read(write(tmp_path / 'p', record), fields)
  assert paper.summary == 'On  Titles.\nIt sums up.'


def test_splits_follow_from_the_ids_alone():
  ids = [f'paper {i}' for i in range(4000)]
  splits = [papers.split_of(id, (0.1, 0.2)) for id in ids]
  counts = {name: splits.count(name) for name in set(splits)}
  assert counts == pytest.approx(
    {'train': 2800, 'validation': 400, 'test': 800}, rel=0.15
  )
  # Fixed for good: these are in records.
  assert papers.split_of('W03-0419', (0.1, 0.1)) == 'train'
  assert papers.split_of('A00-1031', (0.1, 0.1)) == 'validation'
  assert papers.split_of('P06-1003', (0.1, 0.1)) == 'test'
  assert {papers.split_of(id, (0, 1)) for id in ids} == {'test'}


ARTICLE = 'We propose a method for parsing that is fast and accurate. It works.'


@pytest.mark.parametrize(
  ('paper', 'reason'),
  [
    (Paper('1', 'Another body.', 'A summary.', 'An abstract.'), None),
    (Paper('1', ' \n', 'A', 'A'), 'empty article'),
    (Paper('1', 'A', '-', 'A'), 'empty summary or abstract'),
    (Paper('1', 'A', 'A', ''), 'empty summary or abstract'),
    # Hyphens, cases and line ends are an extraction's noise.
    (
      Paper('1', ARTICLE, 'we propose a me-\nthod for PARSING of x', 'B'),
      'summary or abstract within the article',
    ),
    (
      Paper('1', ARTICLE, 'B', 'We propose a method for parsing, too'),
      'summary or abstract within the article',
    ),
    (Paper('1', ARTICLE, 'We propose a method for text', 'B.C.'), None),
  ],
)
def test_what_is_held_back(paper, reason):
  sieve = Sieve(opening=25)
  kept = [paper for _, paper in sieve([('train', paper)])]
  assert kept == ([] if reason else [paper])
  assert sum(sieve.counts.values()) == len([reason] if reason else [])
  assert reason is None or sieve.counts[reason] == 1


def test_the_same_article_comes_once():
  sieve = Sieve()
  a, b = Paper('1', 'Text.', 'x', 'x'), Paper('2', 'text', 'y', 'y')
  assert list(sieve([('train', a), ('test', b)])) == [('train', a)]
  assert sieve.counts['same article as an earlier paper'] == 1


def test_without_an_opening_nothing_leaks():
  paper = Paper('1', ARTICLE, 'We propose', 'We propose')
  assert list(Sieve(0)([('test', paper)])) == [('test', paper)]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'article_id': ''}, "line 2 has an empty 'article_id'"),
    ({'article_text': 3}, "line 2: 'article_text' is int: a text or lists"),
    ({'abstract_text': ['a', {}]}, "'abstract_text' is dict: a text or lists"),
  ],
)
def test_a_bad_paper_is_named(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    read(write(tmp_path / 'p', LINE, LINE | change))


def test_mistakes_are_named(tmp_path):
  path = write(tmp_path / 'p.jsonl', LINE)
  with pytest.raises(
    ValueError,
    match=r"line 1 has no 'summary' \(the field summary\), but article_id, ar",
  ):
    read(path, Fields(summary='summary'))
  path.write_text(path.read_text() + '{"article_id": ')
  with pytest.raises(ValueError, match='p.jsonl line 2 is not JSON'):
    read(path)
  with pytest.raises(FileNotFoundError, match='no such file: .*absent'):
    papers.local(tmp_path / 'absent', Fields(), (0, 0))
  with pytest.raises(ValueError, match=r'held_out=\(0.6, 0.5\) must be shares'):
    papers.local(path, Fields(), (0.6, 0.5))


def test_the_catalogue_needs_its_extra(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="arxiv and pubmed, not 'arXiv'"):
    papers.catalogue('arXiv')
  if importlib.util.find_spec('tensorflow') is None:
    with pytest.raises(
      ModuleNotFoundError,
      match=r'scientific_papers/arxiv needs tensorflow, .*longjax\[tfds\]',
    ):
      papers.catalogue('arxiv', tmp_path)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(ModuleNotFoundError, match=r'longjax\[data\]'):
    papers.catalogue('pubmed', tmp_path)


def test_the_catalogue_as_tensorflow_datasets_keeps_it(tmp_path, monkeypatch):
  """The catalogue's own builder, but for where its papers come from."""
  counts = {'train': 3, 'validation': 2, 'test': 1}

  def generate(split):
    for i in range(counts[split]):
      yield (
        i,
        {
          'article': f'Body {i} of {split}\nb',
          'abstract': ' <S> s </S>',
          'section_names': 'one',
        },
      )

  monkeypatch.setattr(
    tfds.builder_cls('scientific_papers'),
    '_split_generators',
    lambda self, manager: {name: generate(name) for name in counts},
  )
  tfds.builder(
    'scientific_papers/pubmed', data_dir=tmp_path, file_format='array_record'
  ).download_and_prepare()
  found = list(papers.catalogue('pubmed', tmp_path).papers())
  splits = [split for split, _ in found]
  assert splits == ['train'] * 3 + ['validation'] * 2 + ['test']
  # tensorflow-datasets keeps the papers in an order of its own.
  assert found[3][1].id == 'validation/0'
  assert {paper.article for _, paper in found[:3]} == {
    f'Body {i} of train\nb' for i in range(3)
  }
  assert {paper.summary for _, paper in found} == {'s'}


def test_python_modules():
  source = papers.python_modules((0.1, 0.1))
  found = {paper.id: paper for _, paper in source.papers()}
  assert len(found) > 100
  paper = found['textwrap.py']
  assert paper.summary == 'Text wrapping and filling.'
  assert 'def dedent(' in paper.article
  assert paper.summary not in paper.article


def test_real_papers(shared_data):
  """902 have a body, an abstract and a summary; 142 give theirs away."""
  path = shared_data / 'summarization' / 'scisummnet_acl.jsonl.xz'
  fields = Fields(
    'article_id', 'sections', 'human_summary', 'abstract', 'title'
  )
  sieve = Sieve(100)
  source = papers.local(path, fields, (0.1, 0.1))
  splits = [split for split, _ in sieve(source.papers())]
  assert [splits.count(n) for n in ('train', 'validation', 'test')] == [
    586,
    90,
    84,
  ]
  assert [n for n in sieve.counts.values() if n] == [11, 142]
