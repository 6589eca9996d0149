// Every source in csrc/cpu is compiled once per CPU capability, each build in the namespace that CPU_CAPABILITY names.
// DSPNET_CPU_BUILDS declares the builds of one kernel; DSPNET_CPU_BUILD selects one when the library is loaded, so
// calls have no dispatch cost. ATEN_CPU_CAPABILITY=default|avx2 selects a lower capability than the processor's.
// DSPNET_CAPABILITY names the only build of a library that is compiled for a single capability.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace dspnet {

template <typename Kernel>
Kernel* select_build(Kernel* default_build, [[maybe_unused]] Kernel* avx2, [[maybe_unused]] Kernel* avx512) {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return avx512;
  }
  return capability == "AVX2" ? avx2 : default_build;
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
  dspnet::select_build(&dspnet::DEFAULT::kernel, &dspnet::AVX2::kernel, &dspnet::AVX512::kernel)
#else
#define DSPNET_CPU_BUILDS(result, kernel, ...) \
  namespace dspnet { namespace DSPNET_CAPABILITY { result kernel(__VA_ARGS__); } }
#define DSPNET_CPU_BUILD(kernel) &dspnet::DSPNET_CAPABILITY::kernel
#endif
