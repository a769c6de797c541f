"""How much memory a traced program needs at once, without compiling it.

The program's operations are gone through in order. A result is held in memory
from where it is made to where it is used for the last time, with the rules that
XLA follows on all platforms:

- what is elementwise, or only moves or repeats numbers, is computed where it is
  needed (fused) and takes no memory unless the program returns it;
- products, loops, sorts, gathers, concatenations and sums are kept, and so is
  what a fused result is made of, until the last use of anything fused from it;
- a loop needs what its body needs, once, and its results;
- a result that is no product takes the place of an argument of the same size
  that is not used afterwards.
"""

import math

import jax
import numpy as np
from jax.extend import core

# Results that are their argument, or are read from it in another order.
VIEWS = {
  'copy', 'copy_p', 'expand_dims', 'name', 'optimization_barrier', 'pvary',
  'random_unwrap', 'random_wrap', 'reshape', 'squeeze', 'stop_gradient',
  'transpose',
}  # fmt: skip
# Results that are computed where they are used, ...
FUSED = VIEWS | {
  'abs', 'add', 'add_any', 'and', 'atan2', 'bitcast_convert_type',
  'broadcast_in_dim', 'cbrt', 'ceil', 'clamp',
  'convert_element_type', 'cos', 'div', 'dynamic_slice', 'eq', 'erf', 'erf_inv',
  'erfc', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'iota',
  'is_finite', 'le', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul',
  'ne', 'neg', 'not', 'one_minus_square', 'or', 'pad', 'pow', 'random_bits',
  'random_fold_in', 'random_seed', 'random_split', 'real', 'rem', 'rev',
  'round', 'rsqrt', 'select_n', 'shift_left', 'shift_right_arithmetic',
  'shift_right_logical', 'sign', 'sin', 'slice', 'split', 'sqrt', 'square',
  'sub', 'tan', 'tanh', 'threefry2x32', 'unstack', 'xor',
}  # fmt: skip
# ... if that is not much work, ...
EXPENSIVE = {
  'atan2', 'cbrt', 'cos', 'div', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2',
  'expm1', 'log', 'log1p', 'logistic', 'pow', 'random_bits', 'rem', 'rsqrt',
  'sin', 'sqrt', 'tan', 'tanh', 'threefry2x32',
}  # fmt: skip
# ... and unless by anything but these, which read their arguments as they go.
READERS = FUSED | {
  'argmax', 'argmin', 'concatenate', 'dynamic_update_slice', 'gather',
  'reduce_and',
  'reduce_max', 'reduce_min', 'reduce_or', 'reduce_prod', 'reduce_sum',
  'scatter', 'scatter-add', 'scatter_add', 'stack',
}  # fmt: skip
LOOPS = {'scan', 'while', 'cond'}
# Their operations are the caller's own.
INLINED = {
  'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call',
  'custom_vjp_call_jaxpr', 'checkpoint', 'jit', 'pjit', 'remat', 'remat2',
  'shard_map',
}  # fmt: skip


def size(aval) -> int:
  """Bytes of an array's shape."""
  if not hasattr(aval, 'shape'):
    return 0
  dtype = aval.dtype
  # Keys of random numbers are two words.
  item = dtype.itemsize if isinstance(dtype, np.dtype) else 8
  return math.prod(aval.shape) * item


def peak(f, *arguments) -> int:
  """Bytes that f's operations hold at once, its arguments and what replaces
  them (results of the same shapes) not counted.

  Args:
    f: a function of pytrees.
    arguments: pytrees of arrays, or of anything with a shape and a dtype; taken
      to be given up, as with `donate_argnums`.
  """
  return _peak(jax.make_jaxpr(f)(*arguments).jaxpr)


def _inner(eqn):
  """The programs within an operation."""
  found = []
  for value in eqn.params.values():
    for part in value if isinstance(value, tuple | list) else [value]:
      if isinstance(part, core.ClosedJaxpr):
        found.append(part.jaxpr)
      elif isinstance(part, core.Jaxpr):
        found.append(part)
  return found


def _flatten(jaxpr, names, operations):
  """Appends (operation, inputs, results) with calls put in place."""

  def read(variable):
    if isinstance(variable, core.Literal):
      return None
    return names.get(variable, variable)

  for eqn in jaxpr.eqns:
    if eqn.primitive.name in INLINED and _inner(eqn):
      inner = _inner(eqn)[0]
      # Every call has its own variables, though the program is the same.
      within = dict(
        zip(
          inner.invars, map(read, eqn.invars[-len(inner.invars) :]), strict=True
        )
      )
      within |= {v: _Own(v.aval) for v in inner.constvars}
      _flatten(inner, within, operations)
      for outer, variable in zip(eqn.outvars, inner.outvars, strict=True):
        names[outer] = (
          None
          if isinstance(variable, core.Literal)
          else within.get(variable, variable)
        )
    else:
      results = []
      for variable in eqn.outvars:
        names[variable] = _Own(variable.aval)
        results.append(names[variable])
      operations.append((eqn, [read(v) for v in eqn.invars], results))


class _Own:
  """A value of one place of the program."""

  def __init__(self, aval):
    self.aval = aval


def _peak(jaxpr) -> int:
  operations, names = [], {}
  for variable in [*jaxpr.invars, *jaxpr.constvars]:
    names[variable] = _Own(variable.aval)
  places = [size(variable.aval) for variable in jaxpr.invars]
  _flatten(jaxpr, names, operations)
  returned = [
    names.get(v, v) for v in jaxpr.outvars if not isinstance(v, core.Literal)
  ]
  kept = set(returned)
  # What is returned in the place of an argument.
  sizes = {}
  for value in dict.fromkeys(returned):
    if size(value.aval) in places:
      places.remove(size(value.aval))
      sizes[value] = 0

  def held(value):
    return sizes.get(value, size(value.aval))

  # What must be in memory as it is.
  made_by, uses_of, barriers = {}, {}, [0]
  for number, (eqn, inputs, results) in enumerate(operations):
    barriers.append(barriers[-1] + (eqn.primitive.name not in READERS))
    for value in results:
      made_by[value] = (eqn.primitive.name, inputs)
    for value in inputs:
      uses_of.setdefault(value, []).append(number)
  for eqn, inputs, _ in operations:
    if eqn.primitive.name not in READERS:
      # Products read an argument in any order, loops do not.
      views = VIEWS - {'transpose'} if eqn.primitive.name in LOOPS else VIEWS
      for value in inputs:
        while value in made_by and made_by[value][0] in views:
          value = made_by[value][1][0]
        if value in made_by:
          kept.add(value)
  for value, (name, _) in made_by.items():
    # Before and after something that ends a fusion: not computed twice.
    numbers = uses_of.get(value, [0])
    if name in EXPENSIVE and barriers[numbers[0]] < barriers[numbers[-1]]:
      kept.add(value)

  # What a fused value is made of: values that are in memory.
  sources = {}

  def made_of(value):
    if value is None:
      return frozenset()
    return sources.get(value, frozenset([value]))

  last, uses = {}, []
  for number, (eqn, inputs, results) in enumerate(operations):
    used = frozenset().union(*map(made_of, inputs))
    uses.append(used)
    fused = eqn.primitive.name in FUSED
    for value in results:
      if fused and value not in kept:
        sources[value] = used
    if not fused or any(value in kept for value in results):
      for value in used:
        last[value] = number
  for value in returned:
    for source in made_of(value):
      last[source] = len(operations)

  ends = {}
  for value, number in last.items():
    ends.setdefault(number, []).append(value)
  live, most = 0, 0
  alive = set()
  for number, (eqn, _, results) in enumerate(operations):
    new = [v for v in results if v not in sources and v is not None]
    within = 0
    if eqn.primitive.name in LOOPS:
      within = max((_peak(inner) for inner in _inner(eqn)), default=0)
    dying = [v for v in ends.get(number, []) if v in alive]
    # In place of what is used here for the last time; products cannot.
    in_place = eqn.primitive.name in READERS | LOOPS
    spare = [held(v) for v in dying] if in_place else []
    added = 0
    for value in new:
      alive.add(value)
      if held(value) in spare:
        spare.remove(held(value))
      else:
        added += held(value)
    most = max(most, live + added + within)
    live += sum(held(v) for v in new)
    for value in dying + [v for v in new if v not in last]:
      alive.discard(value)
      live -= held(value)
  return most
