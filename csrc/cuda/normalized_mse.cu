// mean_n (2 - 2 cos(p_n, z_n)) and its gradients, for all rows of all views at once:
//
//   dp = -2 d / (N |p|) (z / |z| - cos p / |p|), and for z likewise
//
// with lengths below kEps replaced by the constant kEps.
//
// Bound by memory: forward reads p and z; backward reads them and writes one gradient or both. A warp processes a row,
// with 16-byte loads if rows are aligned. Backward recomputes the lengths and the cosine: it reads p and z in any case,
// and the second read of a row hits the cache.
//
// A row's sums are double: products are exact, nothing overflows, and the cost of three multiply-adds per eight bytes
// is negligible. A second, small kernel computes the mean from the blocks' sums in a fixed order, so results are
// reproducible.
#include "cuda_kernel.h"
#include "cuda_launch.h"

namespace dspnet::cuda {
inline namespace normalized_mse_kernels { // named: NVRTC drops kernels in anonymous namespaces

constexpr double kEps = 1e-6; // dspnet_fast/ops/normalized_mse.py: EPS
constexpr int kRowsAtOnce = kThreads / kWarp; // rows that a block processes at once
constexpr int64_t kBlocks = 1024; // at most; a block processes several sets of rows if needed

struct Row {
  double length_p, length_z, cosine; // lengths are clamped to at least kEps
  bool clamped_p, clamped_z; // whether kEps replaces the length
};

// Not fmax, which would return kEps for NaN.
__device__ inline double at_least_eps(double length) {
  return length < kEps ? kEps : length;
}

// Computed by a warp; every lane returns the same result.
template <int width, typename scalar_t>
__device__ inline Row measure(const scalar_t* p, const scalar_t* z, int64_t columns) {
  double pp = 0, zz = 0, pz = 0;
  for (int64_t i = static_cast<int>(threadIdx.x) % kWarp * width; i < columns; i += kWarp * width) {
    const Pack<scalar_t, width> a = load<width>(p + i), b = load<width>(z + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const double p_i = upcast(a.at[j]), z_i = upcast(b.at[j]);
      pp += p_i * p_i;
      zz += z_i * z_i;
      pz += p_i * z_i;
    }
  }
  const double length_p = sqrt(warp_sum(pp)), length_z = sqrt(warp_sum(zz));
  Row row;
  row.length_p = at_least_eps(length_p);
  row.length_z = at_least_eps(length_z);
  row.clamped_p = !(length_p > kEps);
  row.clamped_z = !(length_z > kEps);
  row.cosine = warp_sum(pz) / (row.length_p * row.length_z);
  return row;
}

__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + static_cast<int>(threadIdx.x) / kWarp;
}

// sums: of 2 - 2 cos over each block's rows. Launch bounds of four blocks per multiprocessor: with more, ptxas spills.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(
    const scalar_t* __restrict__ p,
    const scalar_t* __restrict__ z,
    int64_t rows,
    int64_t columns,
    double* __restrict__ sums) {
  double sum = 0;
  for (int64_t n = first_row(); n < rows; n += static_cast<int64_t>(gridDim.x) * kRowsAtOnce) {
    sum += 2 - 2 * measure<width>(p + n * columns, z + n * columns, columns).cosine;
  }
  __shared__ double parts[kThreads / kWarp];
  sum = block_sum(threadIdx.x % kWarp == 0 ? sum : 0, parts);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// Launched with one block.
template <typename loss_t>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const double* __restrict__ sums, int64_t count, int64_t rows, loss_t* __restrict__ loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += sums[i];
  }
  __shared__ double parts[kThreads / kWarp];
  sum = block_sum(sum, parts);
  if (threadIdx.x == 0) {
    *loss = static_cast<loss_t>(sum / static_cast<double>(rows));
  }
}

// grad_p, grad_z: either may be null.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const scalar_t* __restrict__ p,
    const scalar_t* __restrict__ z,
    int64_t rows,
    int64_t columns,
    const compute_t<scalar_t>* __restrict__ grad,
    scalar_t* __restrict__ grad_p,
    scalar_t* __restrict__ grad_z) {
  using compute = compute_t<scalar_t>;
  const double factor = -2 * static_cast<double>(*grad) / static_cast<double>(rows);
  for (int64_t n = first_row(); n < rows; n += static_cast<int64_t>(gridDim.x) * kRowsAtOnce) {
    const scalar_t* row_p = p + n * columns;
    const scalar_t* row_z = z + n * columns;
    const Row row = measure<width>(row_p, row_z, columns);
    const auto length_p = static_cast<compute>(row.length_p), length_z = static_cast<compute>(row.length_z);
    const auto scale_p = static_cast<compute>(factor / row.length_p);
    const auto scale_z = static_cast<compute>(factor / row.length_z);
    const auto cosine_p = static_cast<compute>(row.clamped_p ? 0 : row.cosine);
    const auto cosine_z = static_cast<compute>(row.clamped_z ? 0 : row.cosine);
    for (int64_t i = static_cast<int>(threadIdx.x) % kWarp * width; i < columns; i += kWarp * width) {
      const Pack<scalar_t, width> a = load<width>(row_p + i), b = load<width>(row_z + i);
      Pack<scalar_t, width> da, db;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const compute unit_p = upcast(a.at[j]) / length_p, unit_z = upcast(b.at[j]) / length_z;
        downcast(scale_p * (unit_z - cosine_p * unit_p), da.at[j]);
        downcast(scale_z * (unit_p - cosine_z * unit_z), db.at[j]);
      }
      if (grad_p) {
        store(grad_p + n * columns + i, da);
      }
      if (grad_z) {
        store(grad_z + n * columns + i, db);
      }
    }
  }
}

#ifndef __CUDACC_RTC__

inline int64_t blocks_for(int64_t rows) {
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  return blocks < kBlocks ? blocks : kBlocks;
}

// Whether all rows of these matrices begin and end at multiples of 16 bytes.
template <typename scalar_t>
bool is_aligned(int64_t columns, const void* a, const void* b, const void* c = nullptr, const void* d = nullptr) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
      reinterpret_cast<uintptr_t>(c) | reinterpret_cast<uintptr_t>(d);
  return bits % 16 == 0 && columns % kPackWidth<scalar_t> == 0;
}

template <typename scalar_t>
const char* forward(const Matrices& matrices, void* loss, void* workspace, cudaStream_t stream) {
  const auto* p = static_cast<const scalar_t*>(matrices.p);
  const auto* z = static_cast<const scalar_t*>(matrices.z);
  auto* sums = static_cast<double*>(workspace);
  const int64_t blocks = blocks_for(matrices.rows);
  const auto kernel = is_aligned<scalar_t>(matrices.columns, p, z) ? &forward_kernel<scalar_t, kPackWidth<scalar_t>>
                                                                   : &forward_kernel<scalar_t, 1>;
  const char* error = launch(kernel, blocks, stream, p, z, matrices.rows, matrices.columns, sums);
  if (error) {
    return error;
  }
  using loss_t = compute_t<scalar_t>;
  return launch(&mean_kernel<loss_t>, 1, stream, sums, blocks, matrices.rows, static_cast<loss_t*>(loss));
}

template <typename scalar_t>
const char* backward(const Matrices& matrices, const void* grad, void* grad_p, void* grad_z, cudaStream_t stream) {
  const auto kernel = is_aligned<scalar_t>(matrices.columns, matrices.p, matrices.z, grad_p, grad_z)
      ? &backward_kernel<scalar_t, kPackWidth<scalar_t>>
      : &backward_kernel<scalar_t, 1>;
  return launch(
      kernel,
      blocks_for(matrices.rows),
      stream,
      static_cast<const scalar_t*>(matrices.p),
      static_cast<const scalar_t*>(matrices.z),
      matrices.rows,
      matrices.columns,
      static_cast<const compute_t<scalar_t>*>(grad),
      static_cast<scalar_t*>(grad_p),
      static_cast<scalar_t*>(grad_z));
}

#else

// NVRTC compiles instantiated templates only.
#define DSPNET_KERNELS_OF(scalar_t, width)                                                                 \
  template __global__ void forward_kernel<scalar_t, width>(                                                \
      const scalar_t*, const scalar_t*, int64_t, int64_t, double*);                                        \
  template __global__ void backward_kernel<scalar_t, width>(                                               \
      const scalar_t*, const scalar_t*, int64_t, int64_t, const compute_t<scalar_t>*, scalar_t*, scalar_t*);
DSPNET_KERNELS_OF(double, 1)
DSPNET_KERNELS_OF(double, 2)
DSPNET_KERNELS_OF(float, 1)
DSPNET_KERNELS_OF(float, 4)
DSPNET_KERNELS_OF(__half, 1)
DSPNET_KERNELS_OF(__half, 8)
DSPNET_KERNELS_OF(__nv_bfloat16, 1)
DSPNET_KERNELS_OF(__nv_bfloat16, 8)
template __global__ void mean_kernel<float>(const double*, int64_t, int64_t, float*);
template __global__ void mean_kernel<double>(const double*, int64_t, int64_t, double*);

#endif

} // namespace normalized_mse_kernels

#ifndef __CUDACC_RTC__

int64_t normalized_mse_workspace(int64_t rows) {
  return blocks_for(rows) * static_cast<int64_t>(sizeof(double));
}

const char* normalized_mse(DType dtype, const Matrices& matrices, void* loss, void* workspace, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64:
      return forward<double>(matrices, loss, workspace, stream);
    case DType::f32:
      return forward<float>(matrices, loss, workspace, stream);
    case DType::f16:
      return forward<__half>(matrices, loss, workspace, stream);
    default:
      return forward<__nv_bfloat16>(matrices, loss, workspace, stream);
  }
}

const char* normalized_mse_backward(
    DType dtype, const Matrices& matrices, const void* grad, void* grad_p, void* grad_z, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64:
      return backward<double>(matrices, grad, grad_p, grad_z, stream);
    case DType::f32:
      return backward<float>(matrices, grad, grad_p, grad_z, stream);
    case DType::f16:
      return backward<__half>(matrices, grad, grad_p, grad_z, stream);
    default:
      return backward<__nv_bfloat16>(matrices, grad, grad_p, grad_z, stream);
  }
}

#endif

} // namespace dspnet::cuda
