"""A study of optuna that many workers share and some may leave.

What is to be tried is a queue of tickets in the storage: a study of n trials
begins with n waiting trials, which for a grid and for random search hold their
parameters and for TPE nothing. A worker takes a ticket, and nobody else gets
it; so there are n trials, however many workers there are. One that stops
without a word is missed at its heartbeats, and one that is told to stop gives
its ticket back: in both cases it is waiting again, with the parameters and the
figures it had, and whoever takes it goes on in the folder of the first attempt.

Nothing here knows of training: `experiments.sweep` brings the objective.
"""

import contextlib
import dataclasses
import itertools
import json
import time
import warnings
from collections.abc import Callable, Mapping

import optuna
import sqlalchemy
from optuna.distributions import (
  CategoricalDistribution,
  distribution_to_json,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments import stamp

SAMPLERS = ('tpe', 'random', 'grid')
PRUNERS = ('median', 'none')
DIRECTIONS = ('minimize', 'maximize')
# Times a trial is tried again after its worker was lost.
RETRIES = 3
# Draws that tell what a search space is, and whether its values can be.
DRAWS = 20
# Points of a grid that are too many to be meant.
LARGEST_GRID = 10_000

WAITING, RUNNING = TrialState.WAITING, TrialState.RUNNING
_TICKET, _SURPLUS, ERROR = 'ticket', 'surplus', 'error'
LOST = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)


class StudyError(ValueError):
  """A study that cannot be begun or gone on with; the message is a line."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a study is; whoever joins it must want the same.

  Attributes:
    name: of the study.
    sampler, pruner, direction: of `SAMPLERS`, `PRUNERS`, `DIRECTIONS`.
    metric: what is optimized, by name.
    seed: of random points and of TPE.
    space: {parameter: its distribution as JSON}, see `explore`.
    config: what every trial begins with.
  """

  name: str
  sampler: str
  pruner: str
  direction: str
  metric: str
  seed: int
  space: Mapping[str, str]
  config: Mapping


def _differences(theirs, ours):
  a, b = _flat(theirs), _flat(ours)
  for key in sorted(a.keys() | b.keys()):
    x, y = (side.get(key, 'absent') for side in (a, b))
    if x != y:
      yield f'{key} is {x} there and {y} here'


def _flat(tree, prefix=''):
  if isinstance(tree, Mapping | list | tuple) and tree:
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    flat = {}
    for key, value in pairs:
      flat |= _flat(value, f'{prefix}.{key}' if prefix else str(key))
    return flat
  return {prefix: tree}


# The search space.


def explore(suggest: Callable[[Trial], None], seed: int, count: int = DRAWS):
  """(distributions, points): `count` random draws and what they are drawn of.

  Args:
    suggest: asks a trial for every parameter; parameters may depend on others.
    seed: of the draws.
    count: how many; at least 20 are drawn to know the space.
  """
  with quiet():
    study = optuna.create_study(
      sampler=optuna.samplers.RandomSampler(seed=seed)
    )
    space, points = {}, []
    for _ in range(max(count, DRAWS)):
      trial = study.ask()
      suggest(trial)
      space |= trial.distributions
      points.append(trial.params)
  if not space:
    raise StudyError('the search space is empty: sweep() suggests nothing')
  return space, points[:count]


def grid(space: Mapping) -> list[dict]:
  """Every combination of a space of choices and stepped ranges.

  Raises:
    StudyError: for a range without a step, or too many points.
  """
  values, size = {}, 1
  for name, distribution in space.items():
    if isinstance(distribution, CategoricalDistribution):
      values[name] = list(distribution.choices)
    elif distribution.step is not None and not distribution.log:
      low, step = distribution.low, distribution.step
      count = round((distribution.high - low) / step) + 1
      values[name] = [low + i * step for i in range(count)]
    else:
      raise StudyError(
        f'--sampler=grid needs choices or a step for {name!r}, which is any '
        f'value of {distribution.low} to {distribution.high}'
      )
    size *= len(values[name])
  if size > LARGEST_GRID:
    raise StudyError(f'the grid has {size:,} points: take random or tpe')
  points = itertools.product(*values.values())
  return [dict(zip(values, point, strict=True)) for point in points]


def describe(space: Mapping) -> dict[str, str]:
  """{parameter: its distribution as JSON}, to be stored and compared."""
  return {name: distribution_to_json(d) for name, d in sorted(space.items())}


# The storage.


def open_storage(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
  """The data base at an SQLAlchemy URL.

  Args:
    url: 'sqlite:///FILE', 'postgresql://USER:PASSWORD@HOST/NAME', ...
    heartbeat: seconds between signs of life; a worker that gave none for three
      times as long is lost.

  Raises:
    StudyError: where it cannot be reached, without the password.
  """
  options = {'pool_pre_ping': True}
  local = url.startswith('sqlite')
  if local:
    options['connect_args'] = {'timeout': 60}
  elif url.startswith('postgresql'):
    options['connect_args'] = {'connect_timeout': 10}
  shown = stamp.without_places(url)
  # Two workers that begin at once may both find no tables, and make them.
  for attempt in (1, 2):
    try:
      with quiet():
        storage = optuna.storages.RDBStorage(
          url,
          engine_kwargs=options,
          heartbeat_interval=heartbeat,
          grace_period=3 * heartbeat,
          heartbeat_stale_trial_callback=_retry(),
        )
      break
    except ImportError:
      raise StudyError(
        f'the storage {shown} needs a driver that is not installed: '
        "pip install 'longjax[sweeps]' has PostgreSQL's"
      ) from None
    except (*LOST, RuntimeError) as error:
      if attempt == 2 or isinstance(error, sqlalchemy.exc.ArgumentError):
        raise StudyError(
          f'cannot reach the storage {shown}: {lost_reason(error)}'
        ) from None
      time.sleep(1)
  if local:
    # SQLite has no locks on rows: a ticket is read and taken in one transaction
    # that nobody else writes in.
    sqlalchemy.event.listen(
      storage.engine,
      'begin',
      lambda connection: connection.exec_driver_sql('BEGIN IMMEDIATE'),
    )
  return storage


def _retry():
  with quiet():
    return optuna.storages.RetryHeartbeatStaleTrialCallback(
      max_retry=RETRIES, inherit_intermediate_values=True
    )


def lost_reason(error: BaseException) -> str:
  """What a data base says, in one line and without passwords."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(getattr(error, 'orig', None) or error).strip().splitlines()
  return stamp.without_places(lines[0] if lines else type(error).__name__)


@contextlib.contextmanager
def quiet():
  """Without optuna's warnings of what it calls experimental, and its log."""
  optuna.logging.set_verbosity(optuna.logging.CRITICAL)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    yield


# Studies.


def begin(storage, plan: Plan, points: list[dict], wait: float = 60):
  """The study of a plan: made with its tickets, or joined, or extended.

  Args:
    storage: of `open_storage`.
    plan: of the study.
    points: the parameters of each ticket, {} for the sampler's choice. Of a
      study that is there already the first ones are taken to be its own.
    wait: seconds in which another process that is just making the study may
      finish that.

  Raises:
    StudyError: where the study of that name is of another plan.
  """
  wanted = json.loads(
    json.dumps(stamp.without_places(dataclasses.asdict(plan)))
  )
  with quiet():
    try:
      study = optuna.create_study(
        study_name=plan.name, storage=storage, direction=plan.direction
      )
      study.set_user_attr('plan', wanted)
    except optuna.exceptions.DuplicatedStudyError:
      study = optuna.load_study(study_name=plan.name, storage=storage)
      deadline = time.monotonic() + wait
      while not study.user_attrs.get('tickets') and time.monotonic() < deadline:
        time.sleep(0.2)
      there = study.user_attrs.get('plan')
      if there is None:
        raise StudyError(
          f'--study={plan.name} is in use by a study that is not ours'
        ) from None
      if found := list(_differences(there, wanted)):
        more = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
        raise StudyError(
          f'--study={plan.name} is in use by another sweep: {found[0]}{more}; '
          'choose another name'
        ) from None
    have = {t.user_attrs.get(_TICKET) for t in study.get_trials(deepcopy=False)}
    for ticket, point in enumerate(points):
      if ticket not in have:
        study.enqueue_trial(point, user_attrs={_TICKET: ticket})
    if len(points) > study.user_attrs.get('tickets', 0):
      study.set_user_attr('tickets', len(points))
  return study


def frozen(study, trial: Trial) -> FrozenTrial:
  """What the storage knows of a running trial."""
  return study.get_trials(deepcopy=False)[trial.number]


def first_number(trial: FrozenTrial) -> int:
  """The number of a ticket's first trial, by which its folder is called."""
  return trial.system_attrs.get('failed_trial', trial.number)


def make_pruner(name: str) -> optuna.pruners.BasePruner:
  if name == 'none':
    return optuna.pruners.NopPruner()
  return optuna.pruners.MedianPruner(n_startup_trials=5)


class _Surplus(Exception):
  """A trial for which there was no ticket left."""


def work(
  storage,
  study,
  plan: Plan,
  objective: Callable[[Trial], float],
  *,
  say: Callable[[str], None],
  ended: Callable[[FrozenTrial], None] = lambda trial: None,
  poll: float = 5,
) -> None:
  """Takes tickets until none is left and none is with another worker.

  A trial that raises an Exception has failed, keeps the error as
  `user_attrs['error']`, and is not tried again. After anything else that is
  raised (a signal) its ticket waits for another worker.

  Args:
    storage: of `open_storage`.
    study: of `begin`.
    plan: its plan.
    objective: reports to the trial, may raise TrialPruned, returns the value.
    say: takes a line on what goes on.
    ended: takes each trial of this worker once it has ended.
    poll: seconds between looks while only others have tickets.
  """
  study.pruner = make_pruner(plan.pruner)

  def tell(study, trial):
    if not trial.user_attrs.get(_SURPLUS):
      ended(trial)

  def run(trial):
    ticket = trial.user_attrs.get(_TICKET)
    if ticket is None or _taken_before(study, trial, ticket):
      trial.set_user_attr(_SURPLUS, True)
      raise _Surplus
    # By its number, or workers that begin together would all draw the same.
    study.sampler = (
      optuna.samplers.TPESampler(
        seed=plan.seed + trial.number, constant_liar=True
      )
      if plan.sampler == 'tpe'
      else optuna.samplers.RandomSampler(seed=plan.seed + trial.number)
    )
    try:
      return objective(trial)
    except optuna.TrialPruned:
      raise
    except Exception as error:
      lines = str(error).strip().splitlines() or ['']
      trial.set_user_attr(ERROR, f'{type(error).__name__}: {lines[0]}')
      raise
    except KeyboardInterrupt:
      give_back(storage, study, trial)
      # optuna would call the trial failed.
      raise SystemExit(130) from None
    except BaseException:
      give_back(storage, study, trial)
      raise

  told, silent = False, _Silent(storage, study)
  while True:
    with quiet():
      optuna.storages.fail_stale_trials(study)
      silent.give_back()
      states = [t.state for t in study.get_trials(deepcopy=False)]
      if WAITING in states:
        try:
          study.optimize(run, n_trials=1, catch=(Exception,), callbacks=[tell])
        except (
          ValueError,
          optuna.exceptions.UpdateFinishedTrialError,
        ) as error:
          # What can still be raised is that others took this worker for lost.
          say(f'a trial was taken over: {error}')
        continue
    if RUNNING not in states:
      return
    if not told:
      say(f'{states.count(RUNNING)} trial(s) left, all with other workers')
    told = True
    time.sleep(poll)


def _taken_before(study, trial, ticket):
  """Whether an earlier trial is no earlier attempt and has the same ticket."""
  history = frozen(study, trial).system_attrs.get('retry_history', [])
  return any(
    other.user_attrs.get(_TICKET) == ticket
    and other.number < trial.number
    and other.number not in history
    for other in study.get_trials(deepcopy=False)
  )


def give_back(storage, study, trial: Trial | FrozenTrial) -> None:
  """Puts a running trial's ticket into the queue again, at once."""
  try:
    storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
  except optuna.exceptions.UpdateFinishedTrialError:
    return  # somebody else was faster
  _retry()(study, storage.get_trial(trial._trial_id))


class _Silent:
  """Trials of workers that died before their first heartbeat.

  optuna takes for lost only who has stopped giving signs of life, not who never
  gave one. Told by this process' own clock.
  """

  _QUERY = sqlalchemy.text(
    'SELECT trials.number FROM trials'
    ' JOIN studies ON studies.study_id = trials.study_id'
    ' LEFT JOIN trial_heartbeats AS beats ON beats.trial_id = trials.trial_id'
    " WHERE studies.study_name = :name AND trials.state = 'RUNNING'"
    ' AND beats.trial_id IS NULL'
  )

  def __init__(self, storage, study):
    self._storage, self._study, self._since = storage, study, {}

  def give_back(self):
    storage = self._storage
    with storage.engine.connect() as connection:
      found = connection.execute(self._QUERY, {'name': self._study.study_name})
      numbers = {number for (number,) in found}
    now = time.monotonic()
    self._since = {n: self._since.get(n, now) for n in numbers}
    for number, since in self._since.items():
      if now - since > storage.grace_period:
        trial = self._study.get_trials(deepcopy=False)[number]
        give_back(storage, self._study, trial)


def progress(study) -> tuple[int, int]:
  """(tickets that are done with, tickets)."""
  ended = [t for t in trials_of(study) if not attempted_again(study, t)]
  return len(ended), study.user_attrs['tickets']


def trials_of(study, finished: bool = True) -> list[FrozenTrial]:
  """The trials of tickets, in order of their numbers."""
  return [
    t
    for t in study.get_trials(deepcopy=False)
    if not t.user_attrs.get(_SURPLUS)
    and (t.state.is_finished() or not finished)
  ]


def attempted_again(study, trial: FrozenTrial) -> bool:
  """Whether the worker was lost and the ticket has a later trial."""
  return trial.number in {
    number
    for other in study.get_trials(deepcopy=False)
    for number in other.system_attrs.get('retry_history', [])
    if other.number > number
  }


def is_complete(study) -> bool:
  states = [t.state for t in study.get_trials(deepcopy=False)]
  return not {WAITING, RUNNING} & set(states)
