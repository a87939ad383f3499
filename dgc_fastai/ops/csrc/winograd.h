// The convolution for filters three taps high, in half the multiplications: Winograd's minimal filtering of columns
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016).
//
// A tile of four outputs, one below the other, reads six pixels. The input transform takes the six pixels of a kept
// channel, scaled by its gate, to six points; the weight transform did the same to the filters when they were packed.
// Each point is a convolution by filters one tap high, and the output transform takes the results at the six points to
// four outputs: 6 products for a column of the filter where the direct way needs 4 x 3. Rows need no transform, so that
// pixels stay where they are, and the packed weight is twice as large rather than four times.
//
// NaN or Inf in one of the six pixels reaches all four outputs. In a layer it has spoilt the gates of the sample
// before.

#pragma once

#include "forward.h"

namespace dgc {

// F(4, 3) at the points 0, +-a, +-b and infinity. Squares and products of a and b are exact, and rounding errors half
// as large as at the usual points 1 and 2.
template <typename T>
struct Winograd {
  static constexpr int kOutputs = 4, kPoints = 6;
  static constexpr T a = 0.625, b = 1.5, aa = a * a, bb = b * b;

  // V is T or a vector.
  template <typename V>
  static void input_transform(const V (&d)[kPoints], V (&to)[kPoints]) {
    const V even_a = d[4] - d[2] * bb, odd_a = (d[3] - d[1] * bb) * a;
    const V even_b = d[4] - d[2] * aa, odd_b = (d[3] - d[1] * aa) * b;
    to[0] = d[0] * (aa * bb) - d[2] * (aa + bb) + d[4];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = d[1] * (aa * bb) - d[3] * (aa + bb) + d[5];
  }
  template <typename V>
  static void output_transform(const V (&m)[kPoints], V (&to)[kOutputs]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = m[0] + even_a + even_b;
    to[1] = odd_a * a + odd_b * b;
    to[2] = even_a * aa + even_b * bb;
    to[3] = odd_a * (a * aa) + odd_b * (b * bb) + m[5];
  }
  static void weight_transform(T top, T middle, T bottom, T (&to)[kPoints]) {
    const T at_a = 2 * aa * (aa - bb), at_b = 2 * bb * (bb - aa);
    to[0] = top / (aa * bb);
    to[1] = (top + a * middle + aa * bottom) / at_a;
    to[2] = (top - a * middle + aa * bottom) / at_a;
    to[3] = (top + b * middle + bb * bottom) / at_b;
    to[4] = (top - b * middle + bb * bottom) / at_b;
    to[5] = bottom;
  }
};

// The convolution at one point. A row of its outputs is a row of tiles.
template <typename T>
ConvDesc point_desc(ConvDesc n) {
  const int64_t rows = (n.y.out + Winograd<T>::kOutputs - 1) / Winograd<T>::kOutputs;
  n.y = {rows, rows, 1, 1, 0, 1};
  return n;
}

// Calls f(q, count) for vectors that cover [0, size) of a row; the last one overlaps the one before, so as to be whole.
// In a row shorter than a vector, only `count` of its values are of the row.
template <typename T, typename F>
inline void for_row_vectors(int64_t size, F f) {
  constexpr int64_t kSize = Vector<T>::size;
  for (int64_t q = 0; q + kSize < size; q += kSize) f(q, kSize);
  f(std::max<int64_t>(size - kSize, 0), std::min(size, kSize));
}

template <typename T>
inline void store_first(T* to, typename Vector<T>::type v, int64_t count) {
  if (count == Vector<T>::size) return store(to, v);
  for (int64_t k = 0; k < count; ++k) to[k] = v[k];
}

// Transforms the pixels that `count` rows of tiles, from `row` on, read of channel x; point p goes to `to + p * plane`,
// in lines as `packing` has them. Nothing from `end` on may be read.
template <typename S, typename T, typename Transform>
void input_transform(
    const ConvDesc& n, const InputPacking& packing, int64_t row, int64_t count, const S* x, const S* end, T* to,
    int64_t plane, Transform transform) {
  using V = typename Vector<T>::type;
  constexpr int kPoints = Winograd<T>::kPoints;
  const int64_t left = n.x.first(0), skipped = n.x.pixel(left, 0), width = std::min(n.x.last(0), packing.pitch) - left;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t top = (row + r) * Winograd<T>::kOutputs - n.y.padding;
    T* out = to + r * packing.pitch + left;
    for_row_vectors<T>(width, [&](int64_t q, int64_t some) {
      V d[kPoints], found[kPoints];
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) {
        d[i] = V{};
        if (top + i < 0 || top + i >= n.y.size) continue;
        const S* from = x + (top + i) * n.x.size + skipped + q;
        if constexpr (std::is_same<S, T>::value) {
          if (from + Vector<T>::size <= end) {
            d[i] = transform(load(from));
            continue;
          }
        }
        for (int64_t k = 0; k < some; ++k) d[i][k] = T(from[k]);
        d[i] = transform(d[i]);
      }
      Winograd<T>::input_transform(d, found);
#pragma GCC unroll 6
      for (int p = 0; p < kPoints; ++p) store_first(out + p * plane + q, found[p], some);
    });
  }
}

// `count` rows of tiles of one filter's outputs, from `row` on, from the sums at each point, which are `plane` values
// apart.
template <typename S, typename T>
void output_transform(
    const ConvDesc& n, const InputPacking& packing, int64_t row, int64_t count, const T* from, int64_t plane, T bias,
    bool apply_relu, S* y) {
  using V = typename Vector<T>::type;
  constexpr int kOutputs = Winograd<T>::kOutputs, kPoints = Winograd<T>::kPoints;
  for (int64_t r = 0; r < count; ++r, from += packing.pitch) {
    const int64_t top = (row + r) * kOutputs, rows = std::min<int64_t>(n.y.out - top, kOutputs);
    for_row_vectors<T>(n.x.out, [&](int64_t q, int64_t some) {
      V m[kPoints], found[kOutputs];
#pragma GCC unroll 6
      for (int p = 0; p < kPoints; ++p) m[p] = load(from + p * plane + q);
      Winograd<T>::output_transform(m, found);
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
        if (i >= rows) continue;
        V result = found[i] + bias;
        if (apply_relu) result = relu(result);
        S* to = y + (top + i) * n.x.out + q;
        if constexpr (std::is_same<S, T>::value) {
          store_first(to, result, some);
        } else {
          for (int64_t k = 0; k < some; ++k) to[k] = S(result[k]);
        }
      }
    });
  }
}

template <typename S, typename T>
struct WinogradConv {
  static constexpr int64_t kSize = Vector<T>::size, kPoints = Winograd<T>::kPoints;
  static constexpr T kNoBias[kFilterBlock] = {};
  const ConvDesc& n;
  const PackedLayer<T>& layer;
  const ForwardArgs<S, T>& args;
  const GatedHeads<T> heads;
  const ConvDesc point;
  const int64_t max_kept, rows, tiles;
  const InputPacking packing;  // of the convolution at a point
  const S* const end_of_x;

  struct Workspace {
    std::vector<int64_t> kept;
    std::vector<T> pixels;      // [points, kept, plane of the packing]
    std::unique_ptr<T[]> sums;  // [points, 16, pitch], not initialized
    int64_t plane, pitch;       // values of the pixels at a point, and of the sums of a filter
  };
  // Rows of tiles [row, row + height) of one head and sample.
  struct Tile {
    int64_t b, h, row, height;
  };

  WinogradConv(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args)
      : n(n),
        layer(layer),
        args(args),
        heads{n, args.gates},
        point(point_desc<T>(n)),
        max_kept(heads.max_kept()),
        rows(
            InputPacking::fitting_rows(
                point, 2 * kL2Bytes, max_kept * kPoints, sizeof(T), n.batch * n.heads, at::get_num_threads())),
        tiles((point.y.out + rows - 1) / rows),
        packing(point, rows),
        end_of_x(args.x + (n.batch - 1) * args.x_stride + n.channels * n.area()) {}

  void run() const {
    at::parallel_for(0, n.batch * n.heads * tiles, 1, [&](int64_t begin, int64_t end) {
      Workspace work;
      work.plane = max_kept * packing.plane + 4 * kSize;
      work.pitch = vectors_for<T>(packing.line(point, rows)) * kSize;
      work.pixels.resize(kPoints * work.plane);
      work.sums.reset(new T[kPoints * kFilterBlock * work.pitch]);
      int64_t unit_before = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / tiles, row = i % tiles * rows;
        const Tile tile{unit / n.heads, unit % n.heads, row, std::min(rows, point.y.out - row)};
        if (unit != unit_before) heads.list_kept(tile.b, tile.h, 0, n.channels, work.kept);
        unit_before = unit;
        transform_input(tile, work);
        for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
          const int64_t width = std::min(kFilterBlock, n.filters - f);
          for (int64_t p = 0; p < kPoints; ++p) convolve_point(tile, f, width, p, work);
          for (int64_t j = 0; j < width; ++j) store_output(tile, f + j, work.sums.get() + j * work.pitch, work.pitch);
        }
      }
    });
  }

  void transform_input(const Tile& tile, Workspace& work) const {
    for (size_t s = 0; s < work.kept.size(); ++s) {
      const int64_t c = work.kept[s];
      const S* from = args.x + tile.b * args.x_stride + c * n.area();
      T* to = work.pixels.data() + int64_t(s) * packing.plane;
      with_input_transform(layer, c, heads.gate(tile.b, tile.h, c), [&](auto transform) {
        input_transform(n, packing, tile.row, tile.height, from, end_of_x, to, work.plane, transform);
      });
    }
  }

  // The sums at point p of the block of filters that begins with f.
  void convolve_point(const Tile& tile, int64_t f, int64_t width, int64_t p, Workspace& work) const {
    const int64_t count = work.kept.size(), channels = channels_in_l1<T>(point.taps(), width, 1);
    const T* filters = filter_block(point, layer.winograd_weight, tile.h * kPoints + p, f);
    for (int64_t s = 0; s == 0 || s < count; s += channels) {
      const int64_t some = std::min(channels, count - s);
      for_vector_tiles(vectors_for<T>(packing.line(point, tile.height)), [&](int64_t at, auto vectors) {
        for_row_tiles(width, [&](int64_t r, auto size) {
          micro_kernel<T, decltype(size)::value, decltype(vectors)::value>(
              work.pixels.data() + p * work.plane + s * packing.plane + at * kSize, packing.plane, packing.offsets,
              work.kept.data() + s, some, filters + r, width, s == 0, false, kNoBias,
              work.sums.get() + (p * kFilterBlock + r) * work.pitch + at * kSize, work.pitch);
        });
      });
    }
  }

  void store_output(const Tile& tile, int64_t f, const T* sums, int64_t pitch) const {
    const int64_t output = heads.output(tile.h, f), offset = output * n.out_area();
    S* y = args.y + tile.b * args.y_stride + offset;
    const T bias = layer.bias == nullptr ? T(0) : layer.bias[output];
    output_transform(n, packing, tile.row, tile.height, sums, kFilterBlock * pitch, bias, layer.relu != 0, y);
    if (args.residual == nullptr) return;
    const int64_t top = tile.row * Winograd<T>::kOutputs, bottom = (tile.row + tile.height) * Winograd<T>::kOutputs;
    const S* residual = args.residual + tile.b * n.out_channels() * n.out_area() + offset;
    const int64_t from = top * n.x.out, values = (std::min(bottom, n.y.out) - top) * n.x.out;
    add_residual<S, T>(residual + from, values, y + from);
  }
};

// The convolution of a DGC layer with gates that are given, without stride, by its `winograd_weight`.
template <typename S, typename T>
void winograd_conv2d(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args) {
  if (n.batch == 0) return;
  WinogradConv<S, T>(n, layer, args).run();
}

}  // namespace dgc
