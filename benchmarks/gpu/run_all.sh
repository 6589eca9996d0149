#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, GPU tests, operators, the whole step. About eight minutes on one
# H100, without a network. Results go to benchmarks/results/, or to the folder given as the first argument.
#
#     bash benchmarks/gpu/run_all.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python has no torch with a CUDA device" >&2
  exit 2
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
out=${1:-benchmarks/results/$device}
mkdir -p "$out"

echo "== build"
DSPNET_BUILD=1 DSPNET_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps -e . || exit 1
"$python" -m dspnet_fast.info | tee "$out/info.txt"

echo "== tests"
timeout 200 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider tests/csrc tests/ops tests/train/test_graphs.py \
  -k "triton or cuda or gpu" | tee "$out/tests.txt"
tests=${PIPESTATUS[0]}

echo "== operators"
for dtype in bf16 fp32; do
  DSPNET_BENCH_DEVICE=cuda DSPNET_BENCH_DTYPE=$dtype timeout 90 "$python" -m pytest benchmarks/ --benchmark-only -q \
    -p no:cacheprovider --benchmark-json="$out/operators-$dtype.json" | tee "$out/operators-$dtype.txt"
done

echo "== whole step"
timeout 240 "$python" -m benchmarks.gpu.step --out "$out"

exit "$tests"
