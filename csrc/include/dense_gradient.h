// e, the gradient of y, for the backward of the dense conv_moments: formed into scratch for a band, like h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dense.h"

namespace dspnet::inline CPU_CAPABILITY::dense {

// dy and the factors that e is computed from.
template <typename Arithmetic, typename scalar_t>
struct OutputGradient {
  using Number = typename Arithmetic::Number;

  const ConvShape& shape;
  const scalar_t* grad_y;
  const scalar_t* y;
  const float* mean;
  std::vector<float> constant, factor; // e = dy + constant + factor (y - mean), [views, C]

  OutputGradient(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape), grad_y(args.grad_y), y(args.y), mean(args.mean) {
    const float count = static_cast<float>(shape.images / std::max<int64_t>(shape.views, 1) * shape.positions());
    for (int64_t i = 0; i < shape.views * shape.out_channels; ++i) {
      constant.push_back(args.grad_mean[i] / count);
      factor.push_back(2 * args.grad_variance[i] / count);
    }
  }

  // Scratch for the rows of e that reach input rows [begin, end), and for rows [band.begin, band.end).
  FormedRows rows(const Band& band, int64_t begin, int64_t end, float* data) const {
    const int64_t low = (begin + shape.padding - shape.kernel) / shape.stride; // may be one row too low
    const int64_t high = (end - 1 + shape.padding) / shape.stride + 1;
    return {data, Arithmetic::lanes(shape.out_channels), shape.out_width, left(), right(),
            std::clamp<int64_t>(low, 0, band.begin), std::clamp(high, band.end, shape.out_height)};
  }
  int64_t floats(const Bands& bands) const { // an upper bound on the scratch of rows()
    const int64_t more = 2 * (shape.kernel + shape.padding) / shape.stride + 4;
    return formed_floats(
        rows(bands.at(0), 0, 0, nullptr), bands.images, std::min(bands.rows + more, shape.out_height));
  }
  int64_t left() const {
    return std::max<int64_t>((shape.kernel - 1 - shape.padding + shape.stride - 1) / shape.stride, 0);
  }
  int64_t right() const {
    return std::max<int64_t>((shape.width - 1 + shape.padding) / shape.stride - (shape.out_width - 1), 0);
  }

  // Computes e as operand A of multiply().
  void form(const Band& band, const FormedRows& formed) const {
    const int64_t channels = shape.out_channels, view = shape.views > 1 ? band.segment * channels : 0;
    form_rows(formed, band.images, [&](float* lanes, int64_t i, int64_t row) {
      auto* to = reinterpret_cast<Number*>(lanes);
      const int64_t first = ((band.image + i) * shape.out_height + row) * shape.out_width * channels;
      for_panels(channels, [&]<typename P>(P panel) {
        panel.ahead = kRowsAhead * shape.out_width * channels;
        if (shape.views) {
          form_panel<true>(panel, first, view, to);
        } else {
          form_panel<false>(panel, first, view, to);
        }
      });
    });
  }

  // Scratch for the band's rows of pairs of pixels.
  FormedRows paired_rows(const Band& band, float* data) const {
    const int64_t pairs = (shape.out_width + 1) / 2;
    return {data, shape.out_channels, pairs, 0, 0, band.begin, band.end};
  }
  int64_t paired_floats(const Bands& bands) const { // an upper bound on the scratch of paired_rows()
    return formed_floats(paired_rows(bands.at(0), nullptr), bands.images, bands.rows);
  }

  // e as an operand of the weight gradient: itself, or pairs of pixels in `data`, the last of an odd number with zero.
  FormedRows form_outer(const Band& band, const FormedRows& e, float* data) const {
    if constexpr (std::is_same_v<Arithmetic, Fp32>) {
      return e;
    } else {
      const FormedRows paired = paired_rows(band, data);
      const int64_t channels = shape.out_channels;
      form_rows(paired, band.images, [&](float* to, int64_t i, int64_t row) {
        const auto* from = reinterpret_cast<const Number*>(e.pixel(i, row, 0));
        for (int64_t x = 0; x < shape.out_width; x += 2, from += 2 * channels, to += channels) {
          pair_rows(to, from, x + 1 < shape.out_width ? from + channels : nullptr, channels);
        }
      });
      return paired;
    }
  }

  template <bool has_moments, typename P>
  void form_panel(const P& panel, int64_t first, int64_t view, Number* to) const {
    Vec a[P::vectors], b[P::vectors], center[P::vectors];
#pragma GCC unroll 2
    for (int v = 0; has_moments && v < P::vectors; ++v) {
      a[v] = panel.get(constant.data() + view, v);
      b[v] = panel.get(factor.data() + view, v);
      center[v] = panel.get(mean + view, v);
    }
    for (int64_t at = 0; at < shape.out_width * shape.out_channels; at += shape.out_channels) {
#pragma GCC unroll 2
      for (int v = 0; v < P::vectors; ++v) {
        Vec e = panel.read(grad_y + first + at, v);
        if constexpr (has_moments) {
          e = e + at::vec::fmadd(b[v], panel.read(y + first + at, v) - center[v], a[v]);
        }
        panel.put(to + at, v, e);
      }
    }
  }
};

} // namespace dspnet::CPU_CAPABILITY::dense
