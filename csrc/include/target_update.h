// The update of the target network on the CPU: xi <- tau xi + (1 - tau) p.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace dspnet::inline CPU_CAPABILITY {

template <typename scalar_t>
class TargetUpdate {
 public:
  using Vec = at::vec::Vectorized<scalar_t>;

  explicit TargetUpdate(double tau)
      : from_target_(tau > 0.5), weight_(static_cast<scalar_t>(from_target_ ? 1 - tau : tau)) {}

  // Interpolates from the nearer end, which keeps rounding errors small, and tau = 0 and tau = 1 exact.
  Vec operator()(Vec xi, Vec p) const {
    return from_target_ ? at::vec::fmadd(weight_, p - xi, xi) : at::vec::fmadd(weight_, xi - p, p);
  }

 private:
  bool from_target_;
  Vec weight_;
};

} // namespace dspnet::CPU_CAPABILITY
