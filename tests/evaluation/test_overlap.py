"""Continuations against the true ones."""

import numpy as np
import pytest
from flax import nnx

import longjax
from longjax.evaluation import overlap
from longjax.generation.sample import sample


def test_continuations_are_greedy_samples():
  model = longjax.DecoderLM(
    9, 1, 8, 2, patterns=longjax.Lambda(4, 1), rngs=nnx.Rngs(0)
  )
  tokens = np.random.default_rng(0).integers(0, 9, (2, 20))
  got = overlap.continuations(model, tokens, 12, 5)
  wanted = sample(model, tokens[:, :12], 5, temperature=0)
  np.testing.assert_array_equal(got, wanted)
  for milestone in (0, 16):
    with pytest.raises(ValueError, match=f'milestone {milestone} and 5 tokens'):
      overlap.continuations(model, tokens, milestone, 5)


def test_the_picture(tmp_path):
  row = {'bleu': 12.0, 'rouge_l': 30.0, 'first': 'once'}
  path = tmp_path / 'overlap.png'
  results = {'vanilla': {'512': row, '64': row}, 'LM-Infinite': {'64': row}}
  overlap.draw(results, path)
  assert path.read_bytes().startswith(b'\x89PNG')


def test_scores():
  true = ['a little girl named Lily went to the park', 'the cat sat on the mat']
  same = overlap.scores(true, true)
  assert same['bleu'] == pytest.approx(100)
  assert same['rouge_l'] == pytest.approx(100)
  other = overlap.scores(['x y z w v'] * 2, true)
  assert other['rouge_l'] == 0 and other['bleu'] < 5
  # 6 words, of which 4 in order: precision and recall 2/3.
  part = overlap.scores(['the cat on a soft mat'], ['the cat sat on the mat'])
  assert part['rouge_l'] == pytest.approx(100 * 4 / 6)
  with pytest.raises(ValueError, match='got 2 and 1'):
    overlap.scores(['a'], true)
