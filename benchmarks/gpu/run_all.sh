#!/usr/bin/env bash
# Measure on a GPU, in two calls. Planned for less than ten minutes each on one H100 with 16 cores; needs no network.
#
#     bash benchmarks/gpu/run_all.sh [FOLDER]             verification, steps in bf16, kernels
#     bash benchmarks/gpu/run_all.sh --second [FOLDER]    torch.compile, all tests, tf32, fp32, more sizes, operators
#
# Writes to the folder, by default benchmarks/results/<GPU>: results.md, the page; results.jsonl, one line per result,
# written immediately; log.txt, tests.txt, background.txt, info.txt, ncu.csv. The second call adds to them. Every part
# has a time limit; failures do not stop the other parts and are listed at the end. The most important parts run first.
# The exit code is 0 without failures.
#
# PYTHON                Python with torch [python3]
# DSPNET_BENCH_SECONDS  time limit of all parts together, to which the parts' limits are scaled [570]
# DSPNET_BENCH_ONLY     regular expression of the parts to run, for example '^(build|step)'
# DSPNET_BENCH_DEVICE   cpu: try the script with small networks on the CPU, which stands in for a GPU [cuda]
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

second=
[ "${1:-}" != --second ] || { second=1; shift; }
python=${PYTHON:-python3}
planned=570
total=${DSPNET_BENCH_SECONDS:-$planned}
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
export PYTHONUNBUFFERED=1 DSPNET_BENCH_LOCK=$work/gpu DSPNET_BENCH_DEVICE=${DSPNET_BENCH_DEVICE:-cuda}

found=$(DSPNET_BENCH_RESULTS=$work/environment timeout 120 "$python" -m benchmarks.gpu.probe) || exit 2
read -r device architecture <<< "$found"
out=${1:-benchmarks/results/$device}
mkdir -p "$out"
results=$out/results.jsonl
log=$out/log.txt
if [ -z "$second" ]; then
  mv "$work/environment" "$results"
  rm -f "$out"/{results.md,tests.txt,log.txt,background.txt,info.txt,ncu.csv}
else
  cat "$work/environment" >> "$results"
fi
export DSPNET_BENCH_RESULTS=$results

# part NAME SECONDS COMMAND...: run a command with a time limit, of a planned total, and record its exit code.
# optional=1: it may time out.
part() {
  local name=$1 limit=$(( $2 * total / planned )) began=$SECONDS code=-1
  shift 2
  [[ $name =~ ${DSPNET_BENCH_ONLY:-.} ]] || return 0
  (( limit <= total - SECONDS )) || limit=$(( total - SECONDS ))
  if (( limit > 0 && limit * planned >= 9 * total )); then
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
step() { # SECONDS PRECISION NETWORK IMAGES PIXELS [OPTION...]
  DSPNET_BENCH_DTYPE=$2 part "step ${*:2}" "$1" "$python" -m benchmarks.gpu.step "${@:3}"
  page > /dev/null
}
operators() { # NAME SECONDS PRECISION [PYTEST OPTION...]; the next attempt skips variants that broke or blocked the GPU
  local name=$1 until=$(( SECONDS + $2 * total / planned )) precision=$3 attempt
  shift 3
  for attempt in 1 2 3; do
    DSPNET_BENCH_DTYPE=$precision part "$name, attempt $attempt" $(( (until - SECONDS) * planned / total )) \
      "$python" -m pytest benchmarks/ops --benchmark-only --benchmark-quiet -q --tb=short -p no:cacheprovider \
      "${timeouts[@]}" "$@"
    tail -n 5 "$results" | grep -q '"operators done"' && break
    (( until - SECONDS > 10 && total - SECONDS > 10 )) || break
  done
  page > /dev/null
}
tests() { # NAME SECONDS PYTEST OPTION...; with the GPU's lock, so that nothing is timed meanwhile
  OMP_NUM_THREADS=1 log=$out/tests.txt part "$1" "$2" flock "$DSPNET_BENCH_LOCK" "$python" -m pytest \
    --continue-on-collection-errors -v -rfE --tb=short -p no:cacheprovider -p benchmarks.gpu.verdicts \
    "${timeouts[@]}" "${workers[@]}" "${@:3}"
  page > /dev/null
}
tool() { # NAME SECONDS PROGRAM OPTION...: a part that needs a program of CUDA's toolkit
  if command -v "$3" > /dev/null; then part "$@"; else echo "== $1: $3 is not installed"; fi
}

metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,lts__t_bytes.sum,lts__throughput.avg.pct_of_peak_sustained_elapsed,smsp__issue_active.avg.pct
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread

timeouts=()
workers=()
"$python" -c 'import pytest_timeout' 2> /dev/null && timeouts=(--timeout=120 --timeout-method=thread)
"$python" -c 'import xdist' 2> /dev/null && workers=(-n "$(( cores > 3 ? cores - 2 : 1 ))" --max-worker-restart=40)

# A CPU that stands in uses what is installed and built.
[ "$DSPNET_BENCH_DEVICE" = cuda ] || DSPNET_BENCH_ONLY=${DSPNET_BENCH_ONLY:-'^(limits|warm|verify|step|profile|train|tests|oper)'}
# Install without compiled libraries, which is quick, so that everything can be imported.
DSPNET_BUILD=0 part install 60 "$python" -m pip install --quiet --disable-pip-version-check --no-index \
  --no-build-isolation --no-deps -e .
# If the installation failed, link the kernels to the place where it puts them.
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("dspnet_fast.kernels"))' \
  || { ln -s ../kernels dspnet_fast/kernels && made_link=1; }
[ -n "$second" ] || part limits 20 "$python" -m benchmarks.gpu.probe --limits

# CPU-bound parts in the background: the build of both libraries for one architecture each, Triton kernels.
export DSPNET_CUDA_ARCHITECTURES=$architecture DSPNET_CAPABILITY=AVX2
warm() { # SECONDS [ARGUMENT...]
  log=$out/background.txt optional=1 part warm "$1" "$python" -m benchmarks.gpu.warm \
    --processes $(( cores > 4 ? cores - 2 : cores )) "${@:2}"
}
log=$out/background.txt part build 140 bash -c '
  DSPNET_BUILD=1 DSPNET_CUDA=1 "$0" setup.py build_ext --inplace && exit
  echo "== build failed: build only the parts that compile"
  DSPNET_BUILD=auto DSPNET_CUDA=auto "$0" setup.py build_ext --inplace
  exit 1' "$python" &
build=$!

if [ -z "$second" ]; then
  warm 65 bf16 &
  warming=$!
  # The baseline needs no kernels of ours; replays of graphs do not wait for the CPU.
  step 60 bf16 mobilenet_v3_large 1024 128 --group baseline --seconds 3
  wait "$warming"
  part verify 70 "$python" -m benchmarks.gpu.verify
  page > /dev/null
  optional=1 tool sanitizer 20 compute-sanitizer --error-exitcode 9 "$python" -m benchmarks.gpu.kernels --small \
    "depthwise k3 forward" "expand forward"
  wait "$build"
  "$python" -m dspnet_fast.info > "$out/info.txt" 2>&1
  step 100 bf16 mobilenet_v3_large 1024 128
  DSPNET_BENCH_DTYPE=bf16 part profile 50 "$python" -m benchmarks.gpu.profile mobilenet_v3_large 1024 128
  page > /dev/null
  DSPNET_BENCH_DTYPE=bf16 log=$out/ncu.csv optional=1 tool ncu 80 ncu --clock-control none --csv --page raw \
    --kernel-name regex:conv_moments --metrics "$metrics" "$python" -m benchmarks.gpu.kernels
  tests "training" 50 tests/train/test_cuda_graphs.py tests/train/test_final_weights.py -k "cuda or gpu or graphs"
  step 40 bf16 mobilenet_v3_large 64 96 --group short --seconds 4
  step 45 bf16 resnet 512 128 --group short --seconds 4
  operators "operators CUDA" 40 bf16 -k "lars_ema_step or adamw_ema_step or normalized_mse or ema_update"
else
  # torch.compile prepares while tests run, which are not timed, and takes the GPU's lock before it is timed.
  TORCHINDUCTOR_COMPILE_THREADS=$(( cores > 2 ? cores / 2 : 1 )) DSPNET_BENCH_DTYPE=bf16 log=$out/background.txt \
    part "step bf16 mobilenet_v3_large 1024 128 --group compiled" 300 \
    "$python" -m benchmarks.gpu.step mobilenet_v3_large 1024 128 --group compiled --seconds 4 &
  compiled=$!
  wait "$build"
  tests "tests of CUDA" 60 tests/csrc/test_on_gpu.py tests/ops -k "(cuda or gpu) and not triton"
  tests "tests of Triton" 200 tests/ops -k "triton and not fp16" # fp16 has 1,500 more kernels, and no run uses it
  wait "$compiled"
  optional=1
  warm 60 --second bf16 tf32
  operators "operators bf16" 90 bf16
  step 60 tf32 mobilenet_v3_large 1024 128 --group short
  step 60 bf16 mobilenet_v3_large 1024 128 --group cudnn
  step 60 bf16 mobilenet_v3_large 256 224 --group short
  step 60 fp32 mobilenet_v3_large 1024 128 --group short
  step 40 bf16 resnet 256 224 --group short
  step 40 bf16 resnet 64 96 --group short
  operators "operators tf32" 60 tf32
  tests "tests of Triton in fp16" 90 tests/ops -k "triton and fp16"
fi
page
