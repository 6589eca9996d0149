// The host's side of a kernel: launching it, and the choice of a template by what is known at run time.
#pragma once

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>

#include <climits>

#include "cuda_kernel.h"
#include "cuda_launchers.h"

namespace dspnet::cuda {

inline const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
struct Identity {
  using type = T;
};

// Blocks of kThreads threads. Returns null or what CUDA reports of this launch.
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
    return text_of(cudaErrorInvalidConfiguration);
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0, stream);
  if (error != cudaSuccess) {
    (void)cudaGetLastError(); // it was reported: the next launch must not report it again
  }
  return text_of(error);
}

} // namespace dspnet::cuda
#endif
