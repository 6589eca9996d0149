// conv_moments, pointwise.
#include "conv_moments.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {

template <typename scalar_t>
void pointwise_forward(const ConvShape&, const Forward<scalar_t>&) {
  TORCH_CHECK(false, "pointwise conv_moments is not there yet");
}

template <typename scalar_t>
void pointwise_backward(const ConvShape&, const Backward<scalar_t>&) {
  TORCH_CHECK(false, "pointwise conv_moments is not there yet");
}

template void pointwise_forward(const ConvShape&, const Forward<float>&);
template void pointwise_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void pointwise_backward(const ConvShape&, const Backward<float>&);
template void pointwise_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
