// Every source in csrc/cpu is compiled once per CPU capability, each build in the namespace that CPU_CAPABILITY names.
// DSPNET_CPU_BUILDS declares the builds of one kernel, and its type as dspnet::signatures::<kernel>; DSPNET_CPU_BUILD
// selects one when the library is loaded, so calls have no dispatch cost. ATEN_CPU_CAPABILITY=default|avx2 selects a
// lower capability than the processor's.
// DSPNET_CAPABILITY names the only build of a library that is compiled for a single capability.
#pragma once

#include <ATen/Version.h>

#include <string>

#if !defined(__x86_64__) && !defined(DSPNET_CAPABILITY)
#define DSPNET_CAPABILITY DEFAULT
#endif

namespace dspnet {

enum class Capability { none, DEFAULT, AVX2, AVX512 };

// The highest capability that this process may use: at most torch's, and one that the CPU can execute.
// at::get_cpu_capability() returns ATEN_CPU_CAPABILITY unchecked. Every CPU with AVX2 also has F16C.
inline Capability cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const std::string allowed = at::get_cpu_capability();
  if ((allowed == "AVX2" || allowed == "AVX512") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    return allowed == "AVX512" && avx512 ? Capability::AVX512 : Capability::AVX2;
  }
#endif
  return Capability::DEFAULT;
}

// The capability of the builds that DSPNET_CPU_BUILD selects, none if this process may not use the library's only one.
inline Capability build_capability() {
#if defined(DSPNET_CAPABILITY)
  return cpu_capability() < Capability::DSPNET_CAPABILITY ? Capability::none : Capability::DSPNET_CAPABILITY;
#else
  return cpu_capability();
#endif
}

template <typename Kernel>
Kernel* select_build(Kernel* default_build, Kernel* avx2, Kernel* avx512) {
  switch (cpu_capability()) {
    case Capability::AVX512:
      return avx512;
    case Capability::AVX2:
      return avx2;
    default:
      return default_build;
  }
}

} // namespace dspnet

#if !defined(DSPNET_CAPABILITY)
#define DSPNET_CPU_BUILDS(result, kernel, ...)                \
  namespace dspnet {                                          \
  namespace DEFAULT { result kernel(__VA_ARGS__); }           \
  namespace AVX2 { result kernel(__VA_ARGS__); }              \
  namespace AVX512 { result kernel(__VA_ARGS__); }            \
  namespace signatures { using kernel = result(__VA_ARGS__); } \
  }
#define DSPNET_CPU_BUILD(kernel) \
  dspnet::select_build(&dspnet::DEFAULT::kernel, &dspnet::AVX2::kernel, &dspnet::AVX512::kernel)
#else
#define DSPNET_CPU_BUILDS(result, kernel, ...)                      \
  namespace dspnet {                                                \
  namespace DSPNET_CAPABILITY { result kernel(__VA_ARGS__); }       \
  namespace signatures { using kernel = result(__VA_ARGS__); }      \
  }
#define DSPNET_CPU_BUILD(kernel) &dspnet::DSPNET_CAPABILITY::kernel
#endif
