"""The ordered list of implementations, refusals and their reasons."""

import logging

import jax
import numpy as np
import pytest

import longjax
from longjax.ops import dispatch
from tests.ops.helpers import qkv

PATTERN = longjax.SlidingWindow(3)


@pytest.fixture
def fakes(monkeypatch):
  """Backends 'picky' and 'sulky', which refuse; 'seen' lists who was asked."""
  seen = []

  def refusing(name, reason):
    def attend(call):
      seen.append(name)
      raise NotImplementedError(reason)

    return attend

  backends = {
    'picky': refusing('picky', 'head size 8 is below 64'),
    'sulky': refusing('sulky', 'no dropout'),
  }
  real = dispatch.backend
  monkeypatch.setattr(
    dispatch, 'backend', lambda name: backends.get(name) or real(name)
  )
  dispatch._log_once.cache_clear()
  return seen


def attend(implementation):
  return longjax.attention(*qkv(), PATTERN, implementation=implementation)


def test_naming_a_backend_that_refuses_raises_its_reason(fakes):
  with pytest.raises(NotImplementedError, match='head size 8 is below 64'):
    attend('picky')


def test_a_sequence_is_tried_in_order(fakes):
  out = attend(('sulky', 'picky', 'xla'))
  assert fakes == ['sulky', 'picky']
  np.testing.assert_array_equal(out, attend('xla'))
  fakes.clear()
  attend(('reference', 'picky'))
  assert fakes == []


def test_if_all_refuse_every_reason_is_given(fakes):
  with pytest.raises(NotImplementedError) as error:
    attend(('picky', 'sulky'))
  assert str(error.value) == (
    'picky: head size 8 is below 64; sulky: no dropout'
  )


def test_an_empty_sequence_is_an_error():
  with pytest.raises(NotImplementedError, match='no implementation named'):
    attend(())


def test_none_takes_the_platforms_order(fakes, monkeypatch):
  monkeypatch.setitem(
    dispatch.ORDER, jax.default_backend(), ('picky', 'reference')
  )
  out = attend(None)
  assert fakes == ['picky']
  np.testing.assert_array_equal(out, attend('reference'))


def test_every_order_ends_with_what_can_do_everything():
  assert set(dispatch.ORDER) == {'cpu', 'gpu', 'tpu'}
  assert all(order[-1] == 'xla' for order in dispatch.ORDER.values())


def test_a_reason_is_logged_once(fakes, caplog):
  with caplog.at_level(logging.INFO, logger='longjax'):
    for _ in range(3):
      attend(('picky', 'xla'))
  assert [r.getMessage() for r in caplog.records] == [
    'not using picky: head size 8 is below 64'
  ]


def test_another_error_is_not_a_refusal(monkeypatch):
  """A backend's bug must not be hidden by the next one in the list."""

  def broken(call):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(dispatch, 'backend', lambda name: broken)
  with pytest.raises(RuntimeError, match='out of memory'):
    attend(('picky', 'xla'))


def test_an_unknown_name_in_a_sequence_is_an_error_at_once(fakes):
  with pytest.raises(ValueError, match="'xlaa' is not one of"):
    attend(('xla', 'xlaa'))


def test_xla_refuses_xpos_of_self_extend_in_packed_documents():
  """The one thing it cannot do; the definition can."""
  x = qkv()
  options = dict(
    position=longjax.XPos(), segment_ids=np.repeat([[0, 1]], 2, 0).repeat(20, 1)
  )
  pattern = longjax.SelfExtend(8, 2)
  with pytest.raises(NotImplementedError, match='xPos .* SelfExtend'):
    longjax.attention(*x, pattern, implementation='xla', **options)
  out = longjax.attention(
    *x, pattern, implementation=('xla', 'reference'), **options
  )
  assert np.isfinite(out).all()
