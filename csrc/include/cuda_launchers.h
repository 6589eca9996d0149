// What the .cu files offer to csrc/cuda/operators.cpp: raw pointers, sizes and a stream, so that they know nothing of
// torch, and it nothing of CUDA's headers. Arguments have been checked. Launchers return at once, and give null or what
// CUDA reports; they neither allocate nor wait, so a CUDA graph may record them.
#pragma once

#include <cstdint>

#include "cuda_kind.h"

typedef struct CUstream_st* cudaStream_t; // as in CUDA's own headers

namespace dspnet::cuda {

// --- device.cu -------------------------------------------------------------------------------------------------------
// Why this library cannot compute on this device, or null.
const char* problem(int device);

// The runtime linked into this library keeps a current device of its own, for each thread.
const char* use_device(int device);

// --- ema_update.cu ---------------------------------------------------------------------------------------------------
struct EmaPair {
  void* target;
  const void* online;
  int64_t size; // elements
};

// No target may share memory with another tensor, except with its own online if they are the same.
const char* ema_update(Kind kind, const EmaPair* pairs, int64_t count, double tau, cudaStream_t stream);

// --- lars_ema_step.cu ------------------------------------------------------------------------------------------------
struct LarsBuffers {
  void* params;
  void* grads;
  void* momenta;
  void* targets;
  int64_t size; // of the first three
  int64_t with_target; // of the last
};

// The adapted segments, ascending and apart.
struct LarsSegments {
  const int64_t* starts;
  const int64_t* sizes;
  int64_t count;
};

struct LarsOptions {
  DeviceScalar lr, tau;
  double weight_decay, momentum, eta;
  const bool* apply; // on the device; null is true
};

int64_t lars_ema_step_workspace(int64_t size); // bytes, aligned to 16

const char* lars_ema_step(
    Kind kind, // f32 or f64
    const LarsBuffers& buffers,
    const LarsSegments& segments,
    const LarsOptions& options,
    void* workspace,
    cudaStream_t stream);

// --- normalized_mse.cu -----------------------------------------------------------------------------------------------
struct Matrices {
  const void* p;
  const void* z;
  int64_t rows, columns; // contiguous; at least one row
};

int64_t normalized_mse_workspace(int64_t rows); // bytes, aligned to 8

// loss: one number, double for f64, otherwise float.
const char* normalized_mse(Kind kind, const Matrices& matrices, void* loss, void* workspace, cudaStream_t stream);

// grad: as loss. grad_p, grad_z: either may be null.
const char* normalized_mse_backward(
    Kind kind, const Matrices& matrices, const void* grad, void* grad_p, void* grad_z, cudaStream_t stream);

} // namespace dspnet::cuda
