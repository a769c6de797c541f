#!/bin/sh
# Everything that wants a Hopper GPU, in one command: correctness, benchmark,
# record. `make gpu` calls it; it needs no make, and no environment of ours where
# some python3 has jax (and torch, for the rivals).
#
#   sh experiments/benchmarks/gpu.sh [FOLDER [arguments of attention.py]]
#
# PYTHON, TORCH_PYTHON: interpreters. BUDGET: seconds that all may take.
# COMMIT: what to record where there is no git. SUITE=no: no correctness suite.
set -u
cd "$(dirname "$0")/../.."
started=$(date +%s)
record=${1:-runs/gpu_$(date +%Y-%m-%d_%H%M)}
[ $# -gt 0 ] && shift
budget=${BUDGET:-86400}
: "${COMMIT:=$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
export COMMIT
# The Makefile's choice for tests is the CPU.
unset JAX_PLATFORMS
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
mkdir -p "$record"

is_hopper='
import sys, jax
try:
  device = jax.devices("gpu")[0]
except RuntimeError as error:
  sys.exit(f"no GPU for jax {jax.__version__}: {error}")
if device.compute_capability != "9.0":
  sys.exit(f"{device.device_kind} is no Hopper GPU: the kernels refuse it")
print(f"jax {jax.__version__}, {device.device_kind}")
'
found=
for python in ${PYTHON:-.venv/bin/python python3}; do
  if "$python" -c "$is_hopper" >"$record/device.txt" 2>"$record/python.log"; then
    found=$python
    break
  fi
  echo "$python: $(tail -n 1 "$record/python.log")" >&2
done
rm -f "$record/python.log"
if [ -z "$found" ]; then
  echo 'make gpu needs a Hopper GPU and a python with jax[cuda13]' >&2
  exit 2
fi
cat "$record/device.txt"
nvidia-smi >>"$record/device.txt" 2>&1

code=0
if [ "${SUITE:-yes}" != no ]; then
  "$found" -m experiments.benchmarks.correctness --record="$record" --workers=12 \
    --budget-seconds=$((budget * 2 / 5)) || code=1
fi
spent=$(($(date +%s) - started))
"$found" -m experiments.benchmarks.attention --record="$record" \
  --budget-seconds=$((budget - spent - 20)) \
  ${TORCH_PYTHON:+--torch-python="$TORCH_PYTHON"} "$@" || code=1
exit $code
