// The arguments of conv_moments after validation, as plain pointers and numbers, and its pointwise, depthwise and dense
// implementations. dspnet_fast/ops/conv_moments.py is the specification; csrc/cpu/conv_moments.cpp validates and
// dispatches.
#pragma once

#include <cstdint>

#include "deferred.h"

namespace dspnet::inline CPU_CAPABILITY {

struct ConvShape {
  int64_t images, channels, height, width; // of x
  int64_t out_channels, out_height, out_width; // of y
  int64_t kernel, stride, padding;
  int64_t views; // rows of mean and variance; 0 without moments

  int64_t positions() const { // of y, in one image
    return out_height * out_width;
  }
};

// A strided prefix of a weight or of its gradient, [O, I, k, k]. Depthwise weights have I = 1.
struct Prefix {
  float* data;
  int64_t out, in, row, column; // strides, in elements

  float& at(int64_t o, int64_t i, int64_t y = 0, int64_t x = 0) const {
    return data[o * out + i * in + y * row + x * column];
  }
};

// Activations are dense and channels-last: x[((n * height + h) * width + w) * channels + c].
template <typename scalar_t>
struct Forward {
  const scalar_t* x;
  Deferred deferred;
  Prefix weight;
  scalar_t* y;
  float* mean; // [views, out_channels]
  float* variance;
};

// Outputs are overwritten, except grad_weight, which is accumulated into. Outputs that are not wanted are null.
template <typename scalar_t>
struct Backward {
  const scalar_t* grad_y;
  const float* grad_mean; // [views, out_channels]
  const float* grad_variance;
  const scalar_t* x;
  Deferred deferred;
  Prefix weight;
  const scalar_t* y;
  const float* mean;
  scalar_t* grad_x;
  float* grad_scale; // [deferred.rows, channels]; required if grad_x is not null and deferred.rows > 0
  float* grad_shift;
  float* grad_gate; // [images, channels]; required if grad_x and deferred.gate are not null
  Prefix grad_weight; // data is null if not wanted
};

// Each is defined in a source of its name and instantiated there for float and at::BFloat16.
template <typename scalar_t>
void pointwise_forward(const ConvShape& shape, const Forward<scalar_t>& args);
template <typename scalar_t>
void pointwise_backward(const ConvShape& shape, const Backward<scalar_t>& args);
template <typename scalar_t>
void depthwise_forward(const ConvShape& shape, const Forward<scalar_t>& args);
template <typename scalar_t>
void depthwise_backward(const ConvShape& shape, const Backward<scalar_t>& args);
template <typename scalar_t>
void dense_forward(const ConvShape& shape, const Forward<scalar_t>& args);
template <typename scalar_t>
void dense_backward(const ConvShape& shape, const Backward<scalar_t>& args);

} // namespace dspnet::CPU_CAPABILITY
