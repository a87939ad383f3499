// The convolution for filters three taps high, in half the multiplications: Winograd's minimal filtering (Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) of columns.
//
// Four results one below the other see six pixels. Those of a kept channel, scaled by its gate, are transformed into
// six points; so are the filters, when a network is deployed. At each point runs a convolution by filters one tap high,
// and what it yields at six points is transformed into four results: 6 products a filter's column where there were
// 4 x 3.
// Rows need no transform, so that pixels stay as they lie, and filters take twice their room and not four times.
//
// A pixel that is not finite spoils all results of its six: those of a layer whose gates it has spoilt before.

#pragma once

#include "forward.h"

namespace dgc {

// With the points 0, +-a, +-b and infinity. Squares and products of these two are exact, and rounding errors half of
// those at the usual 1 and 2.
template <typename T>
struct Winograd {
  static constexpr int kResults = 4, kPoints = 6;
  static constexpr T a = 0.625, b = 1.5, aa = a * a, bb = b * b;

  // V is T or a vector.
  template <typename V>
  static void pixels(const V (&d)[kPoints], V (&to)[kPoints]) {
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
  static void results(const V (&m)[kPoints], V (&to)[kResults]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = m[0] + even_a + even_b;
    to[1] = odd_a * a + odd_b * b;
    to[2] = even_a * aa + even_b * bb;
    to[3] = odd_a * (a * aa) + odd_b * (b * bb) + m[5];
  }
  static void filter(T top, T middle, T bottom, T (&to)[kPoints]) {
    const T at_a = 2 * aa * (aa - bb), at_b = 2 * bb * (bb - aa);
    to[0] = top / (aa * bb);
    to[1] = (top + a * middle + aa * bottom) / at_a;
    to[2] = (top - a * middle + aa * bottom) / at_a;
    to[3] = (top + b * middle + bb * bottom) / at_b;
    to[4] = (top - b * middle + bb * bottom) / at_b;
    to[5] = bottom;
  }
};

// The convolution at a point: its rows are rows of `Winograd::kResults` results.
template <typename T>
Shape at_point(Shape n) {
  const int64_t rows = (n.y.out + Winograd<T>::kResults - 1) / Winograd<T>::kResults;
  n.y = {rows, rows, 1, 1, 0, 1};
  return n;
}

// Calls some(q, count) for a row of so many values, a vector at a time, the last from where it is a whole one; in a row
// that is shorter than a vector, count of its values are of the row.
template <typename T, typename Some>
inline void along_row(int64_t size, Some some) {
  constexpr int64_t kSize = Vector<T>::size;
  for (int64_t q = 0; q + kSize < size; q += kSize) some(q, kSize);
  some(std::max<int64_t>(size - kSize, 0), std::min(size, kSize));
}

template <typename T>
inline void store_some(T* to, typename Vector<T>::type v, int64_t count) {
  if (count == Vector<T>::size) return store(to, v);
  for (int64_t k = 0; k < count; ++k) to[k] = v[k];
}

// Transforms what `count` rows of results from `row` on see of a channel x, of which nothing from `end` on may be read:
// to + p * plane for point p, lines as of `packing`.
template <typename S, typename T, typename Value>
void transform_pixels(
    const Shape& n, const Packing& packing, int64_t row, int64_t count, const S* x, const S* end, T* to, int64_t plane,
    Value value) {
  using V = typename Vector<T>::type;
  constexpr int kPoints = Winograd<T>::kPoints;
  const int64_t left = n.x.first(0), skipped = n.x.pixel(left, 0), width = std::min(n.x.last(0), packing.pitch) - left;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t top = (row + r) * Winograd<T>::kResults - n.y.padding;
    T* out = to + r * packing.pitch + left;
    along_row<T>(width, [&](int64_t q, int64_t some) {
      V d[kPoints], found[kPoints];
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) {
        d[i] = V{};
        if (top + i < 0 || top + i >= n.y.size) continue;
        const S* from = x + (top + i) * n.x.size + skipped + q;
        if constexpr (std::is_same<S, T>::value) {
          if (from + Vector<T>::size <= end) {
            d[i] = value(load(from));
            continue;
          }
        }
        for (int64_t k = 0; k < some; ++k) d[i][k] = T(from[k]);
        d[i] = value(d[i]);
      }
      Winograd<T>::pixels(d, found);
#pragma GCC unroll 6
      for (int p = 0; p < kPoints; ++p) store_some(out + p * plane + q, found[p], some);
    });
  }
}

// `count` rows of results of a filter, from what they are at each point, `plane` values apart.
template <typename S, typename T>
void transform_results(
    const Shape& n, const Packing& packing, int64_t row, int64_t count, const T* from, int64_t plane, T bias,
    bool rectify, S* y) {
  using V = typename Vector<T>::type;
  constexpr int kResults = Winograd<T>::kResults, kPoints = Winograd<T>::kPoints;
  for (int64_t r = 0; r < count; ++r, from += packing.pitch) {
    const int64_t top = (row + r) * kResults, rows = std::min<int64_t>(n.y.out - top, kResults);
    along_row<T>(n.x.out, [&](int64_t q, int64_t some) {
      V m[kPoints], found[kResults];
#pragma GCC unroll 6
      for (int p = 0; p < kPoints; ++p) m[p] = load(from + p * plane + q);
      Winograd<T>::results(m, found);
#pragma GCC unroll 4
      for (int i = 0; i < kResults; ++i) {
        if (i >= rows) continue;
        V result = found[i] + bias;
        if (rectify) result = rectified(result);
        S* to = y + (top + i) * n.x.out + q;
        if constexpr (std::is_same<S, T>::value) {
          store_some(to, result, some);
        } else {
          for (int64_t k = 0; k < some; ++k) to[k] = S(result[k]);
        }
      }
    });
  }
}

// As `forward`, for filters three taps high without stride, with gates, and with the table of `winograd_table`.
template <typename S, typename T>
void winograd(
    const Shape& n, Samples samples, const S* x, const T* gates, const T* table, const T* scale, const T* shift,
    const T* bias, const S* residual, bool rectify, S* y) {
  constexpr int64_t kSize = Vector<T>::size, kPoints = Winograd<T>::kPoints;
  static const T none[kBlock] = {};
  const Shape point = at_point<T>(n);
  const int64_t units = n.batch * n.heads, most = most_kept(n, gates);
  const int64_t rows = Packing::fitting_rows(
      point, 2 * kPacked, most * kPoints, sizeof(T), units, at::get_num_threads());
  const int64_t tiles = (point.y.out + rows - 1) / rows;
  const Packing packing(point, rows);
  const S* end_of_x = x + (n.batch - 1) * samples.x + n.channels * n.area();

  at::parallel_for(0, units * tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t pitch = vectors_for<T>(packing.line(point, rows)) * kSize;
    const int64_t plane = most * packing.plane + 4 * kSize;  // of a point
    std::vector<int64_t> kept;
    std::vector<T> pixels(kPoints * plane);
    const std::unique_ptr<T[]> sums(new T[kPoints * kBlock * pitch]);  // not set to zero
    int64_t unit_before = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / tiles, b = unit / n.heads, h = unit % n.heads, row = i % tiles * rows;
      const int64_t height = std::min(rows, point.y.out - row), vectors = vectors_for<T>(packing.line(point, height));
      const T* gate = gates + unit * n.channels;
      if (unit != unit_before) list_kept(n, gate, kept);
      unit_before = unit;
      const int64_t count = kept.size();
      for (int64_t s = 0; s < count; ++s) {
        const int64_t c = kept[s];
        const S* from = x + b * samples.x + c * n.area();
        T* to = pixels.data() + s * packing.plane;
        const T g = gate[c];
        if (scale == nullptr) {
          transform_pixels(n, packing, row, height, from, end_of_x, to, plane, [g](auto v) { return v * g; });
        } else {
          const T a = scale[c], d = shift[c];
          const auto value = [=](auto v) { return rectified(v * a + d) * g; };
          transform_pixels(n, packing, row, height, from, end_of_x, to, plane, value);
        }
      }

      for (int64_t f = 0; f < n.filters; f += kBlock) {
        const int64_t width = std::min(kBlock, n.filters - f);
        const int64_t near = point.taps() * width + 4 * kSize;
        const int64_t step = std::max<int64_t>(kNear / int64_t(sizeof(T)) / near, 1);
        for (int64_t p = 0; p < kPoints; ++p) {
          const T* filters = block_of(point, table, h * kPoints + p, f);
          for (int64_t s = 0; s == 0 || s < count; s += step) {
            const int64_t some = std::min(step, count - s);
            in_threes(vectors, [&](int64_t at, auto wide) {
              in_rows(width, [&](int64_t r, auto size) {
                block<T, decltype(size)::value, decltype(wide)::value>(
                    pixels.data() + p * plane + s * packing.plane + at * kSize, packing.plane, packing.offsets,
                    kept.data() + s, some, filters + r, width, s == 0, false, none,
                    sums.get() + (p * kBlock + r) * pitch + at * kSize, pitch);
              });
            });
          }
        }
        for (int64_t j = 0; j < width; ++j) {
          const int64_t output = (f + j) * n.heads + h, offset = b * samples.y + output * n.out_area();
          transform_results(
              n, packing, row, height, sums.get() + j * pitch, kBlock * pitch, bias == nullptr ? T(0) : bias[output],
              rectify && residual == nullptr, y + offset);
          if (residual != nullptr) {
            const int64_t top = row * Winograd<T>::kResults, from = offset + top * n.x.out;
            const int64_t values = std::min(height * Winograd<T>::kResults, n.y.out - top) * n.x.out;
            add_residual<S, T>(residual + from, values, rectify, y + from);
          }
        }
      }
    }
  });
}

}  // namespace dgc
