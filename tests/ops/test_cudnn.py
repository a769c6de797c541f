"""The cuDNN adapter: what it refuses, and what it asks cuDNN for.

cuDNN itself cannot run here: calls are lowered for a GPU, and the operation's
own configuration is read.
"""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import longjax
from longjax.ops.pallas import devices
from tests.ops.helpers import qkv


def inputs(dtype=jnp.bfloat16, size=64, **sizes):
  return qkv(length=64, heads=4, kv_heads=2, size=size, dtype=dtype, **sizes)


def attend(pattern, x=None, **options):
  return longjax.attention(
    *(x or inputs()), pattern, implementation='cudnn', **options
  )


@pytest.fixture
def on_a_gpu(monkeypatch):
  """Tracing takes the default device for an H200 with cuDNN 9.10."""
  device = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H200')
  monkeypatch.setattr(devices, 'device', lambda: device)
  versions = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', versions)


def lowered(f, *x):
  traced = jax.jit(f).trace(*x)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


def asked(text):
  """(names of the cuDNN operations, their configurations)."""
  names = re.findall(r'@(__cudnn\$\w+)\(', text)
  configs = [
    json.loads(found.replace(r'\22', '"'))
    for found in re.findall(r'backend_config = "(\{.*?\})"', text)
  ]
  return names, [c['cudnn_fmha_backend_config'] for c in configs]


@pytest.mark.parametrize(
  ('pattern', 'window'),
  [
    (longjax.SlidingWindow(7), 8),
    (longjax.SlidingWindow(0), 1),
    (longjax.SlidingWindow(62), 63),
    (longjax.SlidingWindow(63), None),
    (longjax.SlidingWindow(math.inf), None),
    (longjax.SlidingWindow(7, dilation=(1, 1, 1, 1)), 8),
    (longjax.Lambda(8, 0), 8),
    (longjax.Full(), None),
  ],
)
def test_what_cudnn_is_asked_for(on_a_gpu, pattern, window):
  text = lowered(lambda *x: attend(pattern, x, scale=0.5), *inputs())
  (name,), (config,) = asked(text)
  assert name == '__cudnn$fmhaSoftmax'
  assert config['mask_type'] == 'CAUSAL'
  assert config['sliding_window_length'] == (window or 0)
  assert config['fmha_scale'] == 0.5
  assert config['dropout_rate'] == 0


def test_the_gradient_is_cudnns_too(on_a_gpu):
  def loss(*x):
    out = attend(longjax.SlidingWindow(7), x, position=longjax.RoPE())
    return out.astype(jnp.float32).sum()

  names, configs = asked(lowered(jax.grad(loss, (0, 1, 2)), *inputs()))
  assert names == ['__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward']
  for config in configs:
    assert config['mask_type'] == 'CAUSAL'
    assert config['sliding_window_length'] == 8


REFUSED = [
  (longjax.SlidingWindow(7, 1), {}, 'no causal window'),
  (longjax.SlidingWindow(7, dilation=2), {}, 'no causal window'),
  (longjax.SlidingWindow(7, dilation=(1, 1, 2, 2)), {}, 'no causal window'),
  (longjax.Full(causal=False), {}, 'no causal window'),
  (longjax.Dilated((16,), (2,)), {}, 'no causal window'),
  (longjax.Dilated((16,), (1,)), {}, 'no causal window'),
  (longjax.Lambda(8, 2), {}, 'no causal window'),
  (longjax.SelfExtend(8, 2), {}, 'no causal window'),
  (longjax.Full(), dict(position=longjax.ALiBi()), 'position ALiBi'),
  (longjax.Full(), dict(position=longjax.XPos()), 'position XPos'),
  (longjax.Full(), dict(global_tokens=np.array([[0], [1]])), 'global_tokens'),
  (longjax.Full(), dict(segment_ids=np.zeros((2, 64), int)), 'segment_ids'),
  (
    longjax.Full(),
    dict(dropout_rate=0.1, dropout_key=jax.random.key(0)),
    'dropout_rate',
  ),
  (longjax.Full(), dict(logit_soft_cap=9.0), 'logit_soft_cap'),
  (longjax.Full(), dict(return_lse=True), 'return_lse'),
  (longjax.Full(), dict(q_positions=3, kv_positions=3), 'must be 0'),
  (longjax.Full(), dict(kv_positions=np.array([1, 2])), 'must be 0'),
  (
    longjax.Full(),
    dict(q_positions=np.arange(128).reshape(2, 64)),
    'must be 0',
  ),
]


@pytest.mark.parametrize(('pattern', 'options', 'reason'), REFUSED)
def test_refusals(on_a_gpu, pattern, options, reason):
  with pytest.raises(NotImplementedError, match=reason):
    attend(pattern, **options)


@pytest.mark.parametrize(
  ('x', 'reason'),
  [
    (inputs(jnp.float32), 'float32 is neither'),
    (inputs(size=132), 'head size 132'),
    (inputs(size=12), 'head size 12'),
    (inputs(value_size=32), 'value size 32'),
    (inputs(kv_length=70), '64 queries and 70 keys'),
  ],
)
def test_refusals_of_inputs(on_a_gpu, x, reason):
  with pytest.raises(NotImplementedError, match=reason):
    attend(longjax.Full(), x)


def test_it_is_refused_without_a_gpu():
  with pytest.raises(NotImplementedError, match="platform 'cpu'"):
    attend(longjax.Full())


def test_it_is_refused_without_cudnn(on_a_gpu, monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', None)
  with pytest.raises(NotImplementedError, match='cuDNN is not detected'):
    attend(longjax.Full())


def test_the_window_is_that_of_jax():
  """JAX's own dense path, which takes the same arguments, sees the same."""
  x = inputs(jnp.float32)
  for pattern in (longjax.SlidingWindow(7), longjax.Full()):
    left = 63 if isinstance(pattern, longjax.Full) else pattern.left
    wanted = jax.nn.dot_product_attention(
      *x,
      is_causal=True,
      local_window_size=None if left == 63 else (left, 0),
      implementation='xla',
    )
    got = longjax.attention(*x, pattern, implementation='reference')
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_what_is_served_is_a_window_of_its_pattern():
  """The adapter's reading of a pattern agrees with its definition."""
  positions = np.arange(64)
  for pattern in (
    longjax.SlidingWindow(7),
    longjax.SlidingWindow(0),
    longjax.Lambda(8, 0),
    longjax.Full(),
  ):
    (branch,) = pattern.branches(4)
    left = min(branch.left, 63)
    distance = positions[:, None] - positions
    seen = pattern.multiplicity(positions[:, None], positions, 0, 4)
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance <= left))
