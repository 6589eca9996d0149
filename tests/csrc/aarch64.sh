#!/usr/bin/env bash
# `make test-aarch64 [TESTS="pytest's arguments"]`: cross-compiles the operators for aarch64 and runs their tests under
# qemu-user. Debian's Python and PyTorch for aarch64 are unpacked in build/aarch64 (6 GB), not installed.
# QEMU_CPU chooses the emulated processor.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$PWD/build/aarch64 root=$PWD/build/aarch64/root python=$PWD/build/aarch64/bin/python
# Has neither SVE nor bf16 instructions. On a Cortex-A72, PyTorch 2.14 ends with an illegal instruction in the gradient
# of a float64 convolution with several threads.
export QEMU_CPU=${QEMU_CPU:-neoverse-n1}

for tool in aarch64-linux-gnu-g++ qemu-aarch64 mmdebstrap; do
  if ! command -v $tool > /dev/null; then
    echo "$tool was not found: apt-get install g++-aarch64-linux-gnu qemu-user mmdebstrap" >&2
    exit 1
  fi
done

if [ ! -e "$root" ]; then
  mkdir -p "$folder"
  mmdebstrap --variant=extract --architectures=arm64 --include=python3,libstdc++6 \
    "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$root.part"
  mkdir -p "$root.part/proc" # torch crashes if it finds the processors of this machine
  for i in $(seq 0 $(($(nproc) - 1))); do
    printf 'processor\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n\n' "$i"
  done > "$root.part/proc/cpuinfo"
  mv "$root.part" "$root"
fi

# A virtual environment whose interpreter is a script: tests start Python by sys.executable.
name=$(basename "$root"/usr/lib/python3.*)
mkdir -p "$folder/bin"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' > "$folder/pyvenv.cfg"
printf '#!/bin/sh\nexec qemu-aarch64 -L "%s" -0 "$0" "%s/usr/bin/%s" "$@"\n' "$root" "$root" "$name" > "$python"
chmod +x "$python"
packages=$folder/lib/$name/site-packages
if [ ! -e "$packages" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --only-binary=:all: \
    --python-version "${name#python}" --platform manylinux2014_aarch64 \
    $(printf -- '--platform manylinux_2_%s_aarch64 ' {17..28}) \
    --target "$packages.part" torch numpy pytest hypothesis
  mv "$packages.part" "$packages"
fi

.venv/bin/cmake -S . -B "$folder/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DDSPNET_PYTHON="$python" -DDSPNET_OUTPUT="$folder/library" -DDSPNET_CAPABILITY=all
.venv/bin/cmake --build "$folder/cmake"
DSPNET_LIBRARY=$folder/library/_C.so "$python" -m pytest -p no:cacheprovider "$@"
