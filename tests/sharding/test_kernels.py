"""Pallas kernels inside of shard_map, for devices that are not there.

Only traced: JAX checks that results and cotangents are typed as what may differ
between devices, without which sums over devices would be wrong.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import longjax
from experiments import targets
from longjax.sharding import make_mesh, sharded_attention


@pytest.mark.parametrize(
  ('implementation', 'topology'),
  [
    ('mosaic_tpu', 'v5e:2x2'),
    pytest.param('mosaic_gpu', 'h200:4', marks=pytest.mark.full),
  ],
)
def test_kernels_in_a_mesh_of_two_axes(implementation, topology):
  mesh = make_mesh({'data': 2, 'seq': 2}, targets.devices(topology))
  rows = P('data', 'seq')

  def attend(q, k, v):
    return sharded_attention(
      q,
      k,
      v,
      longjax.Lambda(64, 8),
      axis_name='seq',
      position=longjax.RoPE(),
      implementation=implementation,
    )

  run = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)

  def loss(*arrays):
    return run(*arrays).astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((2, 512, 2, 64), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2)), x, x, x)
  assert all(y.shape == x.shape for y in gradients)
