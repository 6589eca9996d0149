// Replaces csrc/include/cuda_launch.h: a launch runs the kernel synchronously in the emulator.
#pragma once

#include "cuda_kernel.h"
#include "cuda_launchers.h"

namespace dspnet::cuda {

template <typename T>
struct Identity {
  using type = T;
};

template <typename... Parameters>
const char* launch(
    void (*kernel)(Parameters...), int64_t blocks, cudaStream_t, typename Identity<Parameters>::type... arguments) {
  static_assert(kThreads == emulator::kThreads && kWarp == emulator::kWarp);
  emulator::run(blocks, [&] { kernel(arguments...); });
  return nullptr;
}

} // namespace dspnet::cuda
