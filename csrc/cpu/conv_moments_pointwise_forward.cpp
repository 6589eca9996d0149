// conv_moments, pointwise, forward: y = h W^T over the positions of all images as rows.
//
// A block of rows of h (pointwise.h) is multiplied by the packed weight; the epilogue stores y and sums it for the
// moments. Per row with K input and N output channels: 2 K N flops, K + N values read or written.
#include <type_traits>

#include "conv_output.h"
#include "moments.h"
#include "pointwise.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace pointwise {
namespace {

constexpr int64_t kForwardBytes = 48 << 10; // of h in a block
constexpr int64_t kForwardRows = 192; // rows summed in fp32

// h of a block as operand A of multiply(): formed in `to`, or x itself if it is equal to h.
template <typename Arithmetic, typename scalar_t>
Rows rows_of_h(const Input<scalar_t>& input, int64_t segment, int64_t begin, int64_t rows, float* to) {
  constexpr bool fp32 = std::is_same_v<Arithmetic, Fp32>;
  const int64_t channels = input.channels, depth = Arithmetic::lanes(channels);
  if constexpr (!fp32 || std::is_same_v<scalar_t, float>) {
    if (!input.is_deferred() && (fp32 || channels % 2 == 0)) {
      input.prefetch_rows(begin + rows, rows);
      return {reinterpret_cast<const float*>(input.x + begin * channels), depth, depth};
    }
  }
  if constexpr (fp32) {
    input.form(segment, begin, rows, Fp32Rows{to, input.stride});
    return {to, input.stride, depth};
  } else {
    input.form(segment, begin, rows, typename Arithmetic::Layout{to, nullptr, input.stride});
    return {to, input.stride / 2, depth};
  }
}

template <typename Arithmetic, typename scalar_t>
void forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const int64_t channels = shape.channels, out_channels = shape.out_channels, views = shape.views;
  const int64_t limit = kForwardBytes / static_cast<int64_t>(channels * sizeof(float));
  const Blocks blocks(shape, args.deferred, std::min(kForwardRows, limit));
  const Input<scalar_t> input(shape, args.x, args.deferred);
  const Panels panels(out_channels);
  const float* weight = pack<Arithmetic>(panels, args.weight.data, args.weight.in, args.weight.out, channels);
  std::vector<ChannelMoments> moments(at::get_num_threads() * views); // [thread, view]

  at::parallel_for(0, blocks.count(), 1, [&](int64_t first, int64_t last) {
    float* formed = scratch<FormedInput>(blocks.rows * input.stride);
    float* sums = scratch<BlockSums>(3 * panels.padded());
    std::fill_n(sums, panels.padded(), 0.f);
    for (int64_t b = first; b < last; ++b) {
      const auto [segment, begin, rows] = blocks.at(b);
      const Rows h = rows_of_h<Arithmetic>(input, segment, begin, rows, formed);
      StoreOutput<scalar_t> epilogue{args.y + begin * out_channels, out_channels, out_channels, rows * out_channels};
      if (views == 0) {
        multiply<Arithmetic>(h, rows, weight, panels, 0, panels.count, epilogue);
        continue;
      }
      ChannelMoments& view = moments[at::get_thread_num() * views + (views > 1 ? segment : 0)];
      epilogue.pivot = sums;
      epilogue.sum = sums + panels.padded();
      epilogue.square = sums + 2 * panels.padded();
      for (int64_t done = 0, some; done < rows; done += some) {
        epilogue.has_pivot = view.to_pivot(sums);
        some = epilogue.has_pivot ? rows - done : std::min(rows, kRowMultiple); // few rows suffice for a pivot
        epilogue.y = args.y + (begin + done) * out_channels;
        multiply<Arithmetic>(h.from(done), some, weight, panels, 0, panels.count, epilogue);
        view.merge(some, out_channels, epilogue.pivot, epilogue.sum, epilogue.square);
      }
    }
  });
  write_moments(moments, views, out_channels, args.mean, args.variance);
}

} // namespace
} // namespace pointwise

template <typename scalar_t>
void pointwise_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  with_arithmetic<scalar_t>(
      [&]<typename Arithmetic>(Arithmetic) { pointwise::forward<Arithmetic>(shape, args); });
}

template void pointwise_forward(const ConvShape&, const Forward<float>&);
template void pointwise_forward(const ConvShape&, const Forward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
