// The stem of many networks: an ordinary convolution of a few channels, ReLU, and max pooling (3x3, stride 2, padding
// 1). The outputs of the convolution, four times as many as those of the pooling, are not written to memory.

#pragma once

#include "forward.h"

namespace dgc {

// As torch.maximum: NaN, if either is.
template <typename T>
inline T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// A row of pooled outputs from three rows of `width` values, with ReLU. `line` is room for width + 3 values.
template <typename S, typename T>
inline void pool_row(const T* const (&rows)[3], int64_t width, T* __restrict__ line, S* __restrict__ to) {
  // Zeros for the padding, and in each maximum below for the ReLU.
  line[0] = line[width + 1] = line[width + 2] = T(0);
  const T* __restrict__ a = rows[0], * __restrict__ b = rows[1], * __restrict__ c = rows[2];
  for (int64_t q = 0; q < width; ++q) line[1 + q] = maximum(maximum(a[q], b[q]), maximum(c[q], T(0)));
  for (int64_t q = 0; q < (width + 1) / 2; ++q) {
    to[q] = S(maximum(maximum(line[2 * q], line[2 * q + 1]), line[2 * q + 2]));
  }
}

template <typename S, typename T>
struct Stem {
  static constexpr int64_t kSize = Vector<T>::size;
  const ConvDesc& n;
  const PackedLayer<T>& layer;
  const ForwardArgs<S, T>& args;
  const int64_t pooled_rows, pooled_columns, rows, tiles;  // `rows` of pooled outputs at a time
  const InputPacking packing;

  struct Workspace {
    std::vector<int64_t> channels;
    std::vector<T> pixels, line;
    std::unique_ptr<T[]> sums;  // [16, pitch], not initialized
    int64_t pitch;
  };
  // Pooled rows [row, last) of sample b, and the rows of the convolution that they see: [top, top + height).
  struct Tile {
    int64_t b, row, last, top, height;
  };

  Stem(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args)
      : n(n),
        layer(layer),
        args(args),
        pooled_rows((n.y.out + 1) / 2),
        pooled_columns((n.x.out + 1) / 2),
        rows(fitting_rows(n, pooled_rows)),
        tiles((pooled_rows + rows - 1) / rows),
        packing(n, std::min(2 * rows + 1, n.y.out)) {}

  static int64_t fitting_rows(const ConvDesc& n, int64_t pooled_rows) {
    const InputPacking one(n, 1);
    const int64_t line = (n.channels * int64_t(one.phases.size()) + kFilterBlock) * one.pitch * int64_t(sizeof(T));
    return balanced_rows(pooled_rows, (2 * kL2Bytes / line - n.y.max_shift()) / 2, n.batch, at::get_num_threads());
  }

  void run() const {
    at::parallel_for(0, n.batch * tiles, 1, [&](int64_t begin, int64_t end) {
      Workspace work;
      work.pitch = vectors_for<T>(packing.line(n, packing.rows)) * kSize;
      work.sums.reset(new T[kFilterBlock * work.pitch]);
      work.line.resize(n.x.out + 3);
      work.channels.resize(n.channels);
      std::iota(work.channels.begin(), work.channels.end(), 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % tiles * rows, last = std::min(row + rows, pooled_rows);
        const int64_t top = std::max<int64_t>(2 * row - 1, 0);
        const Tile tile{i / tiles, row, last, top, std::min(2 * last, n.y.out) - top};
        work.pixels.assign(n.channels * packing.plane + 4 * kSize, T(0));
        for (int64_t c = 0; c < n.channels; ++c) {
          const S* from = args.x + tile.b * args.x_stride + c * n.area();
          packing.pack(n, tile.top, tile.height, from, work.pixels.data() + c * packing.plane, [](T v) { return v; });
        }
        for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
          const int64_t width = std::min(kFilterBlock, n.filters - f);
          convolve_block(tile, f, width, work);
          for (int64_t j = 0; j < width; ++j) pool_output(tile, f + j, work.sums.get() + j * work.pitch, work);
        }
      }
    });
  }

  void convolve_block(const Tile& tile, int64_t f, int64_t width, Workspace& work) const {
    const T* filters = filter_block(n, layer.weight, 0, f);
    T bias[kFilterBlock] = {};
    if (layer.bias != nullptr) std::copy_n(layer.bias + f, width, bias);
    for_vector_tiles(vectors_for<T>(packing.line(n, tile.height)), [&](int64_t at, auto vectors) {
      for_row_tiles(width, [&](int64_t r, auto size) {
        micro_kernel<T, decltype(size)::value, decltype(vectors)::value>(
            work.pixels.data() + at * kSize, packing.plane, packing.offsets, work.channels.data(), n.channels,
            filters + r, width, true, false, bias + r, work.sums.get() + r * work.pitch + at * kSize, work.pitch);
      });
    });
  }

  void pool_output(const Tile& tile, int64_t filter, const T* sums, Workspace& work) const {
    S* to = args.y + tile.b * args.y_stride + (filter * pooled_rows + tile.row) * pooled_columns;
    for (int64_t r = tile.row; r < tile.last; ++r, to += pooled_columns) {
      const T* window[3];
      for (int64_t k = 0; k < 3; ++k) {  // rows of the padding are replaced by their neighbors
        const int64_t at = std::min(std::max<int64_t>(2 * r - 1 + k, 0), n.y.out - 1);
        window[k] = sums + (at - tile.top) * packing.pitch;
      }
      pool_row(window, n.x.out, work.line.data(), to);
    }
  }
};

// y [batch, filters, (y.out + 1) / 2, (x.out + 1) / 2] from x [batch, channels, y.size, x.size], with one head.
template <typename S, typename T>
void stem(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args) {
  if (n.batch == 0) return;
  Stem<S, T>(n, layer, args).run();
}

}  // namespace dgc
