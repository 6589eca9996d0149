// The kinds of numbers that may lie behind a pointer.
#pragma once

namespace dspnet::cuda {

enum class Kind { f64, f32, f16, bf16 };

// A number that lies on the device.
struct DeviceScalar {
  const void* at;
  Kind kind;
};

} // namespace dspnet::cuda
