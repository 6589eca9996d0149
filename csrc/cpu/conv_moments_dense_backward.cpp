// conv_moments, dense, backward, band by band (dense.h).
//
// e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt, the gradient of y, is computed into scratch like h. For every
// kernel row, dW is the sum of h^T e. dh is the convolution of e with the taps that reach an input position. These taps
// depend on the position modulo the stride, its phase, so each phase has a separate packed weight. dh then gives dx and
// the sums for dscale, dshift and dgate.
#include "dense_gradient.h"
#include "dense_weight_gradient.h"
#include "thread_sums.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace dense {
namespace {

struct PartialGate;
struct FormedOutput;
struct PairedOutput;
struct BandInput;
struct AllInput;
struct AllOutput;
struct AllPairs;

// The input positions (y, x), (y + stride, x), (y, x + stride), ..., and the taps that reach them.
struct Phase {
  int64_t y, x; // less than the stride
  int64_t first_row, first_column, rows, columns; // taps: ky = first_row, first_row + stride, ... and kx likewise
  float* weight; // packed, depth [ky, kx from the last to the first, output channel]; columns are input channels

  int64_t taps() const {
    return rows * columns;
  }
};

// The phases that at least one tap reaches.
template <typename Arithmetic>
std::vector<Phase> phases_of(const ConvShape& shape, const Prefix& weight, const Panels& panels) {
  const int64_t stride = shape.stride, lanes = Arithmetic::lanes(shape.out_channels);
  float* to = scratch<PackedWeight>(panels.padded() * shape.kernel * shape.kernel * lanes);
  std::vector<Phase> phases;
  for (int64_t y = 0; y < std::min(stride, shape.height); ++y) {
    for (int64_t x = 0; x < std::min(stride, shape.width); ++x) {
      const int64_t row = (y + shape.padding) % stride, column = (x + shape.padding) % stride;
      if (std::max(row, column) < shape.kernel) {
        const int64_t rows = (shape.kernel - row - 1) / stride + 1, columns = (shape.kernel - column - 1) / stride + 1;
        phases.push_back({y, x, row, column, rows, columns, to});
        to += panels.padded() * rows * columns * lanes;
      }
    }
  }
  std::vector<Place> places;
  for (const Phase& phase : phases) {
    for (int64_t tap = 0; tap < phase.taps(); ++tap) {
      const int64_t ky = phase.first_row + tap / phase.columns * stride;
      const int64_t kx = phase.first_column + (phase.columns - 1 - tap % phase.columns) * stride;
      places.push_back({ky, kx, phase.weight, phase.taps() * lanes, tap * lanes});
    }
  }
  WeightPacking<Arithmetic>{weight, shape.kernel, true, shape.out_channels, panels}.pack(places);
  return phases;
}

// Epilogue: stores whole vectors.
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

// Computes dx from dh for positions of one image, and adds the sums of dz, dz x and dh act(z), [C] each, to grad_shift,
// grad_scale and grad_gate.
template <Act act, bool gated, typename P, typename Arithmetic, typename scalar_t>
void finish_panel(
    const P& panel,
    const Input<Arithmetic, scalar_t>& input,
    int64_t n,
    const float* grad_h,
    int64_t stride,
    const scalar_t* x,
    scalar_t* grad_x,
    int64_t positions,
    float* grad_shift,
    float* grad_scale,
    float* grad_gate) {
  const int64_t channels = input.shape.channels;
  Vec scale[P::vectors], shift[P::vectors], gate[P::vectors];
  Vec shift_sum[P::vectors], scale_sum[P::vectors], gate_sum[P::vectors];
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    scale[v] = panel.get_or(input.deferred.scale_of(n, input.shape.images, channels), v, 1);
    shift[v] = panel.get_or(input.deferred.shift_of(n, input.shape.images, channels), v, 0);
    gate[v] = panel.get_or(input.deferred.gate_of(n, channels), v, 1);
    shift_sum[v] = scale_sum[v] = gate_sum[v] = Vec(0);
  }
  for (int64_t i = 0; i < positions; ++i, grad_h += stride, x += channels, grad_x += channels) {
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; ++v) {
      const Vec value = panel.read(x, v), z = at::vec::fmadd(value, scale[v], shift[v]);
      Vec dz = panel.get(grad_h, v);
      if constexpr (gated) {
        gate_sum[v] = at::vec::fmadd(dz, activate<act>(z), gate_sum[v]);
        dz = dz * gate[v];
      }
      dz = dz * activation_gradient<act>(z);
      shift_sum[v] = shift_sum[v] + dz;
      scale_sum[v] = at::vec::fmadd(dz, value, scale_sum[v]);
      panel.write(grad_x, v, dz * scale[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::vectors; ++v) {
    panel.add(grad_shift, v, shift_sum[v]);
    panel.add(grad_scale, v, scale_sum[v]);
    if constexpr (gated) {
      panel.add(grad_gate, v, gate_sum[v]);
    }
  }
}

template <typename Arithmetic, typename scalar_t>
struct BackwardPass {
  static constexpr bool kPaired = Arithmetic::kRows > 1;

  const ConvShape& shape;
  const Backward<scalar_t>& args;
  Input<Arithmetic, scalar_t> input;
  OutputGradient<Arithmetic, scalar_t> output;
  Bands bands;
  Panels in;
  std::vector<Phase> phases;
  WeightGradient<Arithmetic> weight;

  BackwardPass(const ConvShape& shape, const Backward<scalar_t>& args)
      : shape(shape),
        args(args),
        input{shape, args.x, args.deferred},
        output(shape, args),
        bands(
            shape,
            args.deferred,
            shape.stride * (shape.width + 2 * shape.padding) * shape.channels +
                (output.left() + shape.out_width + output.right()) * shape.out_channels),
        in(shape.channels),
        weight(shape, args.grad_weight) {
    if (args.grad_x) {
      phases = phases_of<Arithmetic>(shape, args.weight, in);
    }
  }

  // The input rows of each image whose gradients a band computes.
  int64_t input_begin(const Band& band) const {
    return band.begin == 0 ? 0 : std::min(band.begin * shape.stride, shape.height);
  }
  int64_t input_end(const Band& band) const {
    return band.end == shape.out_height ? shape.height : std::min(band.end * shape.stride, shape.height);
  }

  // Computes dh of the band's images [first, last): [image, positions of the band, in.padded()].
  void input_gradient(const Band& band, const FormedRows& e, int64_t first, int64_t last, float* grad_h) const {
    const int64_t begin = input_begin(band), end = input_end(band), width = shape.width, stride = shape.stride;
    const int64_t image_stride = (end - begin) * width * in.padded();
    const bool by_images = by_image(shape, last - first);
    if (static_cast<int64_t>(phases.size()) < std::min(stride, shape.height) * std::min(stride, width)) {
      std::fill_n(grad_h, (last - first) * image_stride, 0.f); // some positions are reached by no tap
    }
    for (const Phase& phase : phases) {
      const int64_t depth = phase.taps() * e.lanes, depth_step = phase.columns * e.lanes;
      const int64_t last_kx = phase.first_column + (phase.columns - 1) * stride;
      const int64_t left = (phase.x + shape.padding - last_kx) / stride; // the first output pixel that reaches phase.x
      Products<float> products{
          by_images ? e.image_floats() : e.lanes, -e.row_floats(), depth_step,
          by_images ? image_stride : stride * in.padded()};
      for (int64_t y = begin + ((phase.y - begin) % stride + stride) % stride; y < end; y += stride) {
        // Kernel row r reads output row bottom - r.
        const int64_t bottom = (y + shape.padding - phase.first_row) / stride;
        const int64_t r = std::max<int64_t>(bottom - shape.out_height + 1, 0);
        const int64_t runs = std::min(phase.rows, bottom + 1) - r;
        float* to = grad_h + ((y - begin) * width + phase.x) * in.padded();
        if (by_images) {
          for (int64_t x = phase.x, from = left; x < width; x += stride, ++from, to += stride * in.padded()) {
            const int64_t skip = std::max<int64_t>(-from, 0);
            const int64_t pixels = std::min(phase.columns, shape.out_width - from) - skip;
            products.add(
                e.pixel(first, bottom - r, from + skip), runs, pixels * e.lanes, r * depth_step + skip * e.lanes,
                last - first, to);
          }
        } else {
          for (int64_t i = first; i < last; ++i, to += image_stride) {
            products.add(
                e.pixel(i, bottom - r, left), runs, depth_step, r * depth_step, (width - phase.x - 1) / stride + 1, to);
          }
        }
      }
      multiply_all<Arithmetic>(products, phase.weight, depth, in, [&](const Product<float>& product) {
        return StoreRows{product.to, products.to_stride};
      });
    }
  }

  // Computes dx for `count` positions from `first` on, counted over all images.
  template <typename Buffered>
  void finish(int64_t first, int64_t count, const float* grad_h, float* gate_sums, Buffered& buffered) const {
    const int64_t per_image = shape.height * shape.width, channels = shape.channels, stride = in.padded();
    for (int64_t at = first; at < first + count;) {
      const int64_t n = at / per_image, positions = std::min((n + 1) * per_image, first + count) - at;
      const float* from = grad_h + (at - first) * stride;
      const scalar_t* x = args.x + at * channels;
      scalar_t* to = args.grad_x + at * channels;
      if (!input.is_deferred()) {
        for (int64_t i = 0; i < positions; ++i) {
          for_panels(channels, [&]<typename P>(const P& panel) {
            for (int v = 0; v < P::vectors; ++v) {
              panel.put(to + i * channels, v, panel.get(from + i * stride, v));
            }
          });
        }
      } else {
        const auto& [grad_shift, grad_scale] = buffered.reserve(positions, args.deferred.row(n, shape.images));
        float* grad_gate = gate_sums ? gate_sums + (bands.per_image > 1 ? 0 : n * channels) : nullptr;
        with_act(args.deferred.act, [&](auto act) {
          for_panels(channels, [&](auto panel) {
            panel.ahead = kRowsAhead * shape.width * channels;
            if (grad_gate) {
              finish_panel<act, true>(
                  panel, input, n, from, stride, x, to, positions, grad_shift, grad_scale, grad_gate);
            } else {
              finish_panel<act, false>(
                  panel, input, n, from, stride, x, to, positions, grad_shift, grad_scale, grad_gate);
            }
          });
        });
      }
      at += positions;
    }
  }

  void run_all() const {
    const int64_t threads = at::get_num_threads(), channels = shape.channels;
    const Band all{0, 0, shape.images, 0, shape.out_height};
    FormedRows all_h = input.rows(all, channels, nullptr), all_e = output.rows(all, 0, shape.height, nullptr);
    FormedRows all_pairs = output.paired_rows(all, nullptr);
    const bool by_outputs = bands.per_image == 1 &&
        weight.by_outputs(shape.images * (all_h.image_floats() + all_e.image_floats()));
    if (by_outputs) {
      all_h.data = scratch<AllInput>(formed_floats(all_h, shape.images, shape.height));
      all_e.data = scratch<AllOutput>(formed_floats(all_e, shape.images, shape.out_height));
      all_pairs.data = kPaired ? scratch<AllPairs>(formed_floats(all_pairs, shape.images, shape.out_height)) : nullptr;
    }
    float* matrices = args.grad_weight.data && !by_outputs ? scratch<PartialWeight>(threads * weight.size()) : nullptr;
    std::vector<char> used(threads, 0);
    ThreadSums shift_sums(args.deferred.rows, channels), scale_sums(args.deferred.rows, channels);
    // If an image consists of several bands, each band has sums for the gate, which are added up at the end.
    const bool gated = args.grad_x && args.deferred.gate, has_gate_parts = gated && bands.per_image > 1;
    float* gate_parts = has_gate_parts ? scratch<PartialGate>(bands.count() * channels) : nullptr;

    at::parallel_for(0, bands.count(), 1, [&](int64_t b, int64_t last) {
      const int64_t thread = at::get_thread_num();
      float* formed_h = scratch<FormedInput>(input.floats(bands, channels));
      float* formed_e = scratch<FormedOutput>(output.floats(bands));
      float* paired_e = kPaired ? scratch<PairedOutput>(output.paired_floats(bands)) : nullptr;
      auto buffered = buffered_sums<2>(channels, int64_t{0}, [&](int64_t row, const auto& sums) {
        shift_sums.add(row, sums[0]);
        scale_sums.add(row, sums[1]);
      });
      for (; b < last; ++b) {
        const Band band = bands.at(b);
        if (by_outputs) {
          formed_h = all_h.image(band.image);
          formed_e = all_e.image(band.image);
          paired_e = all_pairs.image(band.image);
        }
        const FormedRows e = output.rows(band, input_begin(band), input_end(band), formed_e);
        output.form(band, e);
        if (args.grad_weight.data) {
          const FormedRows h = input.rows(band, channels, formed_h);
          input.form_outer(band, h);
          const FormedRows outer_e = output.form_outer(band, e, paired_e);
          if (!by_outputs) {
            weight.add(band, h, outer_e, matrices + thread * weight.size(), !used[thread]);
            used[thread] = 1;
          }
        }
        if (args.grad_x) {
          float* gate_sums = has_gate_parts ? gate_parts + b * channels : args.grad_gate;
          if (gated) {
            std::fill_n(has_gate_parts ? gate_sums : gate_sums + band.image * channels, band.images * channels, 0.f);
          }
          input_gradients(band, e, gate_sums, buffered);
        }
      }
      buffered.flush();
    });

    if (by_outputs) {
      weight.add_by_outputs(all, all_h, kPaired ? all_pairs : all_e);
    } else if (matrices) {
      weight.merge(matrices, used);
    }
    if (args.grad_x) {
      shift_sums.write(args.grad_shift);
      scale_sums.write(args.grad_scale);
    }
    if (has_gate_parts) {
      std::fill_n(args.grad_gate, shape.images * channels, 0.f);
      for (int64_t i = 0; i < bands.count() * channels; ++i) {
        args.grad_gate[i / channels / bands.per_image * channels + i % channels] += gate_parts[i];
      }
    }
  }

  // Computes dx of a band.
  template <typename Buffered>
  void input_gradients(const Band& band, const FormedRows& e, float* gate_sums, Buffered& buffered) const {
    const int64_t begin = input_begin(band), positions = (input_end(band) - begin) * shape.width;
    const int64_t limit = kBandBytes / 2 / std::max<int64_t>(positions * in.padded() * sizeof(float), 1);
    const int64_t images = by_image(shape, band.images) ? band.images : std::clamp<int64_t>(limit, 1, band.images);
    float* grad_h = scratch<BandInput>(images * positions * in.padded());
    for (int64_t first = 0; first < band.images; first += images) {
      const int64_t count = std::min(images, band.images - first);
      input_gradient(band, e, first, first + count, grad_h);
      const int64_t line = (band.image + first) * shape.height + begin; // a row, counted over all images
      finish(line * shape.width, count * positions, grad_h, gate_sums, buffered);
    }
  }
};

} // namespace
} // namespace dense

template <typename scalar_t>
void dense_backward(const ConvShape& shape, const Backward<scalar_t>& args) {
  dense::with_arithmetic_of<scalar_t>(shape, [&]<typename Arithmetic>(Arithmetic) {
    dense::BackwardPass<Arithmetic, scalar_t>(shape, args).run_all();
  });
}

template void dense_backward(const ConvShape&, const Backward<float>&);
template void dense_backward(const ConvShape&, const Backward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
