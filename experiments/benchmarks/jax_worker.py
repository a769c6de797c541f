"""longjax and JAX's rivals behind `timing.serve`; started by attention.py."""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

import longjax
from experiments.benchmarks import cases, layer, numerics, timing

# On a CPU our kernels run in Pallas' interpreter.
INTERPRETED = jax.default_backend() == 'cpu'


def interpreter():
  if not INTERPRETED:
    return contextlib.nullcontext()
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def pattern_of(case):
  """longjax's pattern for a case, but for global tokens."""
  branch = case.branches[0]
  if case.family == 'longnet':
    return longjax.Dilated(
      tuple(b.segment for b in case.branches),
      tuple(b.stride for b in case.branches),
    )
  if case.family == 'lambda':
    return longjax.Lambda(branch.left + 1, case.start)
  if case.full:
    return longjax.Full(causal=True)
  return longjax.SlidingWindow(branch.left, branch.right, branch.stride)


def of_longjax(case, implementation):
  """q, k, v -> out; with globals also the rows of the global queries."""
  attention = functools.partial(
    longjax.attention, implementation=implementation
  )
  pattern, count = pattern_of(case), case.num_globals
  if not count:
    return functools.partial(attention, pattern=pattern)

  def attend(q, k, v, global_qkv=None):
    tokens = jnp.broadcast_to(jnp.arange(count), (q.shape[0], count))
    out = attention(q, k, v, pattern, global_tokens=tokens)
    q, k, v = global_qkv or (q, k, v)
    rows = attention(q[:, :count], k, v, longjax.Full(causal=False))
    return jnp.concatenate([rows, out[:, count:]], axis=1)

  return attend


def of_cudnn(case):
  left = case.branches[0].left
  return functools.partial(
    jax.nn.dot_product_attention,
    is_causal=True,
    local_window_size=None if case.full else (left, 0),
    implementation='cudnn',
  )


def of_tokamax(case):
  tokamax = importlib.import_module('tokamax')
  left = case.branches[0].left
  return functools.partial(
    tokamax.dot_product_attention,
    is_causal=True,
    local_window_size=None if case.full else (left, 0),
    implementation='mosaic_gpu',
  )


ATTEND = {
  cases.MOSAIC: lambda case: of_longjax(case, 'mosaic_gpu'),
  cases.XLA: lambda case: of_longjax(case, 'xla'),
  cases.CUDNN: of_cudnn,
  cases.TOKAMAX: of_tokamax,
}


def compiled(f, *arguments):
  with interpreter():
    return jax.jit(f).lower(*arguments).compile()


def used_bytes(program):
  """The most that a compiled program has allocated at once."""
  analysis = program.memory_analysis()
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    + analysis.temp_size_in_bytes
    - analysis.alias_size_in_bytes
  )


def profile(program, inputs):
  from jax.experimental.mosaic.gpu import profiler

  return profiler.measure(program, aggregate=False)(*inputs)[1]


def prepared(programs, sets, check):
  return timing.Prepared(
    runs=programs,
    inputs=sets,
    check=check,
    memory=lambda: {m: used_bytes(p) for m, p in programs.items()},
    profile=profile,
  )


def prepare(who, case, reference):
  if case.family == 'layer':
    return prepare_layer(who, case, reference)
  attend = ATTEND[who](case)
  shape = case.batch, case.length, case.heads, case.size
  keys = jax.random.split(jax.random.key(0), 4 * timing.SETS)
  arrays = [jax.random.normal(key, shape, case.dtype) for key in keys]
  sets = [arrays[i : i + 4] for i in range(0, len(arrays), 4)]

  def forward(q, k, v, dout):
    del dout
    return attend(q, k, v)

  def both(q, k, v, dout):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)

  programs = {
    mode: compiled(f, *sets[0])
    for mode, f in zip(cases.MODES, (forward, both), strict=True)
  }

  def check():
    both = programs[cases.MODES[1]](*sets[0])
    results = dict(zip(numerics.NAMES, both, strict=True))
    results['forward'] = programs[cases.MODES[0]](*sets[0])
    with jax.default_matmul_precision('highest'):
      return numerics.check(jnp, case, sets[0], results, jit=jax.jit)

  return prepared(programs, sets, check)


def prepare_layer(who, case, reference):
  """Longformer's self-attention with its projections; see `layer`."""
  implementation = {cases.MOSAIC: 'mosaic_gpu', cases.XLA: 'xla'}[who]
  attend = of_longjax(case, implementation)
  weights, hidden, dout = jax.device_put(layer.inputs(case))
  sets = [
    (weights, *(jnp.roll(x, n, axis=1) for x in (hidden, dout)))
    for n in range(timing.SETS)
  ]

  def project(weights, hidden, name):
    x = hidden @ weights[f'{name}.weight'].T + weights[f'{name}.bias']
    return x.reshape(*x.shape[:2], case.heads, case.size)

  def layer_of(weights, hidden):
    qkv = [project(weights, hidden, name) for name in layer.PROJECTIONS]
    more = ()
    if case.num_globals:
      rows = hidden[:, : case.num_globals], hidden, hidden
      more = (
        tuple(
          project(weights, x, f'{name}_global')
          for x, name in zip(rows, layer.PROJECTIONS, strict=True)
        ),
      )
    return attend(*qkv, *more).reshape(hidden.shape)

  def forward(weights, hidden, dout):
    del dout
    return layer_of(weights, hidden)

  def both(weights, hidden, dout):
    out, pull = jax.vjp(layer_of, weights, hidden)
    return out, *pull(dout)

  programs = {
    mode: compiled(f, *sets[0])
    for mode, f in zip(cases.MODES, (forward, both), strict=True)
  }

  def check():
    out, _, d_hidden = programs[cases.MODES[1]](*sets[0])
    forward = programs[cases.MODES[0]](*sets[0])
    return layer.check(reference, out, d_hidden, forward)

  return prepared(programs, sets, check)


def rates():
  """Products and copies as fast as XLA does them."""
  n, seconds = (8192, 0.3) if not INTERPRETED else (128, 0.01)
  a, b = (
    jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1)
  )
  large = jnp.ones(8 * n * n, jnp.float32)

  def best(f, *arguments):
    program = jax.jit(f).lower(*arguments).compile()
    run = functools.partial(
      timing.synchronized_seconds,
      program,
      [arguments],
      synchronize=jax.block_until_ready,
    )
    run(calls=3)
    calls = max(3, min(100, int(seconds / run(calls=3)[0])))
    return min(run(calls=calls)[0] for _ in range(3))

  return {
    'flops': 2 * n**3 / best(jnp.matmul, a, b),
    'bytes': 2 * large.nbytes / best(jnp.negative, large),
  }


def about():
  device = jax.devices()[0]
  return {
    'versions': {
      'jax': jax.__version__,
      'longjax': longjax.__version__,
      'numpy': np.__version__,
    },
    'device': {
      'kind': device.device_kind,
      'platform': device.platform,
      'compiler': device.client.platform_version.split('\n')[0],
    },
  }


if __name__ == '__main__':
  timing.serve(prepare, jax.block_until_ready, rates, **about())
