// Selects a device, and checks whether this library can run on it.
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace device_kernels { // named: NVRTC drops kernels in anonymous namespaces

// All .cu files are compiled for the same architectures: if a device can run this kernel, it can run all.
__global__ void probe() {}

} // namespace device_kernels

#ifndef __CUDACC_RTC__

const char* use_device(int device) {
  return error_text(cudaSetDevice(device));
}

const char* problem(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) {
      cudaFuncAttributes attributes;
      error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
      (void)cudaSetDevice(before);
    }
  }
  (void)cudaGetLastError();
  return error_text(error);
}

#endif

} // namespace dspnet::cuda
