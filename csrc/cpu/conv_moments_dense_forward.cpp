// conv_moments, dense, forward: k x k kernels of any stride and padding, as matrix products over bands of h (dense.h).
//
// The epilogue stores y and sums it for the moments. Per position of y: 2 k k C O flops, C stride^2 + O values read or
// written.
#include "conv_output.h"
#include "dense.h"
#include "moments.h"

namespace dspnet::inline CPU_CAPABILITY {
namespace dense {
namespace {

constexpr int64_t kMomentRows = 192; // rows summed in fp32

// Packs the weight: depth [ky, kx, channel], columns are output channels.
template <typename Arithmetic>
const float* pack_forward(const ConvShape& shape, const Prefix& weight, const Panels& panels) {
  const int64_t kernel = shape.kernel, lanes = Arithmetic::lanes(shape.channels), depth = kernel * kernel * lanes;
  float* to = scratch<PackedWeight>(panels.padded() * depth);
  std::vector<Place> places;
  for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
    places.push_back({tap / kernel, tap % kernel, to, depth, tap * lanes});
  }
  WeightPacking<Arithmetic>{weight, kernel, false, shape.channels, panels}.pack(places);
  return to;
}

// Computes products of y and sums them for the moments of a view.
template <typename Arithmetic, typename scalar_t>
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
    epilogue_.ahead = kMomentRows * shape.out_channels;
    pivot_ = memory;
  }

  // view: ignored without moments.
  void multiply(const Products<scalar_t>& products, int64_t view) {
    Products<scalar_t> chunk = products;
    auto next = products.all.begin();
    while (next != products.all.end()) {
      const bool has_pivot = shape_.views == 0 || moments_[view].to_pivot(pivot_);
      chunk.all.clear();
      int64_t rows = 0;
      do {
        rows += next->rows;
        chunk.all.push_back(*next++);
        // Without a pivot, a single product: the mean of few rows is a sufficient pivot for the rest.
      } while (has_pivot && next != products.all.end() && rows + next->rows <= kMomentRows);
      multiply_some(chunk, has_pivot);
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
    const int64_t depth = shape_.kernel * shape_.kernel * Arithmetic::lanes(shape_.channels);
    multiply_all<Arithmetic>(products, weight_, depth, panels_, [&](const Product<scalar_t>& product) {
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

// The products for the y of a band.
template <typename scalar_t>
Products<scalar_t> products_of(const ConvShape& shape, const Band& band, const FormedRows& h, scalar_t* y) {
  const int64_t kernel = shape.kernel, lanes = h.lanes, out_channels = shape.out_channels;
  const int64_t image_stride = shape.positions() * out_channels, depth_step = kernel * lanes;
  const bool by_images = by_image(shape, band.images);
  Products<scalar_t> products{
      by_images ? h.image_floats() : shape.stride * lanes, h.row_floats(), depth_step,
      by_images ? image_stride : out_channels};
  for (int64_t row = band.begin; row < band.end; ++row) {
    const int64_t top = row * shape.stride - shape.padding, ky = std::max<int64_t>(-top, 0);
    const int64_t runs = std::min(kernel, shape.height - top) - ky;
    scalar_t* to = y + band.image * image_stride + row * shape.out_width * out_channels;
    if (by_images) {
      for (int64_t x = 0; x < shape.out_width; ++x, to += out_channels) {
        const int64_t left = x * shape.stride - shape.padding, kx = std::max<int64_t>(-left, 0);
        const int64_t pixels = std::min(kernel, shape.width - left) - kx;
        products.add(
            h.pixel(0, top + ky, left + kx), runs, pixels * lanes, ky * depth_step + kx * lanes, band.images, to);
      }
    } else {
      for (int64_t i = 0; i < band.images; ++i, to += image_stride) {
        products.add(h.pixel(i, top + ky, -shape.padding), runs, depth_step, ky * depth_step, shape.out_width, to);
      }
    }
  }
  return products;
}

template <typename Arithmetic, typename scalar_t>
void forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  const Input<Arithmetic, scalar_t> input{shape, args.x, args.deferred};
  const int64_t lanes = Arithmetic::lanes(shape.channels);
  const Bands bands(shape, args.deferred, shape.stride * (shape.width + 2 * shape.padding) * lanes);
  const Panels panels(shape.out_channels);
  const float* weight = pack_forward<Arithmetic>(shape, args.weight, panels);
  std::vector<ChannelMoments> moments(at::get_num_threads() * shape.views); // [thread, view]
  at::parallel_for(0, bands.count(), 1, [&](int64_t b, int64_t last) {
    float* formed = scratch<FormedInput>(input.floats(bands, lanes));
    OutputRows<Arithmetic, scalar_t> output(shape, weight, panels, moments.data() + at::get_thread_num() * shape.views);
    for (; b < last; ++b) {
      const Band band = bands.at(b);
      const FormedRows h = input.rows(band, lanes, formed);
      input.form(band, h);
      output.multiply(products_of(shape, band, h, args.y), shape.views > 1 ? band.segment : 0);
    }
  });
  write_moments(moments, shape.views, shape.out_channels, args.mean, args.variance);
}

} // namespace
} // namespace dense

template <typename scalar_t>
void dense_forward(const ConvShape& shape, const Forward<scalar_t>& args) {
  dense::with_arithmetic_of<scalar_t>(
      shape, [&]<typename Arithmetic>(Arithmetic) { dense::forward<Arithmetic>(shape, args); });
}

template void dense_forward(const ConvShape&, const Forward<float>&);
template void dense_forward(const ConvShape&, const Forward<at::BFloat16>&);

} // namespace dspnet::CPU_CAPABILITY
