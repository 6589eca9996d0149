// conv_moments, dense.
#include "conv_moments.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {

template <typename scalar_t>
void dense_forward(const ConvShape&, const Forward<scalar_t>&) {
  TORCH_CHECK(false, "dense conv_moments is not there yet");
}

template <typename scalar_t>
void dense_backward(const ConvShape&, const Backward<scalar_t>&) {
  TORCH_CHECK(false, "dense conv_moments is not there yet");
}

template void dense_forward(const ConvShape&, const Forward<float>&);
template void dense_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void dense_backward(const ConvShape&, const Backward<float>&);
template void dense_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
