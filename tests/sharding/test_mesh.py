"""Meshes by name: what is refused, before any compute."""

import jax
import pytest

from longjax.sharding.mesh import check_length, make_mesh


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'sequence': 2}, "mesh axis 'sequence' is not one of"),
    ({'seq': 0}, "mesh axis 'seq' must be a whole number >= 1"),
    ({'seq': 1.5}, "mesh axis 'seq' must be a whole number >= 1"),
    ({'seq': -1, 'data': -1}, 'only one mesh axis can be -1'),
    (
      {'seq': 3},
      'mesh data 1 x seq 3 x model 1 does not make the 1 devices there are',
    ),
    ({'seq': 3, 'data': -1}, 'does not make the 1 devices there are'),
  ],
)
def test_bad_meshes(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(sizes, jax.devices()[:1])


@pytest.mark.parametrize('sizes', [{}, {'seq': 1}, {'seq': -1}])
def test_one_device(sizes):
  mesh = make_mesh(sizes, jax.devices()[:1])
  assert dict(mesh.shape) == {'data': 1, 'seq': 1, 'model': 1}


def test_lengths():
  assert check_length(24, 8) == 3
  with pytest.raises(ValueError, match='that can: 24 and 32'):
    check_length(30, 8)
  with pytest.raises(ValueError, match='that can: 8$'):
    check_length(5, 8)
