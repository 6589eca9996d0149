// Shared by the forward and the backward of the dense conv_moments: bands, the formation of h for a band, and products
// over all taps of a kernel row.
//
// A band is some images, or some rows of one image. Its h = act(scale x + shift) * gate is computed once, into scratch,
// with zeros on both sides of each row. The k taps of one kernel row are then k C consecutive numbers, so products need
// no copies of patches (no im2col). The rows of a product are the positions of one output row, or, if output rows are
// short, one position of many images. Taps outside the image are skipped.
//
// Products of bfloat16 activations are BFloat16Pairs where the processor has the instruction and both numbers of
// channels are even, so that no pair has channels of two pixels. Otherwise they are Fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dense_weight.h"
#include "panels.h"

namespace dspnet::inline CPU_CAPABILITY::dense {

constexpr int64_t kBandBytes = 512 << 10; // of h, for a band
constexpr int64_t kRowsAhead = 2; // rows of an image that are prefetched
constexpr int64_t kNarrow = 8; // output rows shorter than this do not fill a tile

struct FormedInput;
struct FormedRow;
struct BlockSums;

// Some whole images, or the output rows [begin, end) of one image.
struct Band {
  int64_t segment, image, images, begin, end;
};

// Splits the images into bands. A segment is the images of one view, or of one row of scale and shift; no band contains
// images of two segments.
struct Bands {
  int64_t segments, segment_images, height, images, rows, per_image; // images, rows: of a band; per_image: bands

  // floats: scratch for one output row.
  Bands(const ConvShape& shape, const Deferred& deferred, int64_t floats)
      : segments(std::max<int64_t>({shape.views, deferred.rows, 1})),
        segment_images(shape.images / segments),
        height(shape.out_height) {
    const int64_t image_bytes = height * floats * static_cast<int64_t>(sizeof(float)), threads = at::get_num_threads();
    const int64_t wanted = std::max((image_bytes + kBandBytes - 1) / kBandBytes, 2 * threads / shape.images);
    rows = std::clamp<int64_t>((height + wanted - 1) / wanted, 1, height);
    per_image = (height + rows - 1) / rows;
    const int64_t weight_bytes = shape.kernel * shape.kernel * shape.channels * shape.out_channels * sizeof(float);
    const int64_t per_thread = weight_bytes > kBandBytes ? 1 : 4; // every band reads the weight
    const int64_t limit = std::min({kBandBytes / image_bytes, shape.images / (per_thread * threads), kRowMultiple});
    images = per_image > 1 ? 1 : std::clamp<int64_t>(limit, 1, segment_images);
  }

  int64_t per_segment() const {
    return (segment_images + images - 1) / images * per_image;
  }
  int64_t count() const {
    return segments * per_segment();
  }
  Band at(int64_t b) const {
    const int64_t segment = b / per_segment(), within = b % per_segment(), part = within % per_image;
    const int64_t first = within / per_image * images;
    return {segment, segment * segment_images + first, std::min(images, segment_images - first), part * rows,
            std::min((part + 1) * rows, height)};
  }
};

// Scratch for rows [low, high) of a band's images, with `left` and `right` zero pixels beside each row. lanes: of a
// pixel, each a float or a pair of bfloat16 numbers.
struct FormedRows {
  float* data;
  int64_t lanes, width, left, right, low, high;

  int64_t row_floats() const {
    return (left + width + right) * lanes;
  }
  // An odd number of cache lines, so that the same position of several images maps to different cache sets.
  int64_t image_floats() const {
    constexpr int64_t line = 16;
    return (round_up((high - low) * row_floats(), line) / line | 1) * line;
  }
  float* image(int64_t i) const {
    return data + i * image_floats();
  }
  // Pixel (y, x) of an image; x < 0 addresses the zeros on the left.
  float* pixel(int64_t i, int64_t y, int64_t x) const {
    return image(i) + (y - low) * row_floats() + (left + x) * lanes;
  }
};

// The scratch for `images` images, in floats; includes space for a vector load that starts at the last pixel.
inline int64_t formed_floats(FormedRows rows, int64_t images, int64_t height) {
  rows.low = 0;
  rows.high = height;
  return images * rows.image_floats() + kPanelVectors * kVec;
}

// Calls form(to, image, y) for all rows, and writes the zeros beside them.
template <typename Form>
void form_rows(const FormedRows& formed, int64_t images, const Form& form) {
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t y = formed.low; y < formed.high; ++y) {
      float* row = formed.pixel(i, y, 0);
      std::fill_n(row - formed.left * formed.lanes, formed.left * formed.lanes, 0.f);
      form(row, i, y);
      std::fill_n(row + formed.width * formed.lanes, formed.right * formed.lanes, 0.f);
    }
  }
}

// One product: `rows` rows, the positions of one output row of an image or one position of several images, by the
// packed weight. A row consists of `runs` runs of `run` lanes. The first run's rows of the weight begin at `depth`.
template <typename out_t>
struct Product {
  const float* from;
  int64_t runs, run, depth;
  int64_t rows;
  out_t* to;
};

// Products that share their strides.
template <typename out_t>
struct Products {
  int64_t stride, row_step, depth_step; // between rows of A; between runs in A; between runs in the weight
  int64_t to_stride; // between rows of the result
  std::vector<Product<out_t>> all{};

  void add(const float* from, int64_t runs, int64_t run, int64_t depth, int64_t rows, out_t* to) {
    all.push_back({from, std::max<int64_t>(runs, 0), std::max<int64_t>(run, 0), depth, rows, to});
  }
};

// Like multiply_rows, but replaces a last full tile and a small remainder by two tiles of about the same size.
template <int V, typename Arithmetic = Fp32, typename Epilogue>
void multiply_evenly(const Rows& a, int64_t rows, const float* panel, int64_t column, const Epilogue& epilogue) {
  constexpr int R = kTileRows<V>, middle = R == 12 ? 8 : R == 6 ? 4 : R / 2;
  const int64_t rest = rows % R;
  const int64_t whole = rest > 0 && R + rest <= 2 * middle && rows > R ? rows - rest - R : rows - rest;
  float* parked = scratch<ParkedTile>(kRegisters * kVec);
  multiply_rows<V, R, Arithmetic>(a, 0, whole, panel, column, parked, epilogue);
  if (whole < rows) {
    multiply_rows<V, middle, Arithmetic>(a, whole, rows, panel, column, parked, epilogue);
  }
}

// Computes all products, panel by panel, so that a panel of the weight stays in the cache for all products. depth: of
// the whole packed weight; a product may use a part of it. epilogue_of(product): an epilogue as for multiply().
template <typename Arithmetic, typename out_t, typename EpilogueOf>
void multiply_all(
    const Products<out_t>& products,
    const float* packed,
    int64_t depth,
    const Panels& panels,
    const EpilogueOf& epilogue_of) {
  std::vector<int64_t> taps, depths;
  for (int64_t p = 0; p < panels.count; ++p) {
    with_vectors(panels.width(p), [&](auto v) {
      for (const Product<out_t>& product : products.all) {
        taps.resize(product.runs);
        depths.resize(product.runs);
        for (int64_t r = 0; r < product.runs; ++r) {
          taps[r] = r * products.row_step;
          depths[r] = product.depth + r * products.depth_step;
        }
        const Rows rows{product.from, products.stride, product.run, taps.data(), product.runs, depths.data()};
        multiply_evenly<v, Arithmetic>(
            rows, product.rows, packed + panels.offset(p, depth), panels.column(p), epilogue_of(product));
      }
    });
  }
}

// x and its deferred normalisation.
template <typename Arithmetic, typename scalar_t>
struct Input {
  using Number = typename Arithmetic::Number;

  const ConvShape& shape;
  const scalar_t* x;
  Deferred deferred;

  bool is_deferred() const {
    return deferred.rows || deferred.act != Act::identity || deferred.gate;
  }

  // Scratch for the input rows that the band's output rows depend on, with pixels of this many lanes.
  FormedRows rows(const Band& band, int64_t lanes, float* data) const {
    const int64_t low = std::clamp<int64_t>(band.begin * shape.stride - shape.padding, 0, shape.height);
    const int64_t high = (band.end - 1) * shape.stride - shape.padding + shape.kernel;
    return {data, lanes, shape.width, shape.padding, shape.padding, low,
            std::clamp<int64_t>(high, low, shape.height)};
  }
  int64_t floats(const Bands& bands, int64_t lanes) const { // an upper bound on the scratch of rows()
    return formed_floats(
        rows(bands.at(0), lanes, nullptr), bands.images,
        std::min((bands.rows - 1) * shape.stride + shape.kernel, shape.height));
  }

  // Computes h as operand A of multiply(), in Arithmetic::lanes(channels) lanes.
  void form(const Band& band, const FormedRows& formed) const {
    form_rows(formed, band.images, [&](float* to, int64_t i, int64_t y) { form_row(band.image + i, y, to); });
  }

  // Computes h as an operand of the weight gradient, in `channels` lanes: pairs are of pixel x and pixel x + stride.
  void form_outer(const Band& band, const FormedRows& formed) const {
    if constexpr (std::is_same_v<Arithmetic, Fp32>) {
      form(band, formed);
    } else {
      const int64_t pixels = formed.row_floats() / formed.lanes, lanes = Arithmetic::lanes(shape.channels);
      const int64_t paired = std::max<int64_t>(pixels - shape.stride, 0) * shape.channels;
      float* memory = scratch<FormedRow>(pixels * lanes);
      for (int64_t i = 0; i < band.images; ++i) {
        for (int64_t y = formed.low; y < formed.high; ++y) {
          const FormedRows row{memory, lanes, formed.width, formed.left, formed.right, y, y + 1};
          form_rows(row, 1, [&](float* to, int64_t, int64_t) { form_row(band.image + i, y, to); });
          const auto* from = reinterpret_cast<const Number*>(memory);
          float* to = formed.pixel(i, y, -formed.left);
          pair_rows(to, from, from + shape.stride * shape.channels, paired);
          pair_rows(to + paired, from + paired, nullptr, formed.row_floats() - paired);
        }
      }
    }
  }

  void form_row(int64_t n, int64_t y, float* lanes) const {
    if (y % pixel_step() != first_pixel()) {
      return;
    }
    auto* to = reinterpret_cast<Number*>(lanes);
    const scalar_t* from = x + (n * shape.height + y) * shape.width * shape.channels;
    with_act(deferred.act, [&](auto act) {
      if (!is_deferred()) {
        copy_row(from, to);
      } else if (deferred.gate) {
        form_pixels<act, true>(n, from, to);
      } else {
        form_pixels<act, false>(n, from, to);
      }
    });
  }

  // A 1 x 1 kernel with a stride reads every stride-th row and pixel only.
  int64_t pixel_step() const {
    return shape.kernel == 1 ? shape.stride : 1;
  }
  int64_t first_pixel() const { // also the first row
    return (pixel_step() - shape.padding % pixel_step()) % pixel_step();
  }

  void copy_row(const scalar_t* from, Number* to) const {
    for_panels(shape.width * shape.channels, [&]<typename P>(const P& panel) {
      for (int v = 0; v < P::vectors; ++v) {
        panel.put(to, v, panel.get(from, v));
      }
    });
  }

  template <Act act, bool gated>
  void form_pixels(int64_t n, const scalar_t* from, Number* to) const {
    for_panels(shape.channels, [&]<typename P>(P panel) {
      panel.ahead = kRowsAhead * shape.width * shape.channels;
      Vec a[P::vectors], b[P::vectors], g[P::vectors];
#pragma GCC unroll 2
      for (int v = 0; v < P::vectors; ++v) {
        a[v] = panel.get_or(deferred.scale_of(n, shape.images, shape.channels), v, 1);
        b[v] = panel.get_or(deferred.shift_of(n, shape.images, shape.channels), v, 0);
        g[v] = panel.get_or(deferred.gate_of(n, shape.channels), v, 1);
      }
      for (int64_t at = first_pixel() * shape.channels; at < shape.width * shape.channels;
           at += pixel_step() * shape.channels) {
#pragma GCC unroll 2
        for (int v = 0; v < P::vectors; ++v) {
          Vec h = activate<act>(at::vec::fmadd(panel.read(from + at, v), a[v], b[v]));
          if constexpr (gated) {
            h = h * g[v];
          }
          panel.put(to + at, v, h);
        }
      }
    });
  }
};

// Whether the rows of a product are one position of several images.
inline bool by_image(const ConvShape& shape, int64_t images) {
  return shape.out_width < kNarrow && images > shape.out_width;
}

// Calls run(Arithmetic{}), with the arithmetic of the products of a convolution.
template <typename scalar_t, typename Run>
void with_arithmetic_of(const ConvShape& shape, const Run& run) {
  if (shape.channels % 2 == 0 && shape.out_channels % 2 == 0) {
    with_arithmetic<scalar_t>(run);
  } else {
    run(Fp32{});
  }
}

} // namespace dspnet::CPU_CAPABILITY::dense
