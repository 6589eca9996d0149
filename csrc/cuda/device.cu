// What this library can do on a device.
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace device_kernels { // not without a name: NVRTC drops kernels that no other file can see

// Every .cu file is compiled for the same architectures: if a device runs this, it runs the others.
__global__ void probe() {}

} // namespace device_kernels

#ifndef __CUDACC_RTC__

const char* use_device(int device) {
  return text_of(cudaSetDevice(device));
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
  return text_of(error);
}

#endif

} // namespace dspnet::cuda
