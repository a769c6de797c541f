"""Functions of a model at work outside of the training step."""

from collections.abc import Callable, Mapping

from flax import nnx

from longjax.training.devices import Devices


def _nothing():
  pass


class Apply:
  """A model with its parameters: makes functions of it.

  `apply(f)(*rows)` is f(model, *rows), compiled, with the rows of the arrays
  spread over the devices. f is compiled once for each of its shapes, however
  often `apply(f)` is said, so f must be the same object each time: a function
  of a module, or a method of one object, no fresh lambda.
  """

  def __init__(
    self,
    merge: Callable,
    params: Mapping,
    devices: Devices,
    *,
    check: Callable[[], None] = _nothing,
    compiled: dict | None = None,
  ):
    """Args:

    merge: parameters -> module, see `longjax.training.state.split`.
    params: of the model.
    devices: where it is computed.
    check: called before each call, so that a long evaluation can be left.
    compiled: functions by `f`, shared by all with the same `merge`.
    """
    self._merge = merge
    self._params = params
    self._devices = devices
    self._check = check
    self._compiled = {} if compiled is None else compiled

  def __call__(self, f: Callable, *, sequences: bool = False) -> Callable:
    """f(model, *rows) as a function of rows.

    Rows are pytrees of arrays [batch, ...] that every process holds whole, the
    batch a multiple of the devices along it. Results are whole on every device.

    Args:
      f: see the class.
      sequences: rows are arrays [batch, length], and so is the result; lengths
        are split over the devices, too.
    """
    if f not in self._compiled:
      self._compiled[f] = self._devices.apply(
        lambda params, *rows: f(self._merge(params), *rows),
        sequences=sequences,
      )

    def run(*rows):
      self._check()
      return self._compiled[f](self._params, *rows)

    return run

  @property
  def model(self) -> nnx.Module:
    """The module itself, for what compiles on its own (decoding, say)."""
    return self._merge(self._params)

  def check(self) -> None:
    """Leaves, by an exception, when a stop is asked for."""
    self._check()
