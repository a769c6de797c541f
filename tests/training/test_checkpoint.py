"""Checkpoints: exact, whole or not there, and never lost by a failed save."""

import errno
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax import checkpoint as orbax

from longjax.training.checkpoint import CheckpointError, Checkpoints, flatten

# When a file cannot be read or written, orbax drops the others half-way, and
# each of them complains, maybe in a later test, that its event loop is gone.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(seed=0, width=4):
  keys = iter(jax.random.split(jax.random.key(seed), 4))
  params = {
    'embedding.embedding': jax.random.normal(next(keys), (8, width)),
    'layers.0.kernel': jax.random.normal(next(keys), (width, 3)),
    'layers.0.half': jax.random.normal(next(keys), (5,)).astype(jnp.bfloat16),
  }
  moments = jax.tree.map(lambda x: 2 * x, params)
  return {'params': params, 'opt_state': (moments, jnp.int32(7))}


def assert_same(a, b):
  a, b = flatten(a), flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@pytest.fixture
def opened(tmp_path):
  checkpoints = []

  def open_(**kwargs):
    checkpoints.append(Checkpoints(tmp_path / 'checkpoints', **kwargs))
    return checkpoints[-1]

  yield open_
  for c in checkpoints:
    c.close()


def damage(folder):
  """Cuts every file of arrays in half, as a crash of the machine may."""
  count = 0
  for path in pathlib.Path(folder).rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      os.truncate(path, path.stat().st_size // 2)
      count += 1
  assert count


def test_restores_bit_for_bit(opened):
  run = {'step': 3, 'data': {'seed': 1}, 'counters': {'loss_sum': 0.1 + 0.2}}
  opened().save(3, make_state(), run)
  restored = opened().restore(make_state(seed=1))
  assert restored.step == 3
  assert_same(restored.state, make_state())
  assert {k: restored.run[k] for k in run} == run


def test_nothing_there(opened):
  assert opened().restore(make_state()) is None


def test_parts_can_be_read_alone(opened):
  opened().save(1, make_state(), {})
  like = {'params': make_state(seed=1)['params']}
  restored = opened(read_only=True).restore(like)
  assert_same(restored.state, {'params': make_state()['params']})


def test_keeps_the_newest(opened):
  checkpoints = opened(keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step), {})
  assert checkpoints.steps() == (2, 3)
  assert_same(opened().restore(make_state()).state, make_state(3))
  assert_same(opened().restore(make_state(), step=2).state, make_state(2))
  with pytest.raises(CheckpointError, match='no checkpoint of step 1 .* 2, 3'):
    opened().restore(make_state(), step=1)


def test_another_architecture_names_the_first_difference(opened):
  opened().save(5, make_state(width=4), {})
  with pytest.raises(CheckpointError) as e:
    opened().restore(make_state(width=6))
  message = str(e.value)
  assert 'step 5' in message and 'another architecture' in message
  assert 'params/embedding.embedding has shape (8, 4) there' in message
  assert 'has shape (8, 6) here' in message
  assert '\n' not in message

  more = make_state()
  more['params']['layers.1.kernel'] = jnp.ones(3)
  with pytest.raises(
    CheckpointError, match=r'layers.1.kernel is absent there .* \(3,\) here'
  ):
    opened().restore(more)
  with pytest.raises(CheckpointError, match='ema/.* is absent there'):
    opened().restore({'ema': make_state()['params']})


def test_half_written_is_ignored(opened, tmp_path):
  """What a killed save leaves behind is no checkpoint."""
  opened().save(1, make_state(1), {})
  whole = tmp_path / 'checkpoints' / '1'
  half = tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp'
  (half / 'params').mkdir(parents=True)
  (half / 'params' / '_METADATA').write_bytes(
    (whole / 'params' / '_METADATA').read_bytes()[:20]
  )
  assert opened().steps() == (1,)
  assert_same(opened().restore(make_state()).state, make_state(1))


def test_damaged_falls_back_and_says_so(opened, tmp_path):
  said = []
  checkpoints = opened()
  checkpoints.save(1, make_state(1), {})
  checkpoints.save(2, make_state(2), {})
  damage(tmp_path / 'checkpoints' / '2')
  restored = opened(say=said.append).restore(make_state())
  assert restored.step == 1
  assert_same(restored.state, make_state(1))
  assert len(said) == 1 and 'step 2' in said[0] and 'damaged' in said[0]
  assert '\n' not in said[0]


def test_all_damaged(opened, tmp_path):
  opened().save(1, make_state(1), {})
  damage(tmp_path / 'checkpoints' / '1')
  with pytest.raises(CheckpointError, match='damaged .* no other one') as e:
    opened(say=lambda line: None).restore(make_state())
  assert '\n' not in str(e.value)


def test_full_disk_leaves_earlier_checkpoints(opened, tmp_path, monkeypatch):
  checkpoints = opened()
  checkpoints.save(1, make_state(1), {})

  def save(self, step, **kwargs):
    folder = tmp_path / 'checkpoints' / f'{step}.orbax-checkpoint-tmp'
    folder.mkdir()
    (folder / 'part').write_text('half')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

  with monkeypatch.context() as patch:
    patch.setattr(orbax.CheckpointManager, 'save', save)
    with pytest.raises(CheckpointError) as e:
      checkpoints.save(2, make_state(2), {})
  assert 'step 2' in str(e.value) and 'no space left' in str(e.value)
  assert 'intact: 1' in str(e.value) and '\n' not in str(e.value)
  # The half-written one is gone, and makes room.
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['1']
  assert_same(opened().restore(make_state()).state, make_state(1))
  checkpoints.save(2, make_state(2), {})
  assert_same(opened().restore(make_state()).state, make_state(2))


def test_a_write_that_really_fails(opened, tmp_path):
  """As above with the writer below orbax failing: files may not grow."""
  resource = pytest.importorskip('resource', reason='no file size limits here')
  checkpoints = opened()
  checkpoints.save(1, make_state(1), {})
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  large = {
    'params': {'kernel': jax.random.normal(jax.random.key(0), (512, 512))}
  }
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    with pytest.raises(CheckpointError, match='step 2 .* intact: 1'):
      checkpoints.save(2, large, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
  assert checkpoints.steps() == (1,)
  assert_same(opened().restore(make_state()).state, make_state(1))


def test_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='cannot write .*file: Not a dir'):
    Checkpoints(tmp_path / 'file' / 'checkpoints')


def test_names_are_readable(opened, tmp_path):
  opened().save(1, make_state(), {})
  run = json.loads((tmp_path / 'checkpoints/1/run/metadata').read_text())
  assert run['shapes']['params'] == {
    'embedding.embedding': [8, 4],
    'layers.0.kernel': [4, 3],
    'layers.0.half': [5],
  }
