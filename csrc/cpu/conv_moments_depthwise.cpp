// conv_moments, depthwise.
#include "conv_moments.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {

template <typename scalar_t>
void depthwise_forward(const ConvShape&, const Forward<scalar_t>&) {
  TORCH_CHECK(false, "depthwise conv_moments is not there yet");
}

template <typename scalar_t>
void depthwise_backward(const ConvShape&, const Backward<scalar_t>&) {
  TORCH_CHECK(false, "depthwise conv_moments is not there yet");
}

template void depthwise_forward(const ConvShape&, const Forward<float>&);
template void depthwise_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void depthwise_backward(const ConvShape&, const Backward<float>&);
template void depthwise_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
