// conv_moments, dense: k x k kernels of any stride and padding, as matrix products, and its gradient.
//
// A band, some images or some rows of one, is formed once into scratch: h = act(scale x + shift) * gate, its rows with
// zeros on both sides. The k taps of one kernel row are then k C floats in a row, so a product needs no copy of patches:
// its rows are the positions of one output row, or, where those are few, one position of many images. Taps outside the
// image are left out. The epilogue stores y and sums it for the moments. Per position: 2 k k C O flops, C stride^2 + O
// values read or written.
//
// Backward, band by band: e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt is formed likewise. dW sums h^T e for every
// kernel row. dh is the convolution of e with the taps that reach an input position. Which these are depends on the
// position modulo the stride: each such class has a packed weight of its own. Then dx and the sums for dscale, dshift,
// dgate.
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

constexpr int64_t kBandBytes = 512 << 10; // of formed rows
constexpr int64_t kMomentRows = 192; // whose fp32 sums are exact enough
constexpr int64_t kOuterRows = 128; // that a weight gradient is summed over in registers
constexpr int64_t kNarrow = 8; // output rows shorter than this are too short for tiles

struct PackedWeight;
struct PartialWeight;
struct PartialGate;
struct FormedInput;
struct FormedOutput;
struct BandInput;
struct BlockSums;

// Some images, whole, or some output rows [begin, end) of one.
struct Band {
  int64_t segment, image, images, begin, end;
};

// Images are in segments, those of one view or of one row of scale and shift. No band straddles two.
struct Bands {
  int64_t segments, segment_images, height, images, rows, parts; // parts: of an image, if it is more than one

  // floats: to be formed for an output row.
  Bands(const ConvShape& shape, const Owed& owed, int64_t floats)
      : segments(std::max<int64_t>({shape.views, owed.rows, 1})),
        segment_images(shape.images / segments),
        height(shape.out_height) {
    const int64_t image_bytes = height * floats * static_cast<int64_t>(sizeof(float)), threads = at::get_num_threads();
    const int64_t wanted = std::max((image_bytes + kBandBytes - 1) / kBandBytes, 2 * threads / shape.images);
    rows = std::clamp<int64_t>((height + wanted - 1) / wanted, 1, height);
    parts = (height + rows - 1) / rows;
    const int64_t limit = std::min({kBandBytes / image_bytes, shape.images / (4 * threads), kRowMultiple});
    images = parts > 1 ? 1 : std::clamp<int64_t>(limit, 1, segment_images);
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
    return {segment, segment * segment_images + first, std::min(images, segment_images - first), part * rows,
            std::min((part + 1) * rows, height)};
  }
};

// Rows [low, high) of a band's images in scratch, with zero pixels on both sides.
struct FormedRows {
  float* data;
  int64_t channels, width, left, right, low, high;

  int64_t row_floats() const {
    return (left + width + right) * channels;
  }
  // An odd number of cache lines: the same position of many images then falls into different sets of the cache.
  int64_t image_floats() const {
    constexpr int64_t line = 16;
    return (round_up((high - low) * row_floats(), line) / line | 1) * line;
  }
  // Of the image itself, x < 0 being the zeros before it.
  float* pixel(int64_t image, int64_t y, int64_t x) const {
    return data + image * image_floats() + (y - low) * row_floats() + (left + x) * channels;
  }
};

// What `images` of them need; vectors may be read from the last pixel on.
int64_t formed_floats(FormedRows rows, int64_t images, int64_t height) {
  rows.low = 0;
  rows.high = height;
  return images * rows.image_floats() + kPanelVectors * kVec;
}

// Calls form(to, image, y) for the pixels of all rows, and makes the zeros.
template <typename Form>
void form_rows(const FormedRows& formed, int64_t images, const Form& form) {
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t y = formed.low; y < formed.high; ++y) {
      float* row = formed.pixel(i, y, 0);
      std::fill_n(row - formed.left * formed.channels, formed.left * formed.channels, 0.f);
      form(row, i, y);
      std::fill_n(row + formed.width * formed.channels, formed.right * formed.channels, 0.f);
    }
  }
}

// The positions of one row in one image, or one position of several images: rows by the packed weight. Their taps are
// `runs` runs of `run` floats; in the weight, the first one's rows begin at `depth`.
template <typename out_t>
struct Product {
  const float* from;
  int64_t runs, run, depth;
  int64_t rows;
  out_t* to;
};

// Products that differ in no more than that.
template <typename out_t>
struct Products {
  int64_t stride, row_step, depth_step; // from row to row of A; from run to run, there and in the weight
  int64_t to_stride; // from row to row of the result
  std::vector<Product<out_t>> all{};

  void add(const float* from, int64_t runs, int64_t run, int64_t depth, int64_t rows, out_t* to) {
    all.push_back({from, std::max<int64_t>(runs, 0), std::max<int64_t>(run, 0), depth, rows, to});
  }
};

// As multiply_rows, but where a tile and a small rest would be left, two tiles of about the same size.
template <int V, typename Epilogue>
void multiply_evenly(const Rows& a, int64_t rows, const float* panel, int64_t column, const Epilogue& epilogue) {
  constexpr int R = kTileRows<V>, middle = R == 12 ? 8 : R == 6 ? 4 : R / 2;
  const int64_t rest = rows % R;
  const int64_t whole = rest > 0 && R + rest <= 2 * middle && rows > R ? rows - rest - R : rows - rest;
  float* parked = scratch<ParkedTile>(kRegisters * kVec);
  multiply_rows<V, R>(a, 0, whole, panel, column, parked, epilogue);
  if (whole < rows) {
    multiply_rows<V, middle>(a, whole, rows, panel, column, parked, epilogue);
  }
}

// depth: of the whole packed weight, of which a product may use a part. Panel after panel, so that each stays in the
// cache for all products. epilogue_of(product): one of multiply()'s.
template <typename out_t, typename EpilogueOf>
void multiply_all(
    const Products<out_t>& products, const float* packed, int64_t depth, const Panels& panels, const EpilogueOf& epilogue_of) {
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
        multiply_evenly<v>(rows, product.rows, packed + panels.offset(p, depth), panels.column(p), epilogue_of(product));
      }
    });
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

  // The input rows that the band's output rows need.
  FormedRows rows(const Band& band, float* data) const {
    const int64_t low = std::clamp<int64_t>(band.begin * shape.stride - shape.padding, 0, shape.height);
    const int64_t high = (band.end - 1) * shape.stride - shape.padding + shape.kernel;
    return {data, shape.channels, shape.width, shape.padding, shape.padding, low,
            std::clamp<int64_t>(high, low, shape.height)};
  }
  int64_t floats(const Bands& bands) const { // that rows() needs at most
    return formed_floats(
        rows(bands.at(0), nullptr), bands.images,
        std::min((bands.rows - 1) * shape.stride + shape.kernel, shape.height));
  }

  void form(const Band& band, const FormedRows& formed) const {
    with_act(owed.act, [&](auto act) {
      form_rows(formed, band.images, [&](float* to, int64_t i, int64_t y) {
        if (y % pixel_step() != first_pixel()) {
          return;
        }
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

  // A kernel of one tap leaves out rows and pixels if it has a stride.
  int64_t pixel_step() const {
    return shape.kernel == 1 ? shape.stride : 1;
  }
  int64_t first_pixel() const { // and row
    return (pixel_step() - shape.padding % pixel_step()) % pixel_step();
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
      for (int64_t at = first_pixel() * shape.channels; at < shape.width * shape.channels;
           at += pixel_step() * shape.channels) {
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

// Whether a product's rows are one position of many images.
bool by_image(const ConvShape& shape, int64_t images) {
  return shape.out_width < kNarrow && images > shape.out_width;
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
    return formed_floats(
        rows(bands.at(0), 0, 0, nullptr), bands.images, std::min(bands.rows + more, shape.out_height));
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

// Epilogue: whole vectors.
struct StoreRows {
  float* to;
  int64_t stride;

  template <int R, int V>
  DSPNET_INLINE void operator()(int64_t row, int64_t column, const Vec (&sums)[R][V]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* at = to + (row + r) * stride + column;
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

// Pairs of matrices whose products are summed: rows of h and of e at the same output positions.
struct Pairs {
  std::vector<std::pair<const float*, const float*>> first; // of each pair
  int64_t rows, stride, other_stride;
};

// As multiply_outer_panel, summed over all pairs.
template <int V, int R, typename Epilogue>
void multiply_pairs(const Pairs& pairs, int64_t i, int64_t end, int64_t column, const Epilogue& epilogue) {
  for (; i + R <= end; i += R) {
    Vec sums[R][V];
    clear(sums);
    for (const auto& [a, b] : pairs.first) {
      const float *values = a + i, *columns = b + column;
      for (int64_t row = 0; row < pairs.rows; ++row) {
        add_product(sums, values, 1, columns);
        values += pairs.stride;
        columns += pairs.other_stride;
      }
    }
    epilogue(i, column, sums);
  }
  if constexpr (R > 1) {
    if (i < end) {
      multiply_pairs<V, R - 1>(pairs, i, end, column, epilogue);
    }
  }
}

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
  Panels in;
  std::vector<Class> classes;
  int64_t run; // k C: the taps of one kernel row
  bool vectors_of_h; // the weight gradient has whole vectors of h, otherwise of e
  Panels weight_columns; // of the weight gradient of one kernel row, which has weight_rows rows
  int64_t weight_rows;

  BackwardPass(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape),
        args(args),
        input{shape, args.x, args.owed},
        output(shape, args),
        bands(
            shape,
            args.owed,
            shape.stride * (shape.width + 2 * shape.padding) * shape.channels +
                (output.left() + shape.out_width + output.right()) * shape.out_channels),
        in(shape.channels),
        run(shape.kernel * shape.channels),
        vectors_of_h(waste(Panels(run)) <= waste(Panels(shape.out_channels))),
        weight_columns(vectors_of_h ? run : shape.out_channels),
        weight_rows(vectors_of_h ? shape.out_channels : run) {
    if (args.grad_x) {
      classes = classes_of(shape, args.weight, in);
    }
  }

  // Multiplications for nothing, as a share; a single vector loads too much for them.
  static double waste(const Panels& panels) {
    return static_cast<double>(panels.padded()) / panels.columns * (panels.vectors == 1 ? 1.2 : 1);
  }

  // The input rows of each image that a band is to give gradients for.
  int64_t input_begin(const Band& band) const {
    return band.begin == 0 ? 0 : std::min(band.begin * shape.stride, shape.height);
  }
  int64_t input_end(const Band& band) const {
    return band.end == shape.out_height ? shape.height : std::min(band.end * shape.stride, shape.height);
  }

  int64_t weight_size() const {
    return shape.kernel * weight_rows * weight_columns.padded();
  }

  // Adds a band's weight gradient to matrices [kernel rows, weight_rows, padded columns], or begins them.
  void weight_gradient(const Band& band, const FormedRows& h, const FormedRows& e, float* to, bool begins) const {
    const int64_t positions = (band.end - band.begin) * shape.out_width;
    const int64_t images = std::max<int64_t>(kOuterRows / positions, 1); // as many as stay in the L1 cache, if possible
    for (int64_t first = 0; first < band.images; first += images) {
      for (int64_t ky = 0; ky < shape.kernel; ++ky) {
        const Pairs pairs = pairs_of(band, first, std::min(first + images, band.images), ky, h, e);
        const AddToMatrix epilogue{
            to + ky * weight_rows * weight_columns.padded(), weight_columns.padded(), begins && first == 0};
        for (int64_t p = 0; p < weight_columns.count; ++p) {
          with_vectors(weight_columns.width(p), [&](auto v) {
            multiply_pairs<v, kTileRows<v>>(pairs, 0, weight_rows, weight_columns.column(p), epilogue);
          });
        }
      }
    }
  }

  // The output rows that a kernel row reaches, with what it reaches them from.
  Pairs pairs_of(
      const Band& band, int64_t first, int64_t last, int64_t ky, const FormedRows& h, const FormedRows& e) const {
    Pairs pairs{{}, shape.out_width, shape.stride * shape.channels, shape.out_channels};
    for (int64_t i = first; i < last; ++i) {
      for (int64_t y = band.begin; y < band.end; ++y) {
        const int64_t row = y * shape.stride - shape.padding + ky;
        if (row >= 0 && row < shape.height) {
          pairs.first.emplace_back(h.pixel(i, row, -shape.padding), e.pixel(i, y, 0));
          if (vectors_of_h) {
            std::swap(pairs.first.back().first, pairs.first.back().second);
          }
        }
      }
    }
    if (vectors_of_h) {
      std::swap(pairs.stride, pairs.other_stride);
    }
    return pairs;
  }

  // dh of the band's images [first, last), [image, positions of the band, in.padded()].
  void input_gradient(const Band& band, const FormedRows& e, int64_t first, int64_t last, float* grad_h) const {
    const int64_t begin = input_begin(band), end = input_end(band), width = shape.width, stride = shape.stride;
    const int64_t of_image = (end - begin) * width * in.padded();
    const bool by_images = by_image(shape, last - first);
    if (static_cast<int64_t>(classes.size()) < std::min(stride, shape.height) * std::min(stride, width)) {
      std::fill_n(grad_h, (last - first) * of_image, 0.f); // there are positions that no tap reaches
    }
    for (const Class& each : classes) {
      const int64_t depth = each.taps() * shape.out_channels, depth_step = each.columns * shape.out_channels;
      const int64_t last_kx = each.first_column + (each.columns - 1) * stride;
      const int64_t left = (each.x + shape.padding - last_kx) / stride; // the first output pixel that reaches each.x
      Products<float> products{
          by_images ? e.image_floats() : shape.out_channels, -e.row_floats(), depth_step,
          by_images ? of_image : stride * in.padded()};
      for (int64_t y = begin + ((each.y - begin) % stride + stride) % stride; y < end; y += stride) {
        // Kernel row r comes from output row bottom - r.
        const int64_t bottom = (y + shape.padding - each.first_row) / stride;
        const int64_t r = std::max<int64_t>(bottom - shape.out_height + 1, 0);
        const int64_t runs = std::min(each.rows, bottom + 1) - r;
        float* to = grad_h + ((y - begin) * width + each.x) * in.padded();
        if (by_images) {
          for (int64_t x = each.x, from = left; x < width; x += stride, ++from, to += stride * in.padded()) {
            const int64_t skip = std::max<int64_t>(-from, 0);
            const int64_t pixels = std::min(each.columns, shape.out_width - from) - skip;
            products.add(
                e.pixel(first, bottom - r, from + skip), runs, pixels * shape.out_channels,
                r * depth_step + skip * shape.out_channels, last - first, to);
          }
        } else {
          for (int64_t i = first; i < last; ++i, to += of_image) {
            products.add(
                e.pixel(i, bottom - r, left), runs, depth_step, r * depth_step, (width - each.x - 1) / stride + 1, to);
          }
        }
      }
      multiply_all(products, each.weight, depth, in, [&](const Product<float>& product) {
        return StoreRows{product.to, products.to_stride};
      });
    }
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
    const int64_t stride = weight_columns.padded(), channels = shape.channels;
    in_parallel(shape.kernel * weight_rows, stride, [&](int64_t row) {
      float* sum = scratch<BlockSums>(stride);
      std::fill_n(sum, stride, 0.f);
      for (size_t thread = 0; thread < used.size(); ++thread) {
        const float* part = weights + thread * weight_size() + row * stride;
        for (int64_t i = 0; used[thread] && i < stride; ++i) {
          sum[i] += part[i];
        }
      }
      const int64_t ky = row / weight_rows, i = row % weight_rows;
      for (int64_t j = 0; j < weight_columns.columns; ++j) {
        const int64_t o = vectors_of_h ? i : j, of_run = vectors_of_h ? j : i;
        args.grad_weight.at(o, of_run % channels, ky, of_run / channels) += sum[j];
      }
    });
  }

  void run_all() const {
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

  // dx of a band.
  template <typename Pending>
  void input_gradients(const Band& band, const FormedRows& e, float* gates, Pending& pending) const {
    const int64_t begin = input_begin(band), positions = (input_end(band) - begin) * shape.width;
    const int64_t limit = kBandBytes / 2 / std::max<int64_t>(positions * in.padded() * sizeof(float), 1);
    const int64_t images = by_image(shape, band.images) ? band.images : std::clamp<int64_t>(limit, 1, band.images);
    float* grad_h = scratch<BandInput>(images * positions * in.padded());
    for (int64_t first = 0; first < band.images; first += images) {
      const int64_t some = std::min(images, band.images - first);
      input_gradient(band, e, first, first + some, grad_h);
      const int64_t line = (band.image + first) * shape.height + begin; // of all images: the band's are consecutive
      finish(line * shape.width, some * positions, grad_h, gates, pending);
    }
  }
};

// Multiplies for y, and sums it for the moments of a view.
template <typename scalar_t>
class OutputRows {
 public:
  // moments: [views].
  OutputRows(const ConvShape& shape, const float* weight, const Panels& panels, ChannelMoments* moments)
      : shape_(shape), weight_(weight), panels_(panels), moments_(moments) {
    float* memory = scratch<BlockSums>(3 * panels.padded());
    std::fill_n(memory, panels.padded(), 0.f);
    epilogue_.sum = memory + panels.padded();
    epilogue_.square = memory + 2 * panels.padded();
    epilogue_.channels = shape.out_channels;
    pivot_ = memory;
  }

  // view: ignored where no moments are wanted.
  void multiply(const Products<scalar_t>& products, int64_t view) {
    Products<scalar_t> some = products;
    auto next = products.all.begin();
    while (next != products.all.end()) {
      const bool has_pivot = shape_.views == 0 || moments_[view].to_pivot(pivot_);
      some.all.clear();
      int64_t rows = 0;
      do {
        rows += next->rows;
        some.all.push_back(*next++);
        // Few rows for a mean that is a good pivot.
      } while (has_pivot && next != products.all.end() && rows + next->rows <= kMomentRows);
      multiply_some(some, has_pivot);
      if (shape_.views) {
        moments_[view].merge(rows, shape_.out_channels, pivot_, epilogue_.sum, epilogue_.square);
      }
    }
  }

 private:
  void multiply_some(const Products<scalar_t>& products, bool has_pivot) {
    epilogue_.pivot = shape_.views ? pivot_ : nullptr;
    epilogue_.has_pivot = has_pivot;
    epilogue_.stride = products.to_stride;
    const int64_t depth = shape_.kernel * shape_.kernel * shape_.channels;
    multiply_all(products, weight_, depth, panels_, [&](const Product<scalar_t>& product) {
      epilogue_.y = product.to;
      epilogue_.begins = product.to == products.all.front().to;
      return epilogue_;
    });
  }

  const ConvShape& shape_;
  const float* weight_;
  const Panels& panels_;
  ChannelMoments* moments_;
  StoreOutput<scalar_t> epilogue_{};
  float* pivot_;
};

// The products for y of a band.
template <typename scalar_t>
Products<scalar_t> products_of(const ConvShape& shape, const Band& band, const FormedRows& h, scalar_t* y) {
  const int64_t kernel = shape.kernel, channels = shape.channels, out_channels = shape.out_channels;
  const int64_t of_image = shape.positions() * out_channels, depth_step = kernel * channels;
  const bool by_images = by_image(shape, band.images);
  Products<scalar_t> products{
      by_images ? h.image_floats() : shape.stride * channels, h.row_floats(), depth_step,
      by_images ? of_image : out_channels};
  for (int64_t row = band.begin; row < band.end; ++row) {
    const int64_t top = row * shape.stride - shape.padding, ky = std::max<int64_t>(-top, 0);
    const int64_t runs = std::min(kernel, shape.height - top) - ky;
    scalar_t* to = y + band.image * of_image + row * shape.out_width * out_channels;
    if (by_images) {
      for (int64_t x = 0; x < shape.out_width; ++x, to += out_channels) {
        const int64_t left = x * shape.stride - shape.padding, kx = std::max<int64_t>(-left, 0);
        const int64_t pixels = std::min(kernel, shape.width - left) - kx;
        products.add(
            h.pixel(0, top + ky, left + kx), runs, pixels * channels, ky * depth_step + kx * channels, band.images, to);
      }
    } else {
      for (int64_t i = 0; i < band.images; ++i, to += of_image) {
        products.add(h.pixel(i, top + ky, -shape.padding), runs, depth_step, ky * depth_step, shape.out_width, to);
      }
    }
  }
  return products;
}

} // namespace

template <typename scalar_t>
void dense_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const Input<scalar_t> input{shape, args.x, args.owed};
  const Bands bands(shape, args.owed, shape.stride * (shape.width + 2 * shape.padding) * shape.channels);
  const Panels panels(shape.out_channels);
  const float* weight = pack_forward(shape, args.weight, panels);
  std::vector<ChannelMoments> moments(at::get_num_threads() * shape.views); // [thread, view]
  at::parallel_for(0, bands.count(), 1, [&](int64_t b, int64_t last) {
    float* formed = scratch<FormedInput>(input.floats(bands));
    OutputRows<scalar_t> output(shape, weight, panels, moments.data() + at::get_thread_num() * shape.views);
    for (; b < last; ++b) {
      const Band band = bands.at(b);
      const FormedRows h = input.rows(band, formed);
      input.form(band, h);
      output.multiply(products_of(shape, band, h, args.y), shape.views > 1 ? band.segment : 0);
    }
  });
  write_moments(moments, shape.views, shape.out_channels, args.mean, args.variance);
}

template <typename scalar_t>
void dense_backward(const ConvShape& shape, const Backward<scalar_t>& args) {
  BackwardPass<scalar_t>(shape, args).run_all();
}

template void dense_forward(const ConvShape&, const Forward<float>&);
template void dense_forward(const ConvShape&, const Forward<at::BFloat16>&);
template void dense_backward(const ConvShape&, const Backward<float>&);
template void dense_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace CPU_CAPABILITY
} // namespace dspnet
