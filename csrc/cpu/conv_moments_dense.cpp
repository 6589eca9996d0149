// conv_moments, dense: k x k kernels of any stride and padding, as matrix products over patches, and its gradient.
//
// A band, some images or some rows of one, is formed once into scratch: h = act(scale x + shift) * gate, its rows with
// zeros on both sides. Blocks of output positions gather their patches [k k C] from it and are multiplied by the packed
// weight; the epilogue stores y and sums it for the moments. Per position: 2 k k C O flops, C stride^2 + O values read or
// written, and k k C floats copied within the caches.
//
// Backward, band by band: e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt is formed likewise. dW sums e^T patches(h).
// dh is the convolution of e with the taps that reach an input position. Which these are depends on the position modulo
// the stride: each such class is a product of its own, stride^2 of them. Then dx and the sums for dscale, dshift, dgate.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_moments.h"
#include "conv_output.h"
#include "gemm.h"
#include "moments.h"
#include "panels.h"
#include "thread_sums.h"

namespace dspnet {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBandBytes = 256 << 10; // of formed rows
constexpr int64_t kPatchBytes = 192 << 10; // of the patches of a block
constexpr int64_t kBlockRows = 192; // positions, at most; their fp32 sums are exact enough

struct PackedWeight;
struct PartialWeight;
struct PartialGate;
struct FormedInput;
struct FormedOutput;
struct Patches;
struct BlockOutput;
struct BlockInput;
struct BlockSums;
struct BlockPositions;

int64_t block_rows(int64_t patch_floats) {
  const int64_t rows = kPatchBytes / (patch_floats * static_cast<int64_t>(sizeof(float)));
  return std::clamp(rows / kRowMultiple * kRowMultiple, kRowMultiple, kBlockRows);
}

// Some images, whole, or some output rows [begin, end) of one.
struct Band {
  int64_t index, segment, image, images, begin, end;
};

// Images are in segments, those of one view or of one row of scale and shift. No band straddles two.
struct Bands {
  int64_t segments, segment_images, height, images, rows, parts; // parts: of an image, if it is more than one

  // floats: to be formed for an output row.
  Bands(const ConvShape& shape, const Owed& owed, int64_t floats)
      : segments(std::max<int64_t>({shape.views, owed.rows, 1})),
        segment_images(shape.images / segments),
        height(shape.out_height) {
    const int64_t bytes = height * floats * static_cast<int64_t>(sizeof(float));
    const int64_t wanted = std::max((bytes + kBandBytes - 1) / kBandBytes, 2 * at::get_num_threads() / shape.images);
    rows = (height + wanted - 1) / std::max<int64_t>(wanted, 1);
    rows = std::clamp<int64_t>(rows, 1, height);
    parts = (height + rows - 1) / rows;
    const int64_t share = shape.images / (4 * at::get_num_threads());
    images = parts > 1 ? 1 : std::max<int64_t>(std::min({kBlockRows / shape.positions(), share, segment_images}), 1);
  }

  int64_t per_segment() const {
    return (segment_images + images - 1) / images * parts;
  }
  int64_t count() const {
    return segments * per_segment();
  }
  Band at(int64_t b) const {
    const int64_t segment = b / per_segment(), within = b % per_segment(), part = within % parts;
    const int64_t first = within / parts * images;
    return {
        b, segment, segment * segment_images + first, std::min(images, segment_images - first), part * rows,
        std::min((part + 1) * rows, height)};
  }
};

// Rows [low, high) of a band's images in scratch, with zero pixels on both sides. All other rows are zero.
struct FormedRows {
  float* data;
  int64_t channels, width, left, right, low, high;

  int64_t row_floats() const {
    return (left + width + right) * channels;
  }
  int64_t rows() const {
    return high - low;
  }
  // The pixel `left` pixels before the image. A row of zeros comes after the last image.
  float* row(int64_t image, int64_t y) const {
    return data + (image * rows() + y - low) * row_floats();
  }
  const float* row_or_zeros(int64_t image, int64_t images, int64_t y) const {
    return y >= low && y < high ? row(image, y) : data + images * rows() * row_floats();
  }
};

// Calls form(to, image, y) for the pixels of all rows, and makes the zeros.
template <typename Form>
void form_rows(const FormedRows& formed, int64_t images, const Form& form) {
  const int64_t before = formed.left * formed.channels, after = formed.right * formed.channels;
  const int64_t pixels = formed.width * formed.channels;
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t y = formed.low; y < formed.high; ++y) {
      float* row = formed.row(i, y);
      std::fill_n(row, before, 0.f);
      form(row + before, i, y);
      std::fill_n(row + before + pixels, after, 0.f);
    }
  }
  std::fill_n(formed.data + images * formed.rows() * formed.row_floats(), formed.row_floats(), 0.f);
}

DSPNET_INLINE void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kVec <= count; i += kVec) {
    Vec::loadu(from + i).store(to + i);
  }
  if (i < count) {
    store(to + i, load(from + i, count - i), count - i);
  }
}

// A patch: `runs` runs of `run` floats, from as many rows. The next position's begins `step` floats later.
struct PatchShape {
  int64_t runs, run, step, stride; // stride: from patch to patch; what is left of it is zero

  static PatchShape of(int64_t runs, int64_t run, int64_t step) {
    // An odd number of cache lines: patches one below another then fall into different sets of the cache.
    constexpr int64_t line = 16;
    return {runs, run, step, (round_up(runs * run, line) / line | 1) * line};
  }
  int64_t floats() const {
    return runs * run;
  }
};

// The patches of `count` positions side by side. rows: where each run of the first begins.
void gather(const PatchShape& patch, const float* const* rows, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i, to += patch.stride) {
    for (int64_t rest = patch.stride; rest > patch.floats(); rest -= kVec) {
      Vec(0).store(to + rest - kVec);
    }
    for (int64_t r = 0; r < patch.runs; ++r) {
      copy(to + r * patch.run, rows[r] + i * patch.step, patch.run);
    }
  }
}

// x and what it is owed.
template <typename scalar_t>
struct Input {
  const ConvShape& shape;
  const scalar_t* x;
  Owed owed;

  bool is_owed() const {
    return owed.rows || owed.act != Act::identity || owed.gate;
  }
  const float* scale(int64_t n) const { // of image n, or null
    return owed.rows ? owed.scale + owed.row(n, shape.images) * shape.channels : nullptr;
  }
  const float* shift(int64_t n) const {
    return owed.rows ? owed.shift + owed.row(n, shape.images) * shape.channels : nullptr;
  }
  const float* gate(int64_t n) const {
    return owed.gate ? owed.gate + n * shape.channels : nullptr;
  }

  // The input rows that output rows [begin, end) need.
  FormedRows rows(const Band& band, float* data) const {
    const int64_t low = band.begin * shape.stride - shape.padding;
    const int64_t high = (band.end - 1) * shape.stride - shape.padding + shape.kernel;
    const int64_t first = std::clamp<int64_t>(low, 0, shape.height);
    return {data, shape.channels, shape.width, shape.padding, shape.padding, first,
            std::clamp<int64_t>(high, first, shape.height)};
  }
  int64_t floats(const Bands& bands) const { // that rows() needs at most
    const int64_t rows = std::min((bands.rows - 1) * shape.stride + shape.kernel, shape.height);
    return (bands.images * rows + 1) * (shape.width + 2 * shape.padding) * shape.channels + kVec;
  }

  void form(const Band& band, const FormedRows& formed) const {
    with_act(owed.act, [&](auto act) {
      form_rows(formed, band.images, [&](float* to, int64_t i, int64_t y) {
        const int64_t n = band.image + i;
        const scalar_t* from = x + (n * shape.height + y) * shape.width * shape.channels;
        if (!is_owed()) {
          form_as_is(from, to);
        } else if (owed.gate) {
          form_row<act, true>(n, from, to);
        } else {
          form_row<act, false>(n, from, to);
        }
      });
    });
  }

  void form_as_is(const scalar_t* from, float* to) const {
    const int64_t floats = shape.width * shape.channels;
    for_panels(floats, [&]<typename P>(const P& panel) {
      for (int v = 0; v < P::vectors; ++v) {
        panel.put(to, v, panel.get(from, v));
      }
    });
  }

  template <Act act, bool gated>
  void form_row(int64_t n, const scalar_t* from, float* to) const {
    for_panels(shape.channels, [&]<typename P>(const P& panel) {
      Vec a[P::vectors], b[P::vectors], g[P::vectors];
#pragma GCC unroll 2
      for (int v = 0; v < P::vectors; ++v) {
        a[v] = panel.get_or(scale(n), v, 1);
        b[v] = panel.get_or(shift(n), v, 0);
        g[v] = panel.get_or(gate(n), v, 1);
      }
      for (int64_t at = 0; at < shape.width * shape.channels; at += shape.channels) {
#pragma GCC unroll 2
        for (int v = 0; v < P::vectors; ++v) {
          Vec h = activate<act>(at::vec::fmadd(panel.get(from + at, v), a[v], b[v]));
          if constexpr (gated) {
            h = h * g[v];
          }
          panel.put(to + at, v, h);
        }
      }
    });
  }
};

// Patches of h for output positions. Block after block of them: run(first position in the band, number, patches).
template <typename Run>
void for_patches(
    const ConvShape& shape, const Band& band, const FormedRows& h, int64_t limit, float* patches, const Run& run) {
  const PatchShape patch =
      PatchShape::of(shape.kernel, shape.kernel * shape.channels, shape.stride * shape.channels);
  const int64_t height = band.end - band.begin, positions = band.images * height * shape.out_width;
  std::vector<const float*> rows(shape.kernel);
  for (int64_t first = 0; first < positions; first += limit) {
    const int64_t last = std::min(first + limit, positions);
    for (int64_t at = first; at < last;) {
      const int64_t line = at / shape.out_width, x = at % shape.out_width;
      const int64_t count = std::min(shape.out_width - x, last - at);
      const int64_t top = (band.begin + line % height) * shape.stride - shape.padding;
      for (int64_t r = 0; r < shape.kernel; ++r) {
        rows[r] = h.row_or_zeros(line / height, band.images, top + r) + x * patch.step;
      }
      gather(patch, rows.data(), count, patches + (at - first) * patch.stride);
      at += count;
    }
    run(first, last - first, Matrix{patches, patch.stride});
  }
}

// Calls run(index) for [0, count) in parallel.
template <typename Run>
void in_parallel(int64_t count, int64_t floats_each, const Run& run) {
  constexpr int64_t kGrain = 1 << 15; // floats: less is not worth waking a thread
  at::parallel_for(0, count, kGrain / std::max<int64_t>(floats_each, 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      run(i);
    }
  });
}

// The weight for y: depth [ky, kx, channel], columns are output channels.
const float* pack_forward(const ConvShape& shape, const Prefix& weight, const Panels& panels) {
  const int64_t taps = shape.kernel * shape.kernel, depth = taps * shape.channels;
  float* to = scratch<PackedWeight>(panels.padded() * depth);
  in_parallel(panels.count * taps, kPanelVectors * kVec * shape.channels, [&](int64_t i) {
    const int64_t p = i / taps, tap = i % taps;
    pack_panel(
        to + panels.offset(p, depth) + tap * shape.channels * panels.width(p), panels, p,
        &weight.at(0, 0, tap / shape.kernel, tap % shape.kernel), weight.in, weight.out, shape.channels);
  });
  return to;
}

// The input positions (y, x), (y + stride, x), (y, x + stride), ..., and the taps that reach them.
struct Class {
  int64_t y, x; // less than the stride
  int64_t first_row, first_column, rows, columns; // taps: ky = first_row, first_row + stride, ... and kx likewise
  float* weight; // packed, depth [ky, kx from the last to the first, output channel]; columns are input channels

  int64_t taps() const {
    return rows * columns;
  }
};

// Those that any tap reaches.
std::vector<Class> classes_of(const ConvShape& shape, const Prefix& weight, const Panels& panels) {
  const int64_t stride = shape.stride, channels = shape.out_channels;
  float* to = scratch<PackedWeight>(panels.padded() * shape.kernel * shape.kernel * channels);
  std::vector<Class> classes;
  for (int64_t y = 0; y < std::min(stride, shape.height); ++y) {
    for (int64_t x = 0; x < std::min(stride, shape.width); ++x) {
      const int64_t row = (y + shape.padding) % stride, column = (x + shape.padding) % stride;
      if (std::max(row, column) < shape.kernel) {
        const int64_t rows = (shape.kernel - row - 1) / stride + 1, columns = (shape.kernel - column - 1) / stride + 1;
        classes.push_back({y, x, row, column, rows, columns, to});
        to += panels.padded() * rows * columns * channels;
      }
    }
  }
  for (const Class& each : classes) {
    in_parallel(panels.count * each.taps(), kPanelVectors * kVec * channels, [&](int64_t i) {
      const int64_t p = i / each.taps(), tap = i % each.taps();
      const int64_t ky = each.first_row + tap / each.columns * stride;
      const int64_t kx = each.first_column + (each.columns - 1 - tap % each.columns) * stride;
      pack_panel(
          each.weight + panels.offset(p, each.taps() * channels) + tap * channels * panels.width(p), panels, p,
          &weight.at(0, 0, ky, kx), weight.out, weight.in, channels);
    });
  }
  return classes;
}

// dy, and what else makes e of it.
template <typename scalar_t>
struct OutputGradient {
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

  // Rows that reach input rows [begin, end), and [band.begin, band.end) themselves.
  FormedRows rows(const Band& band, int64_t begin, int64_t end, float* data) const {
    const int64_t low = (begin + shape.padding - shape.kernel) / shape.stride; // or one less than needed
    const int64_t high = (end - 1 + shape.padding) / shape.stride + 1;
    return {data, shape.out_channels, shape.out_width, left(), right(),
            std::clamp<int64_t>(low, 0, band.begin), std::clamp(high, band.end, shape.out_height)};
  }
  int64_t floats(const Bands& bands) const { // that rows() needs at most
    const int64_t more = 2 * (shape.kernel + shape.padding) / shape.stride + 4;
    const int64_t rows = std::min(bands.rows + more, shape.out_height);
    return (bands.images * rows + 1) * (left() + shape.out_width + right()) * shape.out_channels + kVec;
  }
  int64_t left() const {
    return std::max<int64_t>((shape.kernel - 1 - shape.padding + shape.stride - 1) / shape.stride, 0);
  }
  int64_t right() const {
    return std::max<int64_t>((shape.width - 1 + shape.padding) / shape.stride - (shape.out_width - 1), 0);
  }

  void form(const Band& band, const FormedRows& formed) const {
    const int64_t channels = shape.out_channels, view = shape.views > 1 ? band.segment * channels : 0;
    form_rows(formed, band.images, [&](float* to, int64_t i, int64_t row) {
      const int64_t first = ((band.image + i) * shape.out_height + row) * shape.out_width * channels;
      for_panels(channels, [&]<typename P>(const P& panel) {
        if (shape.views) {
          form_panel<true>(panel, first, view, to);
        } else {
          form_panel<false>(panel, first, view, to);
        }
      });
    });
  }

  template <bool has_moments, typename P>
  void form_panel(const P& panel, int64_t first, int64_t view, float* to) const {
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
        Vec e = panel.get(grad_y + first + at, v);
        if constexpr (has_moments) {
          e = e + at::vec::fmadd(b[v], panel.get(y + first + at, v) - center[v], a[v]);
        }
        panel.put(to + at, v, e);
      }
    }
  }
};

// Epilogue: rows of whole vectors, row r to positions[r].
struct StoreAt {
  float* to;
  int64_t stride;
  const int32_t* positions;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* at = to + positions[row + r] * stride + column;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        sums[r][v].store(at + v * kVec);
      }
    }
  }
};

// Epilogue: adds to a matrix in whole vectors, or begins it.
struct AddToMatrix {
  float* to;
  int64_t stride;
  bool begins;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t i, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* row = to + (i + r) * stride + column;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        (begins ? sums[r][v] : Vec::loadu(row + v * kVec) + sums[r][v]).store(row + v * kVec);
      }
    }
  }
};

// From dh to dx for some positions of one image, and sums of dz, dz x and dh act(z), [C] each.
template <Act act, bool gated, typename P, typename scalar_t>
void finish_panel(
    const P& panel,
    const Input<scalar_t>& input,
    int64_t n,
    const float* grad_h,
    int64_t stride,
    const scalar_t* x,
    scalar_t* grad_x,
    int64_t positions,
    float* of_z,
    float* of_x,
    float* of_gate) {
  const int64_t channels = input.shape.channels;
  Vec scale[P::vectors], shift[P::vectors], gate[P::vectors];
  Vec sum_z[P::vectors], sum_x[P::vectors], sum_gate[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(input.scale(n), v, 1);
    shift[v] = panel.get_or(input.shift(n), v, 0);
    gate[v] = panel.get_or(input.gate(n), v, 1);
    sum_z[v] = sum_x[v] = sum_gate[v] = Vec(0);
  }
  for (int64_t i = 0; i < positions; ++i, grad_h += stride, x += channels, grad_x += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec value = panel.get(x, v), z = at::vec::fmadd(value, scale[v], shift[v]);
      Vec dz = panel.get(grad_h, v);
      if constexpr (gated) {
        sum_gate[v] = at::vec::fmadd(dz, activate<act>(z), sum_gate[v]);
        dz = dz * gate[v];
      }
      dz = dz * slope<act>(z);
      sum_z[v] = sum_z[v] + dz;
      sum_x[v] = at::vec::fmadd(dz, value, sum_x[v]);
      panel.put(grad_x, v, dz * scale[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(of_z, v, sum_z[v]);
    panel.add(of_x, v, sum_x[v]);
    if constexpr (gated) {
      panel.add(of_gate, v, sum_gate[v]);
    }
  }
}

template <typename scalar_t>
struct BackwardPass {
  const ConvShape& shape;
  const Backward<scalar_t>& args;
  Input<scalar_t> input;
  OutputGradient<scalar_t> output;
  Bands bands;
  PatchShape patch; // of h
  Panels in, patch_columns;
  std::vector<Class> classes;
  int64_t rows_h, rows_e; // positions in a block of either kind

  BackwardPass(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape),
        args(args),
        input{shape, args.x, args.owed},
        output(shape, args),
        bands(
            shape,
            args.owed,
            shape.stride * (shape.width + 2 * shape.padding) * shape.channels +
                (shape.out_width + shape.kernel) * shape.out_channels),
        patch(PatchShape::of(shape.kernel, shape.kernel * shape.channels, shape.stride * shape.channels)),
        in(shape.channels),
        patch_columns(patch.floats()),
        rows_h(block_rows(patch.stride)) {
    int64_t longest = 1;
    if (args.grad_x) {
      classes = classes_of(shape, args.weight, in);
      for (const Class& each : classes) {
        longest = std::max(longest, patch_of(each).stride);
      }
    }
    rows_e = std::max(block_rows(longest) / shape.width, int64_t{1}) * shape.width;
  }

  // The input rows of each image that a band is to give gradients for.
  int64_t input_begin(const Band& band) const {
    return band.begin == 0 ? 0 : std::min(band.begin * shape.stride, shape.height);
  }
  int64_t input_end(const Band& band) const {
    return band.end == shape.out_height ? shape.height : std::min(band.end * shape.stride, shape.height);
  }

  int64_t weight_size() const {
    return shape.out_channels * patch_columns.padded();
  }

  // Adds a band's e^T patches(h) to a matrix [out_channels, padded columns], or begins it.
  void weight_gradient(const Band& band, const FormedRows& h, const FormedRows& e, float* to, bool begins) const {
    const int64_t channels = shape.out_channels, height = band.end - band.begin;
    float* patches = scratch<Patches>(rows_h * patch.stride + kVec);
    float* rows = scratch<BlockOutput>(rows_h * channels + kVec);
    for_patches(shape, band, h, rows_h, patches, [&](int64_t first, int64_t count, const Matrix& matrix) {
      for (int64_t at = first; at < first + count;) {
        const int64_t line = at / shape.out_width, x = at % shape.out_width;
        const int64_t pixels = std::min(shape.out_width - x, first + count - at);
        const float* from = e.row(line / height, band.begin + line % height) + (e.left + x) * channels;
        copy(rows + (at - first) * channels, from, pixels * channels);
        at += pixels;
      }
      multiply_outer(
          Matrix{rows, channels}, channels, matrix, patch_columns, 0, patch_columns.count, count,
          AddToMatrix{to, patch_columns.padded(), begins && first == 0});
    });
  }

  // dh for some rows of the band's images, `lines` from the `first` on: [positions, in.padded()].
  void input_gradient(const Band& band, const FormedRows& e, int64_t first, int64_t lines, float* grad_h) const {
    const int64_t begin = input_begin(band), height = input_end(band) - begin;
    if (static_cast<int64_t>(classes.size()) < std::min(shape.stride, shape.height) * std::min(shape.stride, shape.width)) {
      std::fill_n(grad_h, lines * shape.width * in.padded(), 0.f); // there are positions that no tap reaches
    }
    int32_t* positions = reinterpret_cast<int32_t*>(scratch<BlockPositions>(rows_e));
    std::vector<const float*> rows(shape.kernel);
    for (const Class& each : classes) {
      const PatchShape of_e = patch_of(each);
      float* patches = scratch<Patches>(rows_e * of_e.stride + kVec);
      const int64_t columns = (shape.width - each.x - 1) / shape.stride + 1;
      const int64_t last_kx = each.first_column + (each.columns - 1) * shape.stride;
      const int64_t x = (each.x + shape.padding - last_kx) / shape.stride + e.left; // exact; of e, for the first position
      int64_t count = 0;
      for (int64_t line = first; line < first + lines; ++line) {
        const int64_t image = line / height, y = begin + line % height;
        if (y % shape.stride != each.y) {
          continue;
        }
        for (int64_t r = 0; r < each.rows; ++r) {
          const int64_t row = (y + shape.padding - each.first_row) / shape.stride - r;
          rows[r] = e.row_or_zeros(image, band.images, row) + x * shape.out_channels;
        }
        gather(of_e, rows.data(), columns, patches + count * of_e.stride);
        for (int64_t i = 0; i < columns; ++i) {
          positions[count++] = static_cast<int32_t>((line - first) * shape.width + each.x + i * shape.stride);
        }
      }
      multiply(
          Rows{patches, of_e.stride, of_e.floats()}, count, each.weight, in, 0, in.count,
          StoreAt{grad_h, in.padded(), positions});
    }
  }

  PatchShape patch_of(const Class& each) const {
    return PatchShape::of(each.rows, each.columns * shape.out_channels, shape.out_channels);
  }

  // dx for positions from `first` on, in whole x, which may be of several images.
  template <typename Pending>
  void finish(int64_t first, int64_t count, const float* grad_h, float* gates, Pending& pending) const {
    const int64_t per_image = shape.height * shape.width, channels = shape.channels, stride = in.padded();
    for (int64_t at = first; at < first + count;) {
      const int64_t n = at / per_image, positions = std::min((n + 1) * per_image, first + count) - at;
      const float* from = grad_h + (at - first) * stride;
      const scalar_t* x = args.x + at * channels;
      scalar_t* to = args.grad_x + at * channels;
      if (!input.is_owed()) {
        for (int64_t i = 0; i < positions; ++i) {
          for_panels(channels, [&]<typename P>(const P& panel) {
            for (int v = 0; v < P::vectors; ++v) {
              panel.put(to + i * channels, v, panel.get(from + i * stride, v));
            }
          });
        }
      } else {
        const auto& [of_z, of_x] = pending.next(positions, args.owed.row(n, shape.images));
        float* of_gate = gates ? gates + (bands.parts > 1 ? 0 : n * channels) : nullptr;
        with_act(args.owed.act, [&](auto act) {
          for_panels(channels, [&](const auto& panel) {
            if (of_gate) {
              finish_panel<act, true>(panel, input, n, from, stride, x, to, positions, of_z, of_x, of_gate);
            } else {
              finish_panel<act, false>(panel, input, n, from, stride, x, to, positions, of_z, of_x, of_gate);
            }
          });
        });
      }
      at += positions;
    }
  }

  // Adds up the threads' matrices into the prefix.
  void merge_weights(const float* weights, const std::vector<char>& used) const {
    const int64_t stride = patch_columns.padded(), kernel = shape.kernel, channels = shape.channels;
    in_parallel(shape.out_channels, stride, [&](int64_t o) {
      float* sum = scratch<BlockSums>(stride);
      std::fill_n(sum, stride, 0.f);
      for (size_t thread = 0; thread < used.size(); ++thread) {
        const float* part = weights + thread * weight_size() + o * stride;
        for (int64_t i = 0; used[thread] && i < stride; ++i) {
          sum[i] += part[i];
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
          args.grad_weight.at(o, c, tap / kernel, tap % kernel) += sum[tap * channels + c];
        }
      }
    });
  }

  void run() const {
    const int64_t threads = at::get_num_threads(), channels = shape.channels;
    float* weights = args.grad_weight.data ? scratch<PartialWeight>(threads * weight_size()) : nullptr;
    std::vector<char> used(threads, 0);
    ThreadSums sums_z(args.owed.rows, channels), sums_x(args.owed.rows, channels);
    // Of each band if several make an image, otherwise of each image.
    const bool gated = args.grad_x && args.owed.gate, in_parts = gated && bands.parts > 1;
    float* gate_parts = in_parts ? scratch<PartialGate>(bands.count() * channels) : nullptr;

    at::parallel_for(0, bands.count(), 1, [&](int64_t b, int64_t last) {
      const int64_t thread = at::get_thread_num();
      float* formed_h = scratch<FormedInput>(input.floats(bands));
      float* formed_e = scratch<FormedOutput>(output.floats(bands));
      auto pending = pending_sums<2>(channels, int64_t{0}, [&](int64_t row, const auto& sums) {
        sums_z.add(row, sums[0]);
        sums_x.add(row, sums[1]);
      });
      for (; b < last; ++b) {
        const Band band = bands.at(b);
        const FormedRows e = output.rows(band, input_begin(band), input_end(band), formed_e);
        output.form(band, e);
        if (weights) {
          const FormedRows h = input.rows(band, formed_h);
          input.form(band, h);
          weight_gradient(band, h, e, weights + thread * weight_size(), !used[thread]);
          used[thread] = 1;
        }
        if (args.grad_x) {
          float* gates = in_parts ? gate_parts + b * channels : args.grad_gate;
          if (gated) {
            std::fill_n(in_parts ? gates : gates + band.image * channels, band.images * channels, 0.f);
          }
          input_gradients(band, e, gates, pending);
        }
      }
      pending.flush();
    });

    if (weights) {
      merge_weights(weights, used);
    }
    if (args.grad_x) {
      sums_z.write(args.grad_shift);
      sums_x.write(args.grad_scale);
    }
    if (in_parts) {
      std::fill_n(args.grad_gate, shape.images * channels, 0.f);
      for (int64_t i = 0; i < bands.count() * channels; ++i) {
        args.grad_gate[i / channels / bands.parts * channels + i % channels] += gate_parts[i];
      }
    }
  }

  // dx of a band, block after block.
  template <typename Pending>
  void input_gradients(const Band& band, const FormedRows& e, float* gates, Pending& pending) const {
    const int64_t begin = input_begin(band), lines = band.images * (input_end(band) - begin);
    const int64_t limit = rows_e / shape.width;
    float* grad_h = scratch<BlockInput>(rows_e * in.padded());
    for (int64_t first = 0; first < lines; first += limit) {
      const int64_t some = std::min(limit, lines - first);
      input_gradient(band, e, first, some, grad_h);
      const int64_t line = band.image * shape.height + begin + first; // of all images: the band's are consecutive
      finish(line * shape.width, some * shape.width, grad_h, gates, pending);
    }
  }
};

} // namespace

template <typename scalar_t>
void dense_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const Input<scalar_t> input{shape, args.x, args.owed};
  const Bands bands(shape, args.owed, shape.stride * (shape.width + 2 * shape.padding) * shape.channels);
  const PatchShape patch = PatchShape::of(shape.kernel, shape.kernel * shape.channels, shape.stride * shape.channels);
  const int64_t limit = block_rows(patch.stride), channels = shape.out_channels, views = shape.views;
  const Panels panels(channels);
  const float* weight = pack_forward(shape, args.weight, panels);
  std::vector<ChannelMoments> moments(at::get_num_threads() * views); // [thread, view]

  at::parallel_for(0, bands.count(), 1, [&](int64_t b, int64_t last) {
    float* formed = scratch<FormedInput>(input.floats(bands));
    float* patches = scratch<Patches>(limit * patch.stride + kVec);
    float* pivot = scratch<BlockSums>(3 * panels.padded());
    float *sum = pivot + panels.padded(), *square = sum + panels.padded();
    std::fill_n(pivot, panels.padded(), 0.f);
    for (; b < last; ++b) {
      const Band band = bands.at(b);
      const FormedRows h = input.rows(band, formed);
      input.form(band, h);
      const int64_t begin = (band.image * shape.out_height + band.begin) * shape.out_width;
      for_patches(shape, band, h, limit, patches, [&](int64_t first, int64_t count, const Matrix& matrix) {
        const Rows rows{matrix.data, matrix.stride, patch.floats()};
        StoreOutput<scalar_t> epilogue{args.y + (begin + first) * channels, channels};
        if (views == 0) {
          multiply(rows, count, weight, panels, 0, panels.count, epilogue);
          return;
        }
        ChannelMoments& view = moments[at::get_thread_num() * views + (views > 1 ? band.segment : 0)];
        epilogue.pivot = pivot;
        epilogue.sum = sum;
        epilogue.square = square;
        for (int64_t done = 0, some; done < count; done += some) {
          epilogue.has_pivot = view.to_pivot(pivot);
          some = epilogue.has_pivot ? count - done : std::min(count, kRowMultiple); // few for a mean that is a good pivot
          epilogue.y = args.y + (begin + first + done) * channels;
          multiply(rows.from(done), some, weight, panels, 0, panels.count, epilogue);
          view.merge(some, channels, pivot, sum, square);
        }
      });
    }
  });
  for (int64_t view = 0; view < views; ++view) {
    ChannelMoments all;
    for (size_t part = view; part < moments.size(); part += views) {
      all.merge(moments[part]);
    }
    all.write(channels, args.mean + view * channels, args.variance + view * channels);
  }
}

template <typename scalar_t>
void dense_backward(const ConvShape& shape, const Backward<scalar_t>& args) {
  BackwardPass<scalar_t>(shape, args).run();
}

template void dense_forward(const ConvShape&, const Forward<float>&);
template void dense_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void dense_backward(const ConvShape&, const Backward<float>&);
template void dense_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
