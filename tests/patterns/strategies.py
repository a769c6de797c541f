"""Random patterns, for property tests."""

import math

from hypothesis import strategies as st

from longjax import (
  AttentionSinks,
  BlockwiseCausal,
  Dilated,
  DistanceCeiling,
  FixedSparse,
  Full,
  Lambda,
  SelfExtend,
  SlidingWindow,
)

sides = st.one_of(st.integers(0, 45), st.just(math.inf))


@st.composite
def sliding_windows(draw, num_heads):
  dilation = draw(
    st.one_of(
      st.integers(1, 7),
      st.tuples(*[st.integers(1, 7) for _ in range(num_heads)]),
    )
  )
  return SlidingWindow(draw(sides), draw(sides), dilation)


@st.composite
def dilated(draw):
  lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
  ratios = [draw(st.integers(1, w)) for w in lengths]
  return Dilated(
    tuple(lengths),
    tuple(ratios),
    causal=draw(st.booleans()),
    offsets=draw(st.sampled_from(['paper', 'torchscale'])),
    detach_weights=draw(st.booleans()),
  )


@st.composite
def fixed_sparse(draw):
  block = draw(st.integers(1, 20))
  return FixedSparse(block, draw(st.integers(1, block)))


def patterns(num_heads: int):
  """Any pattern that can serve `num_heads` heads."""
  whole = _patterns(num_heads)
  causal = whole.filter(lambda pattern: pattern.causal)
  blocks = st.integers(1, 45)
  return st.one_of(whole, st.builds(BlockwiseCausal, blocks, causal))


def _patterns(num_heads):
  small = st.integers(1, 45)
  return st.one_of(
    sliding_windows(num_heads),
    dilated(),
    st.builds(Lambda, small, st.integers(0, 45), st.booleans()),
    st.builds(DistanceCeiling, small),
    st.builds(AttentionSinks, small, st.integers(0, 45)),
    st.builds(SelfExtend, small, st.integers(1, 9)),
    st.builds(Full, st.booleans()),
    fixed_sparse(),
  )
