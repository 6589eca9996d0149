// Every schema of the compiled library, in one place. Python reaches them as torch.ops.dspnet_cpp.<operator>; the
// public operators are dspnet::<operator>, defined in dspnet_fast/ops, which choose these among other providers.
#include <torch/library.h>

#include "capability.h"

DSPNET_CPU_BUILDS(void, ema_update, at::TensorList targets, at::TensorList onlines, double tau)

TORCH_LIBRARY(dspnet_cpp, library) {
  library.def("ema_update(Tensor(a!)[] targets, Tensor[] onlines, float tau) -> ()");
}

TORCH_LIBRARY_IMPL(dspnet_cpp, CPU, library) {
  library.impl("ema_update", DSPNET_CPU_BUILD(ema_update));
}
