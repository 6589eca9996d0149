// What the kernels that update flat buffers share: the split of the buffers into tiles, and the target's update.
//
// The buffers are split into regions, each a segment or the gap between two, and regions into tiles of 4096 elements. A
// block processes one tile, whose elements are all in a segment or all in a gap, and finds its region by binary search.
// Up to 220 regions are kernel parameters, limited to 4 KB, so no table is copied to the device, and a CUDA graph
// stores them.
#pragma once

#include "cuda_kernel.h"
#ifndef __CUDACC_RTC__
#include "cuda_launchers.h"
#endif

namespace dspnet::cuda {

constexpr int kRegions = 220;
constexpr int64_t kTile = 4096;

struct Regions {
  int64_t begin[kRegions + 1]; // a region ends where the next one begins
  int64_t first_block[kRegions + 1];
  bool in_segment[kRegions];
  int count;
};
static_assert(sizeof(Regions) <= 4096 - 256, "exceeds the size of kernel parameters");

struct Tile {
  int region;
  int64_t begin, end;
};

__device__ inline Tile tile_of(const Regions& regions, int64_t block) {
  const int region = last_at_most(regions.first_block, regions.count, block);
  const int64_t begin = regions.begin[region] + (block - regions.first_block[region]) * kTile;
  const int64_t end = regions.begin[region + 1];
  return {region, begin, end - begin < kTile ? end : begin + kTile};
}

template <typename scalar_t>
struct Buffers {
  scalar_t* p;
  scalar_t* g;
  scalar_t* m;
  scalar_t* v; // null without variances
  scalar_t* xi;
  int64_t target_size; // elements of xi
};

// g = 0 in a tile. aligned: as of for_range.
template <int width, typename scalar_t>
__device__ inline void zero_gradients(scalar_t* grads, const Tile& tile, int aligned) {
  for_range<width>(tile.begin, tile.end, aligned, [&](auto constant, int64_t i) {
    constexpr int stored = decltype(constant)::width;
    store(grads + i, Pack<scalar_t, stored>{});
  });
}

// Calls update(Constant<width>, i, has_target) as for_range does; has_target is Constant<1> for the tile's elements
// with a target, and Constant<0> for those without.
template <int width, typename Update>
__device__ inline void for_tile(const Tile& tile, int aligned, int64_t target_size, const Update& update) {
  const int64_t split = target_size < tile.begin ? tile.begin : target_size < tile.end ? target_size : tile.end;
  if (split > tile.begin) {
    for_range<width>(
        tile.begin, split, aligned, [&](auto constant, int64_t i) { update(constant, i, Constant<1>{}); });
  }
  if (split < tile.end) {
    for_range<width>(split, tile.end, aligned, [&](auto constant, int64_t i) { update(constant, i, Constant<0>{}); });
  }
}

// Interpolating from the nearer end keeps rounding errors small, and tau = 0 and tau = 1 exact.
template <typename scalar_t>
struct TargetUpdate {
  __device__ explicit TargetUpdate(double tau)
      : from_target(tau > 0.5), weight(static_cast<scalar_t>(tau > 0.5 ? 1 - tau : tau)) {}

  __device__ scalar_t operator()(scalar_t xi, scalar_t p) const {
    return from_target ? multiply_add(weight, p - xi, xi) : multiply_add(weight, xi - p, p);
  }

  bool from_target;
  scalar_t weight;
};

#ifndef __CUDACC_RTC__

// Calls run(regions) for all regions in order, up to kRegions at a time. Together they cover [0, size).
template <typename Run>
const char* for_regions(int64_t size, const FlatSegments& segments, const Run& run) {
  Regions regions;
  regions.count = 0;
  regions.begin[0] = regions.first_block[0] = 0;
  const auto flush = [&]() -> const char* {
    const char* error = regions.count ? run(regions) : nullptr;
    regions.begin[0] = regions.begin[regions.count];
    regions.count = 0;
    return error;
  };
  const auto add = [&](int64_t end, bool in_segment) -> const char* {
    const int at = regions.count;
    const int64_t elements = end - regions.begin[at];
    if (elements == 0) {
      return nullptr;
    }
    regions.in_segment[at] = in_segment;
    regions.begin[at + 1] = end;
    regions.first_block[at + 1] = regions.first_block[at] + (elements + kTile - 1) / kTile;
    return ++regions.count == kRegions ? flush() : nullptr;
  };
  for (int64_t s = 0; s < segments.count; ++s) {
    const char* error = nullptr;
    if (segments.sizes[s] == 0) {
      continue;
    }
    if ((error = add(segments.starts[s], false)) || (error = add(segments.starts[s] + segments.sizes[s], true))) {
      return error;
    }
  }
  if (const char* error = add(size, false)) {
    return error;
  }
  return flush();
}

template <typename scalar_t>
Buffers<scalar_t> typed(const FlatBuffers& buffers) {
  const auto pointer = [](void* memory) { return static_cast<scalar_t*>(memory); };
  return {pointer(buffers.params),    pointer(buffers.grads),   pointer(buffers.momenta),
          pointer(buffers.variances), pointer(buffers.targets), buffers.target_size};
}

// The first index at which all buffers are aligned to 16 bytes, or -1 if there is none.
template <typename scalar_t>
int common_alignment(const Buffers<scalar_t>& buffers) {
  const int aligned = first_aligned(buffers.p);
  const auto differs = [&](const scalar_t* other) { return other && first_aligned(other) != aligned; };
  const bool any = differs(buffers.g) || differs(buffers.m) || differs(buffers.v) ||
      (buffers.target_size > 0 && differs(buffers.xi));
  return any ? -1 : aligned;
}

#endif

} // namespace dspnet::cuda
