"""PyTorch's rivals behind `timing.serve`; started by attention.py.

Any Python from 3.11 with torch, and transformers for Hugging Face's layer. On
a CPU, which the rehearsal uses, FlexAttention runs uncompiled and a dense
function stands in for the flash kernel.
"""

import dataclasses
import functools
import math

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from experiments.benchmarks import cases, layer, numerics, timing

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')
FLEX_BLOCK = 128


def synchronize(_=None):
  if ON_GPU:
    torch.cuda.synchronize()


# FlexAttention.


def mask_of(case):
  """The case's mask as FlexAttention wants it: no more tests than needed."""
  branch = case.branches[0]
  left, right = branch.left * branch.stride, branch.right * branch.stride
  stride, start, count = branch.stride, case.start, case.num_globals

  def mask(b, h, i, j):
    seen = i - j <= left if not case.full else i >= j
    if not case.full:
      seen = seen & (j - i <= right)
    if stride > 1:
      seen = seen & ((i - j) % stride == 0)
    if start:
      seen = seen | ((j < start) & (j <= i))
    if count:
      seen = seen | (i < count) | (j < count)
    return seen

  return mask


def block_mask(case):
  """FlexAttention's BlockMask, without the whole mask in memory.

  `create_block_mask` would hold length squared entries, or compile for it.
  """
  mask = mask_of(case)
  blocks = -(-case.length // FLEX_BLOCK)
  j = torch.arange(blocks * FLEX_BLOCK, device=DEVICE)
  some, every = [], []
  step = FLEX_BLOCK * max(1, 2**27 // (FLEX_BLOCK * len(j)))
  for first in range(0, len(j), step):
    i = torch.arange(first, min(first + step, len(j)), device=DEVICE)
    seen = mask(0, 0, i[:, None], j[None, :])
    seen = seen.view(-1, FLEX_BLOCK, blocks, FLEX_BLOCK)
    some.append(seen.any(3).any(1))
    every.append(seen.all(3).all(1))
  some, every = torch.cat(some), torch.cat(every)

  def ordered(wanted):
    """(number of blocks, their indices first) of each row."""
    indices = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)
    counted = wanted.sum(1)
    return counted.int()[None, None], indices.int()[None, None]

  return flex_attention.BlockMask.from_kv_blocks(
    *ordered(some & ~every),
    *ordered(every),
    BLOCK_SIZE=FLEX_BLOCK,
    mask_mod=mask,
    seq_lengths=(case.length, case.length),
  )


@functools.cache
def compiled_flex():
  if not ON_GPU:
    return flex_attention.flex_attention
  # Sixty cases, each a program of its own.
  torch._dynamo.config.recompile_limit = 256
  torch._dynamo.config.accumulated_recompile_limit = 1024
  return torch.compile(flex_attention.flex_attention, dynamic=False)


def of_flex(case):
  blocks = block_mask(case)

  def attend(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return compiled_flex()(q, k, v, block_mask=blocks).transpose(1, 2)

  return attend


# The flash kernel, and what can be built on it.


def flash(q, k, v, left=None, right=0):
  """(out [B, T, H, D], lse [B, H, T]) of a causal or two-sided window."""
  if not ON_GPU:
    return _dense_flash(q, k, v, left, right)
  return torch.ops.aten._flash_attention_forward(
    *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0),
    right == 0,
    False,
    window_size_left=left,
    window_size_right=None if left is None else right,
  )[:2]


def _dense_flash(q, k, v, left, right):
  s = torch.einsum('bthd,bshd->bhts', q.float(), k.float())
  i = torch.arange(q.shape[1])
  difference = i[:, None] - i
  seen = difference >= -right
  if left is not None:
    seen = seen & (difference <= left)
  s = (s * q.shape[3] ** -0.5).masked_fill(~seen, -math.inf)
  out = torch.einsum('bhts,bshd->bthd', s.softmax(-1), v.float())
  return out.to(q.dtype), s.logsumexp(-1)


def of_flash(case):
  branch = case.branches[0]
  left = None if case.full else branch.left
  return lambda q, k, v: flash(q, k, v, left, branch.right)[0]


def of_torch_cudnn(case):
  del case

  def attend(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    backend = SDPBackend.CUDNN_ATTENTION if ON_GPU else SDPBackend.MATH
    with sdpa_kernel(backend):
      out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)

  return attend


def of_gathered_classes(case, window=flash):
  """A dilated window as a window over copies of the residue classes.

  Args:
    window: computes (q, k, v, left, right) -> (out, anything).
  """
  branch, n = case.branches[0], case.branches[0].stride
  b, t, h, d = case.batch, case.length, case.heads, case.size

  def attend(q, k, v):
    folded = (
      x.view(b, t // n, n, h, d).transpose(1, 2).reshape(b * n, t // n, h, d)
      for x in (q, k, v)
    )
    out, _ = window(*folded, branch.left, branch.right)
    out = out.reshape(b, n, t // n, h, d).transpose(1, 2)
    return out.reshape(b, t, h, d)

  return attend


def of_gathered_flex(case):
  """The same with FlexAttention on the copies."""
  (branch,) = case.branches
  classes = dataclasses.replace(
    case,
    batch=case.batch * branch.stride,
    length=case.length // branch.stride,
    branches=(dataclasses.replace(branch, stride=1),),
  )
  attend = of_flex(classes)
  return of_gathered_classes(
    case, lambda q, k, v, left, right: (attend(q, k, v), None)
  )


def of_gathered_segments(case):
  """LongNet as its authors' library builds it: gather, flash, scatter, mix.

  For each (segment length, ratio) rows are copied out, attended to by a dense
  causal kernel, and copied back into zeros; the results are then mixed by
  their denominators, through which no gradient flows.
  """
  b, t, h, d = case.batch, case.length, case.heads, case.size

  def one(q, k, v, segment, ratio):
    count = t // segment
    rows = -(-segment // ratio)
    groups = -(-h // ratio)
    padding = (0, 0, 0, groups * ratio - h, 0, rows * ratio - segment)

    def gather(x):
      x = functional.pad(x.view(b * count, segment, h, d), padding)
      x = x.view(b * count, rows, ratio, groups, ratio, d)
      x = torch.diagonal(x, 0, 2, 4)  # row s of each ratio for head s
      x = x.permute(0, 1, 2, 4, 3)  # [.., groups, ratio, d]
      return x.reshape(b * count, rows, groups * ratio, d)[:, :, :h]

    def scatter(x, fill):
      # [segments, rows, h, width]; a row belongs to the heads that chose it.
      x = functional.pad(x, (0, 0, 0, groups * ratio - h))
      x = x.view(b * count, rows, groups, ratio, -1)
      full = x.new_full((*x.shape[:2], ratio, *x.shape[2:]), fill)
      torch.diagonal(full, 0, 2, 4).copy_(x.transpose(3, 4))
      full = full.view(b * count, rows * ratio, groups * ratio, -1)
      return full[:, :segment, :h].reshape(b, t, h, -1)

    x = (
      gather(x) if ratio > 1 else x.view(b * count, segment, h, d)
      for x in (q, k, v)
    )
    out, lse = flash(*(y.contiguous() for y in x))
    lse = lse.detach().transpose(1, 2)[..., None]
    if ratio == 1:
      return out.reshape(b, t, h, d), lse.reshape(b, t, h, 1)
    return scatter(out, 0.0), scatter(lse, -1e8)

  def attend(q, k, v):
    parts = [
      one(q, k, v, branch.segment, branch.stride) for branch in case.branches
    ]
    if len(parts) == 1:
      return parts[0][0]
    with torch.no_grad():
      mix = torch.stack([lse for _, lse in parts]).softmax(0).to(q.dtype)
    return sum(
      weight * out for weight, (out, _) in zip(mix, parts, strict=True)
    )

  return attend


def of_gather(case):
  if case.family == 'longnet':
    return of_gathered_segments(case)
  return of_gathered_classes(case)


ATTEND = {
  cases.FLEX: of_flex,
  cases.FLASH: of_flash,
  cases.TORCH_CUDNN: of_torch_cudnn,
  cases.GATHER: of_gather,
  cases.GATHER_FLEX: of_gathered_flex,
}


def measured(runs, inputs):
  """{mode: most bytes in use, with one set of inputs}; {} on a CPU."""
  if not ON_GPU:
    return {}
  peaks = {}
  for mode, run in runs.items():
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(*inputs)
    synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    arrays = [
      x
      for y in inputs
      for x in (y.parameters() if hasattr(y, 'parameters') else (y,))
    ]
    if mode == cases.MODES[0]:
      arrays = arrays[:-1]  # the cotangent is not used
    peaks[mode] = peak + sum(x.nbytes for x in arrays)
    del result
  return peaks


def profile(run, inputs):
  activities = [torch.profiler.ProfilerActivity.CUDA]
  with torch.profiler.profile(activities=activities) as recorded:
    run(*inputs)
    synchronize()
  return [
    (event.key, event.device_time_total / 1e3)
    for event in recorded.key_averages()
  ]


def prepare(who, case, reference):
  if case.family == 'layer':
    return prepare_layer(case, reference)
  attend = ATTEND[who](case)
  shape = case.batch, case.length, case.heads, case.size
  dtype = getattr(torch, case.dtype)
  generator = torch.Generator(DEVICE).manual_seed(0)
  arrays = [
    torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator)
    for _ in range(4 * timing.SETS)
  ]
  sets = [arrays[i : i + 4] for i in range(0, len(arrays), 4)]
  # FlexAttention has no gradient on a CPU, and one program serves both modes
  # if gradients are always on.
  modes = cases.MODES[: 1 if who in cases.WORKERS['flex'] and not ON_GPU else 2]
  for q, k, v, _ in sets:
    for x in (q, k, v):
      x.requires_grad_(len(modes) > 1)

  def forward(q, k, v, dout):
    del dout
    return attend(q, k, v).detach()

  def both(q, k, v, dout):
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

  runs = dict(zip(modes, (forward, both), strict=False))
  memory = {}

  def check():
    results = {'forward': forward(*sets[0])}
    if len(modes) > 1:
      results |= zip(numerics.NAMES, both(*sets[0]), strict=True)
    detached = [x.detach() for x in sets[0]]
    mixed = who == cases.GATHER and len(case.branches) > 1
    errors = numerics.check(torch, case, detached, results, detached=mixed)
    del results
    memory.update(measured(runs, sets[0]))
    return errors

  return timing.Prepared(runs, sets, check, lambda: memory, profile)


def hugging_face_layer(case, weights):
  import transformers
  from transformers.models.longformer import modeling_longformer

  config = transformers.LongformerConfig(
    hidden_size=case.heads * case.size,
    num_attention_heads=case.heads,
    attention_window=[2 * case.branches[0].left],
    num_hidden_layers=1,
    attention_probs_dropout_prob=0.0,
  )
  module = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
  # The global projections are unused without global tokens.
  missing = module.load_state_dict(
    {name: torch.from_numpy(x) for name, x in weights.items()}, strict=False
  )
  if missing.unexpected_keys:
    raise ValueError(f'unknown weights {missing.unexpected_keys}')
  return module.eval().to(DEVICE)


def layer_runs(case):
  """{mode: function of (module, hidden, dout)}."""

  def out_of(module, hidden):
    mask = torch.zeros(hidden.shape[:2], device=DEVICE)
    mask[:, : case.num_globals] = 10_000.0
    return module(
      hidden,
      attention_mask=mask,
      is_index_masked=mask < 0,
      is_index_global_attn=mask > 0,
      is_global_attn=case.num_globals > 0,
    )[0]

  def forward(module, hidden, dout):
    del dout
    with torch.no_grad():
      return out_of(module, hidden)

  def both(module, hidden, dout):
    hidden = hidden.detach().requires_grad_()
    out = out_of(module, hidden)
    used = [x for x in module.parameters() if x.requires_grad]
    gradients = torch.autograd.grad(out, [hidden, *used], dout)
    return out.detach(), *gradients

  return dict(zip(cases.MODES, (forward, both), strict=True))


def prepare_layer(case, reference):
  weights, hidden, dout = layer.inputs(case)
  module = hugging_face_layer(case, weights)
  for name, parameter in module.named_parameters():
    parameter.requires_grad_(name in weights)
  hidden, dout = (torch.from_numpy(x).to(DEVICE) for x in (hidden, dout))
  runs = layer_runs(case)
  # The reference of everybody: this layer in float32, of one batch row.
  out, d_hidden, *_ = runs[cases.MODES[1]](
    module.float(), hidden[:1].float(), dout[:1].float()
  )
  np.savez(
    reference,
    out=numerics.to_numpy(out[0]),
    d_hidden=numerics.to_numpy(d_hidden[0]),
  )
  module.to(getattr(torch, case.dtype))
  sets = [
    (module, *(torch.roll(x, n, dims=1) for x in (hidden, dout)))
    for n in range(timing.SETS)
  ]
  memory = {}

  def check():
    out, d_hidden, *_ = runs[cases.MODES[1]](*sets[0])
    forward = runs[cases.MODES[0]](*sets[0])
    errors = layer.check(reference, out, d_hidden, forward)
    del out, d_hidden, forward
    memory.update(measured(runs, sets[0]))
    return errors

  return timing.Prepared(runs, sets, check, lambda: memory, profile)


def rates():
  n, seconds = (8192, 0.3) if ON_GPU else (128, 0.01)
  a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
  source = torch.ones(8 * n * n, device=DEVICE)
  target = torch.empty_like(source)

  def best(f, *arguments):
    def run(calls):
      return timing.synchronized_seconds(f, [arguments], calls, synchronize)[0]

    run(3)
    calls = max(3, min(100, int(seconds / run(3))))
    return min(run(calls) for _ in range(3))

  return {
    'flops': 2 * n**3 / best(torch.matmul, a, b),
    'bytes': 2 * source.nbytes / best(target.copy_, source),
  }


if __name__ == '__main__':
  timing.serve(
    prepare,
    synchronize,
    rates,
    torch.cuda.empty_cache,
    versions={'torch': torch.__version__},
    device={
      'kind': torch.cuda.get_device_name() if ON_GPU else 'cpu',
      'platform': 'gpu' if ON_GPU else 'cpu',
      'compiler': f'CUDA {torch.version.cuda}',
    },
  )
