// Dtypes of tensors and of scalars on the device.
#pragma once

namespace dspnet::cuda {

enum class DType { f64, f32, f16, bf16 };

struct DeviceScalar {
  const void* data;
  DType dtype;
};

} // namespace dspnet::cuda
