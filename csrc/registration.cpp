// Every schema of the compiled library, in one place. Python reaches them as torch.ops.dspnet_cpp.<operator>; the
// public operators are dspnet::<operator>, defined in dspnet_fast/ops, which choose these among other providers.
#include <torch/library.h>

#include "capability.h"

DSPNET_CPU_BUILDS(void, ema_update, at::TensorList targets, at::TensorList onlines, double tau)
DSPNET_CPU_BUILDS(
    void, lars_ema_step, const at::Tensor& params, const at::Tensor& grads, const at::Tensor& momenta,
    const at::Tensor& targets, at::IntArrayRef starts, at::IntArrayRef sizes, const at::Tensor& lr,
    const at::Tensor& tau, double weight_decay, double momentum, double eta)

TORCH_LIBRARY(dspnet_cpp, library) {
  library.def("ema_update(Tensor(a!)[] targets, Tensor[] onlines, float tau) -> ()");
  library.def(
      "lars_ema_step(Tensor(a!) params, Tensor(b!) grads, Tensor(c!) momenta, Tensor(d!) targets, int[] starts, "
      "int[] sizes, Tensor lr, Tensor tau, float weight_decay, float momentum, float eta) -> ()");
}

TORCH_LIBRARY_IMPL(dspnet_cpp, CPU, library) {
  library.impl("ema_update", DSPNET_CPU_BUILD(ema_update));
  library.impl("lars_ema_step", DSPNET_CPU_BUILD(lars_ema_step));
}
