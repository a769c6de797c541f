"""The report at the end of a run, and its figures."""

import hashlib
import re

import pytest

from longjax import data, training
from longjax.data import markov
from longjax.training import report as report_lib
from tests.training.helpers import tiny, write_text


def test_report(tmp_path, capsys, monkeypatch):
  pytest.importorskip('matplotlib')
  monkeypatch.setattr(report_lib, 'SLICE', 500)
  text = write_text(tmp_path / 'text.txt')
  config = tiny(text, report=True, sampling=dict(prompt='the ', num_tokens=30))
  config['stages'] = (
    dict(length=32, batch_size=8, steps=30, learning_rate=1e-2, windows=(4, 8)),
  )
  training.train_and_evaluate(config, tmp_path / 'run')
  out = capsys.readouterr().out

  corpus = data.load('text', text)
  tokens = corpus.validation[:500]
  assert hashlib.sha256(bytes(tokens)).hexdigest() in out
  assert 'first 500 characters' in out
  for order in (0, 1, 2):
    bits = markov.bits_per_character(corpus.train, tokens, order)
    assert re.search(rf'order-{order} Markov model +{bits:.3f}', out)
  before, after = (
    float(re.search(rf'model {when} training +(\S+)', out)[1])
    for when in ('before', 'after')
  )
  # An untrained model knows next to nothing: log2(256) = 8 bits.
  assert 7 < before < 9 and after < before - 2
  assert '  | the ' in out
  for name in ('loss.png', 'patterns.png'):
    assert str(tmp_path / 'run' / name) in out
    assert (tmp_path / 'run' / name).stat().st_size > 5000
