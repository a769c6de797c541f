"""The model of operations: against the definition, the paper, the compiler."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import flops as command
from longjax import DecoderLM, Dilated, Full, Lambda, SelfExtend, SlidingWindow
from longjax.evaluation import flops

HEADS = 5


@pytest.mark.parametrize(
  'pattern',
  [
    Full(),
    Full(causal=False),
    SlidingWindow(5, 2, dilation=(1, 2, 3, 1, 2)),
    Lambda(7, 3),
    SelfExtend(window=6, group=2),
    Dilated((6, 16), (1, 4)),
    Dilated((7, 10, 50), (2, 3, 6), causal=False, offsets='torchscale'),
  ],
  ids=str,
)
def test_pairs_are_those_of_the_definition(pattern):
  length = 37
  q, k = np.mgrid[:length, :length]
  expected = tuple(
    int(np.sum(pattern.multiplicity(q, k, head, HEADS)))
    for head in range(HEADS)
  )
  assert flops.visible_pairs(pattern, length, HEADS) == expected


def test_the_papers_figure_6():
  """Read off the figure: all but its scale follows from the model."""
  (first, (measured, _)), *others = command.FIGURE_6.items()
  counted = command.figure_6()
  scale = measured / counted[first]
  assert abs(scale - 1) < 0.01  # 1.57e8 tokens
  for key, (measured, _) in others:
    np.testing.assert_allclose(scale * counted[key], measured, rtol=5e-3)


def test_keys_of_a_query_as_the_paper_counts_them():
  paper = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
  np.testing.assert_allclose(flops.paper_keys(paper, 32768), 4266.67, atol=0.01)
  assert flops.paper_keys(Dilated((2048, 4096), (1, 2)), 1024) == 1024 * 1.25
  assert flops.paper_keys(SlidingWindow(3), 10) is None
  # Where ratios divide, it is what is seen both ways.
  both = Dilated((8, 16), (1, 4), causal=False)
  pairs = sum(flops.visible_pairs(both, 64, 4))
  assert pairs == 4 * 64 * flops.paper_keys(both, 64)


def test_the_compiler_counts_the_same():
  """A model so short that each part of attention is one block: no loop, whose
  body the compiler would count once. It computes whole squares, as the paper
  counts; what it adds are norms, activations, softmaxes."""
  length, sizes = 64, dict(vocab_size=64, features=512, num_heads=4)

  def counted(pattern):
    model = DecoderLM(
      num_layers=2,
      patterns=pattern,
      position=None,
      implementation='xla',
      rngs=nnx.Rngs(0),
      **sizes,
    )
    tokens = np.zeros((1, length), np.int32)
    lowered = jax.jit(model.__call__).lower(tokens)
    found = flops.decoder_flops(length, patterns=[pattern] * 2, **sizes)
    return lowered.cost_analysis()['flops'], found

  pattern = Dilated((64, 64), (1, 2))
  whole, expected = counted(pattern)
  paper = expected.paper_total + expected.read_out
  assert paper < whole < 1.04 * paper
  # What one more part adds is attention alone.
  single, fewer = counted(Dilated((64,), (1,)))
  added = expected.paper_total - fewer.paper_total
  assert added == 2 * 4 * 512 * 64 * 64 / 4
  assert added < whole - single < 1.2 * added


def test_command(capsys):
  command.main(['--config=configs/enwik8_longnet.py', '--length=4096'])
  out = capsys.readouterr().out
  assert 'forward pass over 4,096 tokens' in out

  def triangle(rows):
    return rows * (rows + 1) // 2

  # Two segments of 2048; every second, fourth and sixth row of a part of one.
  # Of 8 heads, two have an offset (4 or 5) with a row fewer.
  pairs = 3 * triangle(2048) + triangle(1024)
  pairs += (6 * triangle(683) + 2 * triangle(682)) / 8
  lines = out.splitlines()
  assert '1-12' in lines[2] and f'{pairs / 4096:,.1f}' in lines[2]
  command.main(['--figure6'])
  assert '(figure: 1.22e+17)' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--config is missing'),
    (['--config=configs/demo.py', '--length=0'], 'must be at least 1, got 0'),
    (['--config=configs/none.py'], 'configs/none.py'),
    (['--config=configs/demo.py:fast'], "'fast' is not one of"),
  ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
  with pytest.raises(SystemExit):
    command.main(arguments)
  assert message in capsys.readouterr().err
