"""How far a LongNet training step goes, read off the compiler; nothing is run.

  python -m experiments.scale --devices=v5p:4x4x4 --tokens=2^26 --out=DIR
  python -m experiments.scale --table --out=DIR

The training step of configs/longnet_stack.py (125m, bytes, rope: 12 layers of
768; forward, backward and AdamW, each block computed again) on one sequence is
compiled ahead of time for a topology that need not be there, the sequence split
over all of its devices. DIR gets scale.json, to which lines are added, and what
they say is printed: per device the peak memory, the bytes of each kind of
collective for a layer and for a step, the operations, operations for each byte
that is sent, and the time that both imply at the vendor's figures.

The schedule has segments of 2048 * G^k with ratios of G^k (--growth=G), to the
length of the sequence; --ratio=R keeps the ratio R of segments longer than a
device's share. Bytes of a collective are those of its largest operand or
result: what a device sends or receives of it is as much, to a factor of two.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import time

import jax

from experiments import collectives, memory, stamp, targets
from longjax import Dilated
from longjax.evaluation.flops import decoder_flops
from longjax.nn.memory import POLICIES
from longjax.training.devices import Devices

# bfloat16 operations a second, and bytes a second to other devices (all links,
# both ways), as the vendors have them.
SPEEDS = {
  'h200': (989e12, 900e9),
  'v5e': (197e12, 200e9),
  'v5p': (459e12, 600e9),
  'v6e': (918e12, 400e9),
}
# Positions are 32-bit numbers.
LARGEST = 2**30
# What --table compiles: all with three gathered patterns or fewer.
TABLE = (
  ('v5p:2x2x1', 2**17, 4),
  ('v5p:2x2x1', 2**20, 4),
  ('v5p:2x2x1', 2**22, 64),
  ('v5e:16x16', 2**26, 64),
  ('v5p:4x4x4', 2**26, 64),
  ('v6e:16x16', 2**27, 64),
  ('v5p:8x8x8', 2**29, 64),
  ('v5p:8x8x8', 2**30, 64),
)


def make_pattern(
  length: int, share: int, growth: int, ratio: int | None = None
) -> Dilated:
  """The schedule that the module's docstring describes.

  Args:
    length: of the sequence.
    share: of each device.
    growth: from one segment to the next.
    ratio: of segments longer than a share, if not in proportion.
  """
  segments = [2048]
  while segments[-1] * growth < length:
    segments.append(segments[-1] * growth)
  if segments[-1] < length:
    segments.append(length)
  return Dilated(
    tuple(segments),
    tuple(
      ratio if ratio and segment > share else segment // 2048
      for segment in segments
    ),
  )


def compile_step(
  name: str,
  length: int,
  *,
  growth: int = 64,
  ratio: int | None = None,
  **options,
) -> dict:
  """A line of the table; 'error' where the program does not fit.

  Args:
    name: of the topology, see `targets.devices`.
    length: of the sequence.
    growth, ratio: of the pattern, see `make_pattern`.
    **options: of the model.

  Raises:
    ValueError: a length that the devices do not divide, or too long.
  """
  if length > LARGEST:
    raise ValueError(
      f'{length} tokens are more than {LARGEST}: positions are 32-bit numbers'
    )
  devices = Devices({'seq': -1}, devices=targets.devices(name))
  share = devices.share_of_sequence('--tokens', length)
  pattern = make_pattern(length, share, growth, ratio)
  line = {
    'devices': name,
    'count': devices.num_devices,
    'tokens': length,
    'segments': pattern.segment_lengths,
    'ratios': pattern.ratios,
    'gathered': sum(w > share for w in pattern.segment_lengths),
    **options,
  }
  start = time.monotonic()
  f, arguments = memory.training_step(length, pattern, devices, **options)
  try:
    compiled = jax.jit(f, donate_argnums=0).lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    line['error'] = memory.first_of(error)
  else:
    peak = compiled.memory_analysis().peak_memory_in_bytes
    line['peak_gib'] = round(peak / memory.GIB, 2)
    line |= traffic(compiled.as_text())
    line |= bounds(name, length, devices.num_devices, pattern, line, **options)
  line['compile_s'] = round(time.monotonic() - start, 1)
  return line


def traffic(text: str) -> dict:
  """MiB of each kind of collective, in loops over layers and outside."""
  sums = {'layer_mib': collections.Counter(), 'step_mib': collections.Counter()}
  counts = {'layer_count': 0, 'step_count': 0}
  for one in collectives.compiled_collectives(text):
    where = 'layer' if one.in_loop else 'step'
    sums[f'{where}_mib'][one.kind] += one.bytes / 2**20
    counts[f'{where}_count'] += 1
  rounded = {
    name: {kind: round(mib, 3) for kind, mib in sorted(sum_.items())}
    for name, sum_ in sums.items()
  }
  return rounded | counts


def bounds(name, length, count, pattern, line, **options) -> dict:
  """Operations of a device, and the seconds that they and sending take."""
  model = memory.model_keywords(**options)
  layers = model['num_layers']
  flops = decoder_flops(
    length,
    patterns=(pattern,) * layers,
    **{
      key: model[key]
      for key in ('vocab_size', 'features', 'num_heads', 'mlp_features')
    },
  )
  # Forward, again for the backward pass, and that: twice as much.
  operations = 4 * flops.total / count
  sent = 2**20 * (
    layers * sum(line['layer_mib'].values()) + sum(line['step_mib'].values())
  )
  speed, links = SPEEDS[name.partition(':')[0]]
  return {
    'tflop': round(operations / 1e12, 2),
    'sent_mib': round(sent / 2**20, 1),
    'flop_per_byte_sent': round(operations / sent) if sent else None,
    'compute_s': round(operations / speed, 3),
    'send_s': round(sent / links, 4),
  }


def table(lines: list[dict]) -> str:
  """Lines for a person."""
  head = (
    'devices',
    'tokens',
    'gathered',
    'peak GiB',
    'MiB a layer',
    'MiB a step',
    'TFLOP',
    'FLOP a byte',
    'compute s',
    'send s',
  )
  rows = [head]
  for line in lines:
    tokens = f'2^{math.log2(line["tokens"]):g}'
    start = (line['devices'], tokens, str(line['gathered']))
    if 'error' in line:
      rows.append((*start, line['error'], *[''] * 6))
      continue
    rows.append(
      (
        *start,
        f'{line["peak_gib"]:.1f}',
        f'{sum(line["layer_mib"].values()):.1f}',
        f'{sum(line["step_mib"].values()):.1f}',
        f'{line["tflop"]:,.1f}',
        f'{line["flop_per_byte_sent"] or 0:,}',
        f'{line["compute_s"]:.2f}',
        f'{line["send_s"]:.3f}',
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(text.rjust(w) for text, w in zip(row, widths, strict=True))
    for row in rows
  )


def parse_tokens(text: str) -> int:
  """'2^20' or '1048576'."""
  found = re.fullmatch(r'(\d+)(?:\^(\d+))?', text)
  if not found:
    raise argparse.ArgumentTypeError(f'{text!r} is not as 1048576 or 2^20')
  return int(found[1]) ** int(found[2] or 1)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--out', type=pathlib.Path, required=True, help='folder of the record')
  add('--devices', default='v5p:2x2x1', help='the topology')
  add('--tokens', type=parse_tokens, default=2**17)
  add('--growth', type=int, default=64)
  add('--ratio', type=int, help='of segments longer than a share')
  add('--remat', choices=tuple(POLICIES), default='block')
  add('--remat_blocks', type=int, default=1)
  add('--implementation', default='xla')
  add('--table', action='store_true', help='compile all of the table')
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  record = args.out / 'scale.json'
  lines = json.loads(record.read_text()) if record.exists() else []
  wanted = [(args.devices, args.tokens, args.growth)]
  for name, tokens, growth in TABLE if args.table else wanted:
    try:
      line = compile_step(
        name,
        tokens,
        growth=growth,
        ratio=args.ratio,
        remat=args.remat,
        remat_blocks=args.remat_blocks,
        implementation=args.implementation,
      )
    except ValueError as error:
      parser.error(str(error))
    # Nothing runs on the devices that are compiled for: they are the line's.
    line['stamp'] = stamp.stamp(
      stamp.command('experiments.scale', argv), device=stamp.cpu()
    )
    lines.append(line)
    record.write_text(json.dumps(lines, indent=2) + '\n')
    print(table([line]), flush=True)
  print(table(lines))


if __name__ == '__main__':
  main()
