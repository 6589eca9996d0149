#!/usr/bin/env bash
# Build, GPU tests, short training runs, whole steps and operators on a GPU. Planned for less than eight minutes on one
# H100 with 16 cores; needs no network.
#
#     bash benchmarks/gpu/run_all.sh [FOLDER]
#
# Writes to the folder, by default benchmarks/results/<GPU>: results.md, the page; results.jsonl, one line per result,
# written immediately; tests.txt, log.txt, background.txt, info.txt. Every part has a time limit; failures do not stop
# the other parts and are listed at the end. The most important parts run first. The exit code is 0 without failures.
#
# PYTHON                Python with torch [python3]
# DSPNET_BENCH_SECONDS  time limit of all parts together [470]
# DSPNET_BENCH_ONLY     regular expression of the parts to run, for example '^(build|step)'
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

python=${PYTHON:-python3}
total=${DSPNET_BENCH_SECONDS:-470}
cores=$(nproc)
work=$(mktemp -d)
made_link=
cleanup() {
  local jobs
  jobs=$(jobs -p)
  [ -z "$jobs" ] || kill $jobs 2> /dev/null
  [ -z "$made_link" ] || rm -f dspnet_fast/kernels
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
export PYTHONUNBUFFERED=1 DSPNET_BENCH_LOCK=$work/gpu DSPNET_BENCH_DEVICE=cuda

found=$(DSPNET_BENCH_RESULTS=$work/environment timeout 120 "$python" -m benchmarks.gpu.probe) || exit 2
read -r device architecture <<< "$found"
out=${1:-benchmarks/results/$device}
mkdir -p "$out"
results=$out/results.jsonl
log=$out/log.txt
mv "$work/environment" "$results"
rm -f "$out"/{results.md,tests.txt,log.txt,background.txt,info.txt}
export DSPNET_BENCH_RESULTS=$results

# part NAME SECONDS COMMAND...: run a command with a time limit and record its exit code; optional=1: it may time out.
part() {
  local name=$1 limit=$2 began=$SECONDS code=-1
  shift 2
  [[ $name =~ ${DSPNET_BENCH_ONLY:-.} ]] || return 0
  (( limit <= total - SECONDS )) || limit=$(( total - SECONDS ))
  if (( limit >= 10 )); then
    echo "== $name" >> "$log"
    timeout -k 5 "$limit" "$@" >> "$log" 2>&1 < /dev/null &
    local child=$!
    (( BASH_SUBSHELL == 0 )) || trap 'kill "$child" 2> /dev/null; exit 143' TERM # for parts in the background
    wait "$child"
    code=$?
  fi
  printf '{"kind": "part", "name": "%s", "seconds": %d, "code": %d, "optional": %d, "at": %d}\n' \
    "$name" $(( SECONDS - began )) "$code" "${optional:-0}" "$began" >> "$results"
  echo "== $name: started at $began s, took $(( SECONDS - began )) s, exit code $code"
  return "$(( code < 0 ? 1 : code ))"
}
page() { "$python" -m benchmarks.gpu.page "$results" "$out/results.md"; }
step() { # PRECISION NETWORK IMAGES PIXELS [OPTION...]
  DSPNET_BENCH_DTYPE=$1 part "step $*" 75 "$python" -m benchmarks.gpu.step "${@:2}"
  page > /dev/null
}
operators() { # PRECISION SECONDS [PYTEST OPTION...]; the next attempt skips variants that broke or blocked the GPU
  local precision=$1 until=$(( SECONDS + $2 )) attempt
  shift 2
  for attempt in 1 2 3; do
    DSPNET_BENCH_DTYPE=$precision part "operators $precision${DSPNET_BENCH_COMPILE:+ compiled}, attempt $attempt" \
      $(( until - SECONDS )) "$python" -m pytest benchmarks/ops --benchmark-only --benchmark-quiet -q --tb=short \
      -p no:cacheprovider "${timeouts[@]}" "$@"
    tail -n 5 "$results" | grep -q '"operators done"' && break
    (( until - SECONDS > 10 && total - SECONDS > 10 )) || break
  done
  page > /dev/null
}

timeouts=()
workers=()
"$python" -c 'import pytest_timeout' 2> /dev/null && timeouts=(--timeout=120 --timeout-method=thread)
"$python" -c 'import xdist' 2> /dev/null && workers=(-n "$(( cores > 3 ? cores - 2 : 1 ))" --max-worker-restart=40)
tests=("$python" -m pytest --continue-on-collection-errors -v -rfE --tb=short -p no:cacheprovider
  -p benchmarks.gpu.verdicts "${timeouts[@]}" "${workers[@]}")

# Install without compiled libraries, which is quick, so that everything can be imported.
DSPNET_BUILD=0 part install 90 "$python" -m pip install --quiet --disable-pip-version-check --no-index \
  --no-build-isolation --no-deps -e .
# If the installation failed, link the kernels to the place where it puts them.
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("dspnet_fast.kernels"))' \
  || { ln -s ../kernels dspnet_fast/kernels && made_link=1; }

# CPU-bound parts in the background: the build, compiling Triton kernels, torch.compile of the baseline. Meanwhile the
# tests of the Triton kernels run, which do not need the build; nothing is timed.
export DSPNET_CUDA_ARCHITECTURES=$architecture
log=$out/background.txt part build 300 bash -c '
  DSPNET_BUILD=1 DSPNET_CUDA=1 "$0" setup.py build_ext --inplace && exit
  echo "== build failed: build only the parts that compile"
  DSPNET_BUILD=auto DSPNET_CUDA=auto "$0" setup.py build_ext --inplace
  exit 1' "$python" &
build=$!
shares=$(( cores > 2 ? cores / 2 : 1 ))
warmers=()
for (( share = 0; share < shares; share++ )); do
  log=$out/background.txt optional=1 part "warm $share" 180 nice -n 5 "$python" -m benchmarks.gpu.warm $share $shares &
  warmers+=($!)
done
TORCHINDUCTOR_COMPILE_THREADS=$(( cores > 2 ? cores / 2 : 1 )) DSPNET_BENCH_DTYPE=bf16 log=$out/background.txt \
  optional=1 part "torch.compile" 600 \
  "$python" -m benchmarks.gpu.step mobilenet_v3_large 1024 128 --compiled --seconds 4 &
compiled=$!

OMP_NUM_THREADS=1 DSPNET_LIBRARY=$work/none log=$out/tests.txt part "tests of Triton" 150 \
  "${tests[@]}" tests/ops -k "triton and not fp16" # fp16 has 1,500 more kernels, and no run uses it
page > /dev/null
wait "$build"
"$python" -m dspnet_fast.info > "$out/info.txt" 2>&1
OMP_NUM_THREADS=1 log=$out/tests.txt part "tests of CUDA" 60 "${tests[@]}" tests/csrc/test_on_gpu.py tests/ops \
  -k "(cuda or gpu) and not triton"
OMP_NUM_THREADS=1 log=$out/tests.txt part "training" 90 "${tests[@]}" tests/train/test_cuda_graphs.py \
  tests/train/test_final_weights.py -k "cuda or gpu or graphs"
page > /dev/null
wait "${warmers[@]}"

# Parts that need exclusive use of the GPU.
step bf16 mobilenet_v3_large 1024 128
operators bf16 100
step bf16 mobilenet_v3_large 64 96
step bf16 resnet 512 128
optional=1
step tf32 mobilenet_v3_large 1024 128
step bf16 mobilenet_v3_large 1024 128 --tried
step bf16 mobilenet_v3_large 256 224
operators tf32 60
step fp32 mobilenet_v3_large 1024 128
OMP_NUM_THREADS=1 log=$out/tests.txt part "tests of Triton in fp16" 90 "${tests[@]}" tests/ops -k "triton and fp16"
step bf16 resnet 256 224
step bf16 resnet 64 96
step tf32 mobilenet_v3_large 256 224
step tf32 mobilenet_v3_large 64 96
DSPNET_BENCH_COMPILE=1 operators bf16 60 benchmarks/ops/bench_conv_moments.py -k compile
wait "$compiled"

page
