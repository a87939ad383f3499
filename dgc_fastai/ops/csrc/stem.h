// What many networks start with: an ordinary convolution of a few channels, ReLU, and max pooling (3x3, stride 2,
// border 1). What the convolution yields is four times as much as what is left of it, and is not written to memory.

#pragma once

#include "forward.h"

namespace dgc {

// The larger one; NaN, if one is.
template <typename T>
inline T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

// to[q] = the largest of what q's window sees of three rows of `width` values each. `line` is room for width + 3.
template <typename S, typename T>
inline void pool_row(const T* const (&rows)[3], int64_t width, T* __restrict__ line, S* __restrict__ to) {
  // All that is pooled has been rectified, or is by this border.
  line[0] = line[width + 1] = line[width + 2] = T(0);
  const T *__restrict__ a = rows[0], *__restrict__ b = rows[1], *__restrict__ c = rows[2];
  for (int64_t q = 0; q < width; ++q) line[1 + q] = larger(larger(a[q], b[q]), larger(c[q], T(0)));
  for (int64_t q = 0; q < (width + 1) / 2; ++q) {
    to[q] = S(larger(larger(line[2 * q], line[2 * q + 1]), line[2 * q + 2]));
  }
}

// y [batch, filters, (y.out + 1) / 2, (x.out + 1) / 2] from x [batch, channels, y.size, x.size], whose samples are
// `sample` values apart, the table of filters, for one head, and bias [filters], or null.
template <typename S, typename T>
void stem(const Shape& n, const S* x, int64_t sample, const T* table, const T* bias, S* y) {
  constexpr int64_t kSize = Vector<T>::size;
  const int64_t pooled_rows = (n.y.out + 1) / 2, pooled_columns = (n.x.out + 1) / 2;
  const Packing one(n, 1);
  const int64_t line = (n.channels * int64_t(one.phases.size()) + kBlock) * one.pitch * int64_t(sizeof(T));
  const int64_t rows = even_rows(pooled_rows, (2 * kPacked / line - n.y.reach()) / 2, n.batch, at::get_num_threads());
  const int64_t tiles = (pooled_rows + rows - 1) / rows;
  const Packing packing(n, std::min(2 * rows + 1, n.y.out));

  at::parallel_for(0, n.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t pitch = vectors_for<T>(packing.line(n, packing.rows)) * kSize;
    const std::unique_ptr<T[]> sums(new T[kBlock * pitch]);  // not set to zero
    std::vector<T> pixels, line(n.x.out + 3);
    std::vector<int64_t> channels(n.channels);
    std::iota(channels.begin(), channels.end(), 0);
    T biases[kBlock] = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, row = i % tiles * rows, last = std::min(row + rows, pooled_rows);
      const int64_t top = std::max<int64_t>(2 * row - 1, 0), height = std::min(2 * last, n.y.out) - top;
      pixels.assign(n.channels * packing.plane + 4 * kSize, T(0));
      for (int64_t c = 0; c < n.channels; ++c) {
        const S* from = x + b * sample + c * n.area();
        packing.copy(n, top, height, from, pixels.data() + c * packing.plane, [](T v) { return v; });
      }
      for (int64_t f = 0; f < n.filters; f += kBlock) {
        const int64_t width = std::min(kBlock, n.filters - f);
        const T* filters = block_of(n, table, 0, f);
        if (bias != nullptr) std::copy_n(bias + f, width, biases);
        in_threes(vectors_for<T>(packing.line(n, height)), [&](int64_t at, auto vectors) {
          in_rows(width, [&](int64_t r, auto size) {
            block<T, decltype(size)::value, decltype(vectors)::value>(
                pixels.data() + at * kSize, packing.plane, packing.offsets, channels.data(), n.channels, filters + r,
                width, true, false, biases + r, sums.get() + r * pitch + at * kSize, pitch);
          });
        });
        for (int64_t j = 0; j < width; ++j) {
          S* to = y + ((b * n.filters + f + j) * pooled_rows + row) * pooled_columns;
          for (int64_t r = row; r < last; ++r, to += pooled_columns) {
            const T* seen[3];
            for (int64_t k = 0; k < 3; ++k) {
              const int64_t at = std::min(std::max<int64_t>(2 * r - 1 + k, 0), n.y.out - 1);
              seen[k] = sums.get() + j * pitch + (at - top) * packing.pitch;
            }
            pool_row(seen, n.x.out, line.data(), to);
          }
        }
      }
    }
  });
}

}  // namespace dgc
