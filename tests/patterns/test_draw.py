"""The pictures of patterns show the multiplicity, cell by cell."""

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest

import longjax
from longjax.patterns import draw


@pytest.fixture(autouse=True)
def _close_figures():
  yield
  plt.close('all')


def multiplicity(pattern, length, head=0, num_heads=1):
  position = np.arange(length)
  counts = pattern.multiplicity(
    position[:, None], position[None, :], head, num_heads
  )
  return np.broadcast_to(counts, (length, length))


def drawn_colors(ax):
  """The colour at the centre of every cell, read back from the pixels."""
  figure = ax.figure
  figure.set_dpi(200)
  figure.canvas.draw()
  pixels = np.asarray(figure.canvas.buffer_rgba())
  length = len(ax.images[0].get_array())
  q, k = np.mgrid[:length, :length]
  # A little off the centre, where a distance may be written.
  points = np.stack([k.ravel() + 0.35, q.ravel() + 0.35], axis=-1)
  x, y = ax.transData.transform(points).T.astype(int)
  return pixels[len(pixels) - 1 - y, x, :3].reshape(length, length, 3)


def ramp_index(colors, palette):
  """Where in `palette` each colour is, -1 where it is not."""
  rgb = [matplotlib.colors.to_rgb(color) for color in palette]
  palette = np.round(np.array(rgb) * 255).astype(int)
  same = (np.abs(colors[..., None, :].astype(int) - palette) <= 1).all(-1)
  return np.where(same.any(-1), same.argmax(-1), -1)


@pytest.mark.parametrize(
  'pattern, num_heads, head',
  [
    (longjax.SlidingWindow(3, 2), 1, 0),
    (longjax.SlidingWindow(3, 0, dilation=(1, 2)), 2, 1),
    (longjax.Dilated((4, 8, 16), (1, 2, 4)), 4, 1),
    (longjax.Full(), 1, 0),
    (longjax.Full(causal=False), 1, 0),
    (longjax.Lambda(4, 2), 1, 0),
    (longjax.SelfExtend(6, 3), 1, 0),
  ],
  ids=repr,
)
def test_pixels_show_the_multiplicity_and_the_distance(
  pattern, num_heads, head
):
  length = 16
  ax = draw.draw(pattern, length, num_heads=num_heads, head=head)
  expected = multiplicity(pattern, length, head, num_heads)
  np.testing.assert_array_equal(ax.images[0].get_array(), expected)

  colors = drawn_colors(ax)
  blue = ramp_index(colors, (draw._UNSEEN, *draw._BLUES))
  orange = ramp_index(colors, draw._ORANGES)
  q, k = np.mgrid[:length, :length]
  special = (expected > 0) & (pattern.distance(q, k) != q - k)
  np.testing.assert_array_equal(blue, np.where(special, -1, expected))
  np.testing.assert_array_equal(orange, np.where(special, expected - 1, -1))
  written = {
    (round(text.get_position()[1]), round(text.get_position()[0])): int(
      text.get_text()
    )
    for text in ax.texts
  }
  told = pattern.distance(q, k)
  assert written == {tuple(c): told[tuple(c)] for c in np.argwhere(special)}


def test_union_of_longnets_figure_2():
  counts = np.asarray(
    draw.draw(longjax.Dilated((4, 8, 16), (1, 2, 4)), 16).images[0].get_array()
  )
  local = np.arange(16)[:, None] // 4 == np.arange(16) // 4
  far = {q: set(np.flatnonzero((counts[q] > 0) & ~local[q])) for q in range(16)}
  expected = {4: {0, 2}, 6: {0, 2}, 8: {0, 4}, 12: {0, 4, 8, 10}, 14: {8, 10}}
  assert far == {q: expected.get(q, set()) for q in range(16)}
  # The heads' common row 0 of all three parts is counted three times.
  assert counts[0, 0] == 3


@pytest.mark.parametrize('right', [0, 2])
def test_global_keys(right):
  pattern = longjax.SlidingWindow(3, right)
  global_tokens = [0, 9, 9]
  ax = draw.draw(pattern, 14, global_tokens=global_tokens)
  window = multiplicity(pattern, 14)
  q, k = np.mgrid[:14, :14]
  is_key = np.isin(k, global_tokens) & ((k <= q) if right == 0 else True)
  np.testing.assert_array_equal(
    ax.images[0].get_array(), np.maximum(window, is_key)
  )
  green = ramp_index(drawn_colors(ax), draw._GREENS[:1]) == 0
  np.testing.assert_array_equal(green, is_key & (window == 0))


def test_labels_title_legend_and_given_axes():
  _, ax = plt.subplots()
  pattern = longjax.Lambda(4, 2)
  assert pattern.draw(12, ax=ax) is ax
  assert ax.get_title() == repr(pattern)
  assert ax.get_xlabel() == 'key position'
  assert ax.get_ylabel() == 'query position'
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ['not seen', 'seen', draw._LABEL_CAPPED]
  assert draw.draw(pattern, 12, title='two starts').get_title() == 'two starts'


def test_heads_that_look_alike_share_a_panel():
  pattern = longjax.SlidingWindow(4, 0, dilation=(1, 2, 2, 1))
  figure = draw.draw_heads(pattern, 24, 4)
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ['heads 0, 3', 'heads 1-2']
  for ax, head in zip(figure.axes, (0, 1), strict=True):
    np.testing.assert_array_equal(
      ax.images[0].get_array(), multiplicity(pattern, 24, head, 4)
    )


def test_layers_of_a_model_in_one_picture():
  small, large = longjax.SlidingWindow(2), longjax.SlidingWindow(8)
  mixed = longjax.SlidingWindow(4, 0, dilation=(1, 2))
  figure = draw.draw_layers(
    [small, small, large, mixed, small], 32, num_heads=2
  )
  panels = [ax for ax in figure.axes if ax.images]
  names = [ax.get_title().split('\n')[0] for ax in panels]
  assert names == [
    'layers 0-1',
    'layer 2',
    'layer 3, head 0',
    'layer 3, head 1',
    'layer 4',
  ]
  expected = [(small, 0), (large, 0), (mixed, 0), (mixed, 1), (small, 0)]
  for ax, (pattern, head) in zip(panels, expected, strict=True):
    np.testing.assert_array_equal(
      ax.images[0].get_array(), multiplicity(pattern, 32, head, 2)
    )


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'length': 0}, 'length 0 .* 1 ... 4096'),
    ({'length': 5000}, 'length 5000 .* 1 ... 4096'),
    ({'length': 8, 'head': 2, 'num_heads': 2}, 'head 2 .* 2 heads'),
    ({'length': 8, 'global_tokens': [3, 8]}, 'global position 8 .* 0 ... 7'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    draw.draw(longjax.SlidingWindow(2), **arguments)


def test_no_layers():
  with pytest.raises(ValueError, match='one per layer'):
    draw.draw_layers([], 8)
