// The distribution of flat buffers over threads, for the CPU operators that update parameters and target together.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

namespace dspnet::inline CPU_CAPABILITY {

// Splits `total` elements evenly over the threads, at least `grain` each, independent of segments. Calls
// update(begin, end, segment, has_target) for ranges that lie within a segment, or between two, where `segment` is -1,
// and of which all elements have a target or none; has_target is a std::bool_constant.
template <typename Update>
void for_ranges(
    int64_t total,
    int64_t target_size,
    at::IntArrayRef starts,
    at::IntArrayRef sizes,
    int64_t grain,
    const Update& update) {
  struct Region { // ends where the next one begins
    int64_t begin, segment;
  };
  std::vector<Region> regions{{0, -1}};
  for (size_t segment = 0; segment < starts.size(); ++segment) {
    regions.push_back({starts[segment], static_cast<int64_t>(segment)});
    regions.push_back({starts[segment] + sizes[segment], -1});
  }
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    auto region = std::upper_bound(
        regions.begin(), regions.end(), begin, [](int64_t at, const Region& r) { return at < r.begin; });
    for (--region; begin < end; ++region) {
      const int64_t stop = region + 1 == regions.end() ? end : std::min(end, (region + 1)->begin);
      const int64_t split = std::clamp(target_size, begin, stop);
      update(begin, split, region->segment, std::true_type{});
      update(split, stop, region->segment, std::false_type{});
      begin = stop;
    }
  });
}

} // namespace dspnet::CPU_CAPABILITY
