// The interface between the .cu files and csrc/cuda/operators.cpp. It consists of raw pointers, sizes and a stream, so
// the .cu files do not include torch, and operators.cpp does not include CUDA's headers. operators.cpp has checked the
// arguments. Launchers return null or CUDA's error message; they neither allocate nor synchronize, so CUDA graphs can
// capture them.
#pragma once

#include <cstdint>

#include "cuda_dtype.h"

typedef struct CUstream_st* cudaStream_t; // as in CUDA's own headers

namespace dspnet::cuda {

// --- device.cu -------------------------------------------------------------------------------------------------------
// The error message if this library cannot run on this device, or null.
const char* problem(int device);

// Sets the device of the calling thread. The CUDA runtime is linked statically, so torch's current device does not
// apply.
const char* use_device(int device);

// --- ema_update.cu ---------------------------------------------------------------------------------------------------
struct EmaPair {
  void* target;
  const void* online;
  int64_t size; // elements
};

// A target must not share memory with another tensor, except if it is identical to its online tensor.
const char* ema_update(DType dtype, const EmaPair* pairs, int64_t count, double tau, cudaStream_t stream);

// --- lars_ema_step.cu and adamw_ema_step.cu --------------------------------------------------------------------------
struct FlatBuffers {
  void* params;
  void* grads;
  void* momenta;
  void* variances; // null for LARS
  void* targets;
  int64_t size; // elements of all but targets
  int64_t target_size; // elements of targets
};

// The adapted or decayed segments, in ascending order, not overlapping.
struct FlatSegments {
  const int64_t* starts;
  const int64_t* sizes;
  int64_t count;
};

struct LarsOptions {
  DeviceScalar lr, tau;
  double weight_decay, momentum, eta;
  const bool* apply; // on the device; null means true
};

int64_t lars_ema_step_workspace(int64_t size); // bytes, aligned to 16

const char* lars_ema_step(
    DType dtype, // f32 or f64
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream);

struct AdamwOptions {
  DeviceScalar lr, weight_decay, tau;
  double beta1, beta2, eps;
  const bool* apply; // on the device; null means true
};

int64_t adamw_ema_step_workspace(); // bytes, aligned to 8

// steps: a scalar on the device, increased by one.
const char* adamw_ema_step(
    DType dtype, // f32 or f64
    const FlatBuffers& buffers,
    const FlatSegments& segments,
    const AdamwOptions& options,
    void* steps,
    DType steps_dtype,
    void* workspace,
    cudaStream_t stream);

// --- normalized_mse.cu -----------------------------------------------------------------------------------------------
struct Matrices {
  const void* p;
  const void* z;
  int64_t rows, columns; // contiguous; at least one row
};

int64_t normalized_mse_workspace(int64_t rows); // bytes, aligned to 8

// loss: a scalar on the device, double for f64, otherwise float.
const char* normalized_mse(DType dtype, const Matrices& matrices, void* loss, void* workspace, cudaStream_t stream);

// grad: a scalar of the same type as loss. grad_p, grad_z: either may be null.
const char* normalized_mse_backward(
    DType dtype, const Matrices& matrices, const void* grad, void* grad_p, void* grad_z, cudaStream_t stream);

} // namespace dspnet::cuda
