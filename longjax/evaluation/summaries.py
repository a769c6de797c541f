"""What a model's summaries are worth, beside those that need no model.

predictions.jsonl       each paper's summaries beside its reference
summaries.json          every system's scores, with intervals, for notebooks
rouge_by_length.png     ROUGE over how much of the paper was read
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from longjax.evaluation import rouge

# Sentences of the baselines, and the labels of systems.
SENTENCES = 3
OWN, ANOTHER = 'model', "model, another paper's text"
LEAD, RANDOM = f'lead-{SENTENCES}', f'random-{SENTENCES}'


@dataclasses.dataclass(frozen=True)
class Written:
  """What a model wrote of some papers.

  Attributes:
    predictions: a summary for each.
    loss: nats for each token of the references, teacher forced.
  """

  predictions: Sequence[str]
  loss: float


@dataclasses.dataclass(frozen=True)
class Outputs:
  """All that a model wrote of a set of papers.

  Attributes:
    description: of the set.
    papers: {'id', 'article', 'summary'} of each.
    own: by how many tokens of the paper the model read.
    others: paper i was given the text of paper others[i]; None: not done.
    another: what the model then wrote, at the greatest length.
  """

  description: str
  papers: Sequence[Mapping[str, str]]
  own: Mapping[int, Written]
  others: np.ndarray | None = None
  another: Written | None = None


def score(sets: Mapping[str, Outputs], *, seed: int = 0) -> dict:
  """Scores sets of papers.

  Args:
    sets: by name.
    seed: of intervals and random sentences.

  Returns:
    {set: {'papers', 'systems', 'differences'}}; a system is {'system',
    'input_tokens', 'loss', 'rouge1': {'mean', 'low', 'high'}, ...}, a
    difference the mean over papers of the model's score less another system's.
  """
  return {
    name: _summarize(outputs, _systems(outputs, seed), seed)
    for name, outputs in sets.items()
  }


def report(
  sets: Mapping[str, Outputs],
  folder: pathlib.Path,
  *,
  seed: int = 0,
  about: Mapping | None = None,
) -> dict:
  """`score`, and the files above in a folder.

  Args:
    sets, seed: as of `score`; the picture is of the first set.
    folder: of the files.
    about: what else summaries.json should say, such as how was decoded.

  Returns:
    What `score` does. summaries.json has each paper's scores as well.
  """
  results, details, lines = {}, {}, []
  for name, outputs in sets.items():
    systems = _systems(outputs, seed)
    results[name] = result = _summarize(outputs, systems, seed)
    lines += _lines(name, outputs, systems)
    scores = [
      {kind: values.tolist() for kind, values in of_papers.items()}
      for of_papers in systems.values()
    ]
    details[name] = result | {
      'ids': [paper['id'] for paper in outputs.papers],
      'systems': [
        row | {'scores': of_papers}
        for row, of_papers in zip(result['systems'], scores, strict=True)
      ],
    }
  (folder / 'predictions.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  record = {
    **(about or {}),
    'intervals': {
      'confidence': 0.95,
      'method': 'percentile bootstrap over papers',
      'resamples': rouge.RESAMPLES,
      'seed': seed,
    },
    'sets': details,
  }
  (folder / 'summaries.json').write_text(json.dumps(record, indent=1) + '\n')
  name = next(iter(sets))
  _draw(name, results[name], folder / 'rouge_by_length.png')
  return results


def _systems(outputs: Outputs, seed: int) -> dict:
  """{(system, tokens read): scores of each paper}, the model's first."""
  papers = outputs.papers
  references = [paper['summary'] for paper in papers]
  texts = {
    (OWN, length): outputs.own[length].predictions
    for length in sorted(outputs.own)
  }
  if outputs.another is not None:
    texts[ANOTHER, max(outputs.own)] = outputs.another.predictions
  texts[LEAD, None] = [rouge.lead(p['article'], SENTENCES) for p in papers]
  texts[RANDOM, None] = [
    rouge.random_sentences(p['article'], SENTENCES, (seed, number))
    for number, p in enumerate(papers)
  ]
  return {key: rouge.scores(got, references) for key, got in texts.items()}


def _summarize(outputs: Outputs, systems: Mapping, seed: int) -> dict:
  rows = []
  for (system, length), scores in systems.items():
    loss = None
    if system == OWN:
      loss = outputs.own[length].loss
    elif system == ANOTHER:
      loss = outputs.another.loss
    rows.append(
      {
        'system': system,
        'input_tokens': length,
        'loss': loss,
        **rouge.intervals(scores, seed=seed),
      }
    )
  longest = max(outputs.own)
  own = systems[OWN, longest]
  differences = [
    {
      'less': system,
      'input_tokens': length,
      **rouge.intervals(
        {kind: own[kind] - scores[kind] for kind in own}, seed=seed
      ),
    }
    for (system, length), scores in systems.items()
    if (system, length) != (OWN, longest)
  ]
  return {
    'description': outputs.description,
    'papers': len(outputs.papers),
    'systems': rows,
    'differences': differences,
  }


def _lines(name: str, outputs: Outputs, systems: Mapping):
  longest = max(outputs.own)
  for number, paper in enumerate(outputs.papers):
    line = {
      'set': name,
      'id': paper['id'],
      'reference': paper['summary'],
      'predictions': {
        str(length): written.predictions[number]
        for length, written in outputs.own.items()
      },
      'rouge': {
        kind: round(float(values[number]), 3)
        for kind, values in systems[OWN, longest].items()
      },
    }
    if outputs.another is not None:
      line['another'] = {
        'id': outputs.papers[outputs.others[number]]['id'],
        'prediction': outputs.another.predictions[number],
      }
    yield line


def _draw(name: str, result: Mapping, path: pathlib.Path) -> None:
  curve, levels = {}, {}
  for row in result['systems']:
    values = {kind: rouge.Interval(**row[kind]) for kind in rouge.KINDS}
    if row['system'] == OWN:
      curve[row['input_tokens']] = values
    else:
      levels[row['system']] = values
  title = f'{name}: {result["papers"]} papers, 95% intervals'
  rouge.draw({OWN: curve}, levels, path, title=title)


def table(results: Mapping[str, Mapping]) -> str:
  """What `report` returns as lines for a person to read."""
  lines, width = [], len(ANOTHER) + len(', 16,384 tokens')
  for name, result in results.items():
    lines.append(f'{name}, {result["papers"]} papers: {result["description"]}')
    lines.append(
      f'  {"":{width}}{"loss":>7}' + ''.join(f'{k:>22}' for k in _SHOWN)
    )
    for row in result['systems']:
      tokens = row['input_tokens']
      length = f', {tokens:,} tokens' if tokens else ''
      loss = '' if row['loss'] is None else f'{row["loss"]:.3f}'
      scores = (f'{rouge.Interval(**row[k])!s:>22}' for k in _SHOWN)
      lines.append(
        f'  {row["system"] + length:{width}}{loss:>7}' + ''.join(scores)
      )
  return '\n'.join(lines)


_SHOWN = ('rouge1', 'rouge2', 'rougeL')
