// Every source in csrc/cpu is compiled once per CPU capability, each build in the namespace that CPU_CAPABILITY names.
// DSPNET_CPU_BUILDS declares the builds of one kernel, DSPNET_CPU_BUILD picks the one for this process. It is picked
// once, when the library is loaded, so a call pays nothing for it. ATEN_CPU_CAPABILITY=default|avx2 asks for less.
// DSPNET_CAPABILITY is defined where there is one build alone.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace dspnet {

template <typename Kernel>
Kernel* for_this_cpu(Kernel* by_default, [[maybe_unused]] Kernel* avx2, [[maybe_unused]] Kernel* avx512) {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return avx512;
  }
  return capability == "AVX2" ? avx2 : by_default;
}

} // namespace dspnet

#if !defined(__x86_64__) && !defined(DSPNET_CAPABILITY)
#define DSPNET_CAPABILITY DEFAULT
#endif

#if !defined(DSPNET_CAPABILITY)
#define DSPNET_CPU_BUILDS(result, kernel, ...)                \
  namespace dspnet {                                          \
  namespace DEFAULT { result kernel(__VA_ARGS__); }           \
  namespace AVX2 { result kernel(__VA_ARGS__); }              \
  namespace AVX512 { result kernel(__VA_ARGS__); }            \
  }
#define DSPNET_CPU_BUILD(kernel) \
  dspnet::for_this_cpu(&dspnet::DEFAULT::kernel, &dspnet::AVX2::kernel, &dspnet::AVX512::kernel)
#else
#define DSPNET_CPU_BUILDS(result, kernel, ...) \
  namespace dspnet { namespace DSPNET_CAPABILITY { result kernel(__VA_ARGS__); } }
#define DSPNET_CPU_BUILD(kernel) &dspnet::DSPNET_CAPABILITY::kernel
#endif
