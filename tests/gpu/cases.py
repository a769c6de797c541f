"""What `correctness.py` checks: kernels by themselves, and whole calls.

KERNELS: {name: (Spec arguments, arguments of tests.ops.pallas.oracle.operands)}
CALLS: {name: (pattern, arguments of tests.ops.helpers.qkv, other options)}
"""

import jax
import jax.numpy as jnp
import numpy as np

import longjax
from longjax.ops.pallas.contract import UNBOUNDED

SIZES = (32, 64, 96, 128, 256)
BF16, F16 = jnp.bfloat16, jnp.float16
BASE = dict(num_queries=500, heads=4, kv_heads=2, left=100)


def _kernels():
  found = {}

  def add(name, spec=None, **operands):
    found[name] = (spec or {}, BASE | operands)

  def feature(size, name, spec=None, **operands):
    add(f'D{size} {name}', spec, size=size, **operands)

  for size in SIZES:
    for dtype in (BF16, F16):
      name = jnp.dtype(dtype).name
      feature(size, f'window {name}', dtype=dtype)
      feature(size, f'two-sided {name}', dtype=dtype, left=70, right=90)
    feature(size, 'full causal', left=UNBOUNDED)
    feature(size, 'full two-sided', left=UNBOUNDED, right=UNBOUNDED)
    feature(size, 'ids', ids=True)
    feature(size, 'dropout', dict(dropout_rate=0.3), dropout=True)
    feature(size, 'soft cap', dict(soft_cap=2.0))
    feature(size, 'residue classes', residues=4, num_queries=200)
    feature(
      size,
      'residues of heads',
      dict(residues=(0, 1, 0, 1)),
      residues=2,
      num_queries=300,
    )
    feature(size, 'prefix', prefix=10)
    feature(size, 'prefix with queries', prefix=10, prefix_q=True)
    feature(
      size,
      'all but residues',
      dict(dropout_rate=0.2, soft_cap=3.0),
      prefix=70,
      prefix_q=True,
      ids=True,
      dropout=True,
      sequences=2,
      right=30,
    )
  for size in (64, 128):
    feature(size, 'itself only', left=0)
    feature(size, 'negative right', left=120, right=-33)
    feature(size, 'nothing seen', left=-1, right=-1)
    feature(size, 'shifted', shift=-40, num_queries=200, num_keys=333)
    feature(size, 'shifted far', shift=300, num_queries=64, num_keys=400)
    feature(size, 'begin and end', begin=65, end=411, right=90)
    feature(
      size,
      'a window for each sequence',
      sequences=3,
      left=np.array([3, 64, UNBOUNDED]),
      shift=np.array([0, -7, 20]),
      end=np.array([500, 400, 77]),
    )
    for rows in (1, 7, 63, 64, 65, 127, 128, 129, 300):
      feature(size, f'{rows} rows', num_queries=rows, right=5)
    feature(size, 'one key', num_queries=200, num_keys=1, right=UNBOUNDED)
    feature(size, 'many heads to one', heads=8, kv_heads=1)
    feature(size, 'ids in any order', ids=True, left=UNBOUNDED, sequences=2)
    feature(
      size,
      'prefix of the future',
      dict(prefix_causal=False),
      prefix=130,
      right=64,
    )
    feature(size, 'prefix with ids', prefix=33, ids=True)
    feature(
      size,
      'residues with dropout and ids',
      dict(dropout_rate=0.5, residues=(1, 3, 0, 2)),
      residues=4,
      num_queries=150,
      ids=True,
      dropout=True,
    )
    # Every multiprocessor is busy, several times over: races show.
    for name, more in (
      ('window', dict(left=700)),
      ('full', dict(left=UNBOUNDED)),
      ('prefix', dict(left=300, prefix=64, prefix_q=True)),
      ('residues', dict(left=250, residues=4)),
    ):
      spec = {}
      if name == 'residues':
        spec = dict(residues=tuple(h % 4 for h in range(16)))
      feature(
        size,
        f'large, {name}',
        spec,
        sequences=2,
        heads=16,
        kv_heads=16 if name == 'residues' else 4,
        **dict(num_queries=512 if name == 'residues' else 2048) | more,
      )
  return found


KERNELS = _kernels()


def _tokens(batch, *tokens):
  return jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (batch, len(tokens)))


def _packed(length, *lengths):
  ids = np.repeat(np.arange(len(lengths)), lengths)
  ids = np.concatenate([ids, np.full(length - len(ids), -1)])
  return jnp.asarray(np.stack([ids, np.roll(ids, 17)]), jnp.int32)


def _calls():
  window, two_sided = longjax.SlidingWindow(99), longjax.SlidingWindow(64, 64)
  dilated = longjax.Dilated((64, 256, 1024), (1, 2, 4))
  start = longjax.Lambda(128, 10)
  rope = dict(position=longjax.RoPE())
  dropout = dict(dropout_rate=0.25, dropout_key=jax.random.key(5))
  found = {}

  def add(name, pattern, size=64, length=700, **options):
    inputs = {
      name: options.pop(name)
      for name in ('heads', 'kv_heads', 'batch', 'dtype', 'kv_length')
      if name in options
    }
    inputs = dict(size=size, length=length, dtype=BF16) | inputs
    found[name] = (pattern, inputs, options)

  for size in SIZES:
    add(f'D{size} window', window, size)
    add(f'D{size} LongNet', dilated, size, length=2048)
    add(f'D{size} Λ', start, size, **rope)
  add('float16', window, dtype=F16)
  for length in (1, 7, 127, 128, 129, 1500):
    add(f'{length} tokens', two_sided, length=length)
  add('GQA', window, heads=8, kv_heads=2, **rope)
  add('full', longjax.Full(causal=True), **rope)
  add('full, two-sided', longjax.Full(causal=False))
  add('dilation', longjax.SlidingWindow(30, 20, 4))
  add('dilation of each head', longjax.SlidingWindow(50, 0, (1, 2, 2, 3)))
  add('dilation that does not divide', longjax.SlidingWindow(30, 0, 3))
  add('LongNet two-sided', longjax.Dilated((64, 256), (1, 4), False))
  offsets = longjax.Dilated((64, 256), (1, 2), offsets='torchscale')
  add("LongNet with torchscale's offsets", offsets)
  add(
    'LongNet detached', longjax.Dilated((64, 256), (1, 2), True, 'paper', True)
  )
  add('LongNet that does not divide', longjax.Dilated((96, 250), (1, 6)))
  add('Λ without positions', start)
  add('Λ, long', start, length=2000, **rope)
  add('globals', two_sided, global_tokens=_tokens(2, 0, 5, 650, -1, 5))
  many = _tokens(2, *range(64))
  add('many globals', two_sided, length=1024, global_tokens=many, **rope)
  add('globals, causal', window, global_tokens=_tokens(2, 0, 300))
  add('documents', window, segment_ids=_packed(700, 300, 1, 250))
  add('documents, two-sided', two_sided, segment_ids=_packed(700, 333, 200))
  add('dropout', window, **dropout)
  add('dropout in LongNet', dilated, **dropout)
  add('dropout in Λ', start, **dropout, **rope)
  add('soft cap', window, logit_soft_cap=5.0)
  add('scale', window, scale=0.3)
  add('later queries', window, length=200, kv_length=700, q_positions=500)
  add(
    'offsets of each row',
    window,
    length=200,
    kv_length=700,
    q_positions=jnp.array([500, 320], jnp.int32),
    **rope,
  )
  add('few queries', longjax.Full(causal=False), length=3, kv_length=3000)
  return found


CALLS = _calls()

# Small enough for the interpreter: the rehearsal.
KERNELS['small, with a prefix'] = (
  {},
  BASE | dict(num_queries=65, heads=1, kv_heads=1, prefix=10, prefix_q=True),
)
CALLS['small'] = (
  longjax.SlidingWindow(40),
  dict(size=64, length=70, heads=1, batch=1, dtype=BF16),
  {},
)
REHEARSAL = ('kernel: small, with a prefix', 'call: small')
