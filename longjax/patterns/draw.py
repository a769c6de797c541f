"""Pictures of patterns: who sees whom, cell by cell.

Everything drawn here comes from `pattern.multiplicity` and
`pattern.distance`, the definitions, and not from the branches that compute
them, so a picture shows what a pattern means on the smallest scale.
matplotlib is imported only when something is drawn.
"""

import textwrap
from collections.abc import Sequence

import numpy as np

# A picture is a dense length x length matrix: beyond this nothing is legible.
MAX_LENGTH = 4096

# One ramp per kind of cell; the shade is the multiplicity 1, 2, 3, 4 or more.
_UNSEEN = '#f7f7f5'
_BLUES = ('#5b8fd0', '#234f96', '#0d2554', '#050d24')  # true distance
_ORANGES = ('#f0a04b', '#c2641a', '#8a3d08', '#4f2002')  # another distance
_GREENS = ('#57b894',) * 4  # seen only because the key is global
_MAX_SHADE = len(_BLUES)
_LABEL_TRUE = 'seen'
_LABEL_CAPPED = 'seen, at a capped or grouped distance'
_LABEL_GLOBAL = 'global key'

# Up to these lengths, cells are outlined, and distances written into them.
_GRID_LENGTH = 64
_NUMBERS_LENGTH = 20


def draw(
  pattern,
  length,
  *,
  num_heads=1,
  head=0,
  global_tokens=(),
  ax=None,
  title=None,
):
  """Draws which keys each query of one head sees, and how often.

  Queries run down, keys run across. Blue cells are seen at their true
  distance, orange ones at a distance the pattern caps or groups (up to 20
  positions the distance itself is written in the cell); darker is seen more
  than once. Green cells are seen only because their key is global.

  Args:
    pattern: a pattern, such as `longjax.SlidingWindow(4)`.
    length: number of positions; queries and keys are 0 ... length - 1.
    num_heads: number of query heads of the layer.
    head: which of them to draw.
    global_tokens: positions of global keys, as in `longjax.attention`.
    ax: matplotlib Axes to draw on; by default those of a new figure.
    title: title of the picture; by default the pattern's repr.

  Returns:
    The matplotlib Axes. The array of its first image is the multiplicity,
    Int[length, length]; the later images colour orange and green cells.

  Raises:
    ValueError: length outside 1 ... 4096, no such head, or a global position
      outside the sequence.
  """
  counts, special, is_global = _cells(
    pattern, length, num_heads, head, global_tokens
  )
  if ax is None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(5, 5), layout='constrained')
  _draw_cells(ax, counts, special, is_global)
  if length <= _NUMBERS_LENGTH:
    _write_distances(ax, pattern, counts, special)
  title = repr(pattern) if title is None else title
  ax.set_title(textwrap.fill(title, 56), fontsize=9)
  ax.set_xlabel('key position')
  ax.set_ylabel('query position')
  ax.legend(
    handles=_legend_handles([(counts, special, is_global)]),
    loc='upper center',
    bbox_to_anchor=(0.5, -0.14),
    ncols=2,
    fontsize=8,
    frameon=False,
  )
  return ax


def draw_heads(pattern, length, num_heads, *, title=None):
  """Draws the distinct heads of one layer side by side.

  Heads that see the same keys share a panel, named in its title.

  Args:
    pattern: a pattern.
    length: number of positions.
    num_heads: number of query heads of the layer.
    title: title above the panels; by default the pattern's repr.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: as `draw`.
  """
  panels = [
    (_name_range('head', heads), cells)
    for heads, cells in _distinct_heads(pattern, length, num_heads)
  ]
  return _draw_panels(panels, repr(pattern) if title is None else title)


def draw_layers(patterns, length, *, num_heads=1, title=None):
  """Draws the patterns of a whole model in one picture.

  Neighbouring layers of the same pattern share a panel, and so do heads that
  see the same keys.

  Args:
    patterns: the pattern of each layer, from the bottom.
    length: number of positions.
    num_heads: number of query heads of each layer.
    title: title above the panels; none by default.

  Returns:
    A matplotlib Figure.

  Raises:
    ValueError: no patterns, or as `draw`.
  """
  patterns = list(patterns)
  if not patterns:
    raise ValueError('draw_layers got no patterns; give one per layer')
  panels = []
  first = 0
  for last, pattern in enumerate(patterns):
    if last + 1 < len(patterns) and patterns[last + 1] == pattern:
      continue
    layers = _name_range('layer', range(first, last + 1))
    groups = _distinct_heads(pattern, length, num_heads)
    for heads, cells in groups:
      name = layers
      if len(groups) > 1:
        name = f'{layers}, {_name_range("head", heads)}'
      panels.append((f'{name}\n{pattern!r}', cells))
    first = last + 1
  return _draw_panels(panels, title)


def _cells(pattern, length, num_heads, head, global_tokens=()):
  """Returns the multiplicity and two masks, each [length, length].

  The masks say which cells are seen at a distance that is not the true one,
  and which only because their key is global.
  """
  if not 1 <= length <= MAX_LENGTH:
    raise ValueError(
      f'length {length} cannot be drawn; allowed is 1 ... {MAX_LENGTH}'
    )
  if not 0 <= head < num_heads:
    raise ValueError(f'head {head} is not one of the {num_heads} heads')
  global_tokens = np.asarray(global_tokens, np.int64).reshape(-1)
  outside = global_tokens[(global_tokens < 0) | (global_tokens >= length)]
  if outside.size:
    raise ValueError(
      f'global position {outside[0]} is outside 0 ... {length - 1}'
    )
  positions = np.arange(length)
  q_pos, k_pos = positions[:, None], positions[None, :]
  shape = (length, length)
  counts = np.broadcast_to(
    np.asarray(pattern.multiplicity(q_pos, k_pos, head, num_heads)), shape
  ).astype(int)
  distance = np.broadcast_to(np.asarray(pattern.distance(q_pos, k_pos)), shape)
  visible = np.isin(k_pos, global_tokens) & (
    (k_pos <= q_pos) if pattern.causal else True
  )
  is_global = np.broadcast_to(visible, shape) & (counts == 0)
  special = (counts > 0) & (distance != q_pos - k_pos)
  return np.maximum(counts, is_global), special, is_global


def _draw_cells(ax, counts, special, is_global):
  """Colours the cells; the first image holds the multiplicity."""
  from matplotlib import colors

  def image(values, palette, least):
    # Shades are chosen before any resampling, so that a long sequence in few
    # pixels shows mixed shades instead of a moire of dropped rows.
    ax.imshow(
      values,
      cmap=colors.ListedColormap(palette),
      norm=colors.BoundaryNorm(
        np.arange(least, _MAX_SHADE + 2) - 0.5, len(palette), clip=True
      ),
      interpolation_stage='rgba',
      aspect='equal',
    )

  image(counts, (_UNSEEN, *_BLUES), 0)
  for mask, palette in ((special, _ORANGES), (is_global, _GREENS)):
    if mask.any():
      image(np.ma.masked_array(counts, ~mask), palette, 1)

  length = len(counts)
  ticks = np.arange(0, length, max(1, -(-length // 8)))
  ax.set_xticks(ticks)
  ax.set_yticks(ticks)
  ax.tick_params(labelsize=8, length=2)
  if length <= _GRID_LENGTH:
    edges = np.arange(-0.5, length)
    ax.set_xticks(edges, minor=True)
    ax.set_yticks(edges, minor=True)
    ax.grid(which='minor', color='#dcdcd8', linewidth=0.4)
    ax.tick_params(which='minor', length=0)


def _write_distances(ax, pattern, counts, special):
  for q, k in np.argwhere(special):
    ax.text(
      k,
      q,
      int(np.asarray(pattern.distance(np.asarray(q), np.asarray(k)))),
      ha='center',
      va='center',
      fontsize=7,
      color='black' if counts[q, k] == 1 else 'white',
    )


def _legend_handles(panels):
  """One handle for each kind and shade of cell that occurs in the panels."""
  from matplotlib import patches

  found = set()
  for counts, special, is_global in panels:
    shades = np.minimum(counts, _MAX_SHADE)
    found |= {(0, n) for n in np.unique(shades[~special & ~is_global])}
    found |= {(1, n) for n in np.unique(shades[special])}
    found |= {(2, 1)} if is_global.any() else set()
  handles = []
  for kind, shade in sorted(found):
    if shade == 0:
      color, label = _UNSEEN, 'not seen'
    else:
      color = (_BLUES, _ORANGES, _GREENS)[kind][shade - 1]
      label = (_LABEL_TRUE, _LABEL_CAPPED, _LABEL_GLOBAL)[kind]
      if shade == _MAX_SHADE:
        label += f' {shade} times or more'
      elif shade > 1:
        label += f' {shade} times'
    handles.append(
      patches.Patch(facecolor=color, edgecolor='#999', label=label)
    )
  return handles


def _distinct_heads(pattern, length, num_heads):
  """Returns [(heads, cells)], one entry for all heads that look the same."""
  groups = []
  for head in range(num_heads):
    cells = _cells(pattern, length, num_heads, head)
    for heads, known in groups:
      if np.array_equal(known[0], cells[0]):
        heads.append(head)
        break
    else:
      groups.append(([head], cells))
  return groups


def _name_range(noun: str, numbers: Sequence[int]) -> str:
  """'head 3', 'heads 0-3' or 'heads 0, 2, 4'."""
  numbers = list(numbers)
  if len(numbers) == 1:
    return f'{noun} {numbers[0]}'
  if numbers == list(range(numbers[0], numbers[-1] + 1)):
    return f'{noun}s {numbers[0]}-{numbers[-1]}'
  return f'{noun}s {", ".join(map(str, numbers))}'


def _draw_panels(panels, title):
  """Draws (title, cells) panels, at most four in a row, with one legend."""
  import matplotlib.pyplot as plt

  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(max(2.7 * columns, 4), 2.9 * rows + 0.7),
    squeeze=False,
    layout='constrained',
  )
  for ax in axes.flat[len(panels) :]:
    ax.set_axis_off()
  for index, (name, cells) in enumerate(panels):
    ax = axes.flat[index]
    _draw_cells(ax, *cells)
    lines = [textwrap.fill(line, 38) for line in name.split('\n')]
    ax.set_title('\n'.join(lines), fontsize=7.5)
    if index % columns == 0:
      ax.set_ylabel('query position', fontsize=8)
    if index + columns >= len(panels):
      ax.set_xlabel('key position', fontsize=8)
  if title is not None:
    figure.suptitle(textwrap.fill(title, 30 * columns), fontsize=10)
  figure.legend(
    handles=_legend_handles([cells for _, cells in panels]),
    loc='outside lower center',
    ncols=min(columns, 3),
    fontsize=8,
    frameon=False,
  )
  return figure
