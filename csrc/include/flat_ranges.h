// The distribution of flat buffers over threads, for the CPU operators that update parameters and target together.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

namespace dspnet::inline CPU_CAPABILITY {

template <typename scalar_t>
struct FlatBuffers {
  scalar_t* p;
  scalar_t* g;
  scalar_t* m;
  scalar_t* v; // null without variances
  scalar_t* xi;
};

// Splits `total` elements evenly over the threads, at least `grain` each, independent of segments. Calls
// update(begin, end, segment, in_segment, has_target) for ranges that lie within a segment, or between two, where
// `segment` is -1, and of which all elements have a target or none; the last two are std::bool_constants.
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
      const auto update_both = [&](auto in_segment) {
        update(begin, split, region->segment, in_segment, std::true_type{});
        update(split, stop, region->segment, in_segment, std::false_type{});
      };
      if (region->segment < 0) {
        update_both(std::false_type{});
      } else {
        update_both(std::true_type{});
      }
      begin = stop;
    }
  });
}

} // namespace dspnet::CPU_CAPABILITY
