// Launches kernels from the host.
#pragma once

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>

#include <climits>

#include "cuda_kernel.h"
#include "cuda_launchers.h"

namespace dspnet::cuda {

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
struct Identity {
  using type = T;
};

// Launches `blocks` blocks of kThreads threads. Returns null, or the error message of this launch.
template <typename... Parameters>
const char* launch(
    void (*kernel)(Parameters...),
    int64_t blocks,
    cudaStream_t stream,
    typename Identity<Parameters>::type... arguments) {
  if (blocks == 0) {
    return nullptr;
  }
  if (blocks > INT_MAX) {
    return error_text(cudaErrorInvalidConfiguration);
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0, stream);
  if (error != cudaSuccess) {
    (void)cudaGetLastError(); // clears the error, or the next launch would report it again
  }
  return error_text(error);
}

} // namespace dspnet::cuda
#endif
