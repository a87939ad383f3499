// The convolution, for filters of any size. Per sample and head the kept channels are copied side by side, scaled by
// their gates; then blocks of results stay in registers while the loop runs over kept channels and taps.

#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <numeric>

#include "layout.h"

namespace dgc {

// sums[r][:] (start with bias[r], or go on) += filters[r] * pixels over kept channels and taps, for ROWS filters and
// VECTORS vectors of neighbouring results.
template <typename T, int ROWS, int VECTORS>
inline void block(
    const T* pixels, int64_t plane, const std::vector<int64_t>& offsets, const int64_t* kept, int64_t count,
    const T* filters, int64_t width, bool first, bool rectify, const T* bias, T* sums, int64_t pitch) {
  using V = typename Vector<T>::type;
  constexpr int64_t kSize = Vector<T>::size;
  const int64_t taps = offsets.size();
  const int64_t* offset = offsets.data();
  V results[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) results[r][v] = first ? V{} + bias[r] : load(sums + r * pitch + v * kSize);
  }
  const auto add = [&](const T* from, const T* factors) {
    V values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load(from + v * kSize);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = factors[r];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) results[r][v] += factor * values[v];
    }
  };
  if (taps == 1) {  // a loop of one round would cost as much as what it does
    for (int64_t s = 0; s < count; ++s, pixels += plane) add(pixels, filters + kept[s] * width);
  } else {
    for (int64_t s = 0; s < count; ++s, pixels += plane) {
      const T* factors = filters + kept[s] * taps * width;
#pragma GCC unroll 3  // worth 3 % for 3x3 filters
      for (int64_t t = 0; t < taps; ++t, factors += width) add(pixels + offset[t], factors);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      V result = results[r][v];
      if (rectify) result = rectified(result);
      store(sums + r * pitch + v * kSize, result);
    }
  }
}

// Where images of a batch, x and y, begin: so many values apart, which need not be those of one image.
struct Samples {
  int64_t x, y;
};

// y += residual, of so many values, and then rectified, if wanted.
template <typename S, typename T>
inline void add_residual(const S* __restrict__ residual, int64_t count, bool rectify, S* __restrict__ y) {
  for (int64_t p = 0; p < count; ++p) {
    const T sum = T(y[p]) + T(residual[p]);
    y[p] = S(rectify ? rectified(sum) : sum);
  }
}

// y [batch, filters, heads, y.out, x.out] from x [batch, channels, y.size, x.size], gates [batch, heads, channels] and
// the table of filters. May be null: scale and shift [channels], for relu(x * scale + shift) instead of x; bias
// [filters, heads]; residual, of y's shape, which is added to y. With `rectify` y is rectified in the end. S is the type of
// values in memory, T that of sums.
//
// Without gates, null, it is an ordinary group convolution: heads are groups, each of so many channels of its own and
// with its results side by side: x [batch, heads, channels, ...], y [batch, heads, filters, ...], bias [heads, filters].
template <typename S, typename T>
void forward(
    const Shape& n, Samples samples, const S* x, const T* gates, const T* table, const T* scale, const T* shift,
    const T* bias, const S* residual, bool rectify, S* y) {
  constexpr int64_t kSize = Vector<T>::size;
  const int64_t units = n.batch * n.heads, most = gates == nullptr ? n.channels : most_kept(n, gates);
  const int64_t rows = Packing::fitting_rows(n, kPacked, most, sizeof(T), units, at::get_num_threads());
  const int64_t tiles = (n.y.out + rows - 1) / rows;
  const Packing packing(n, rows);
  // Results that have nothing between their rows need not be copied once more.
  const bool direct = std::is_same<S, T>::value && packing.pitch == n.x.out;

  at::parallel_for(0, units * tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t pitch = vectors_for<T>(packing.line(n, rows)) * kSize;
    std::vector<int64_t> kept(gates == nullptr ? n.channels : 0);
    std::iota(kept.begin(), kept.end(), 0);
    const int64_t size = most * packing.plane + 4 * kSize;
    const std::unique_ptr<T[]> pixels(new T[size]), sums(new T[kBlock * pitch]);  // not set to zero
    T biases[kBlock];
    int64_t row_before = -1, unit_before = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / tiles, b = unit / n.heads, h = unit % n.heads, row = i % tiles * rows;
      const int64_t height = std::min(rows, n.y.out - row), line = packing.line(n, height);
      const T* gate = gates == nullptr ? nullptr : gates + unit * n.channels;
      if (gate != nullptr && unit != unit_before) list_kept(n, gate, kept);
      const int64_t first = gate == nullptr ? h * n.channels : 0;
      if (row != row_before && packing.bordered) std::fill_n(pixels.get(), size, T(0));
      unit_before = unit;
      row_before = row;
      const int64_t count = kept.size();
      for (int64_t s = 0; s < count; ++s) {
        const int64_t c = first + kept[s];
        const S* from = x + b * samples.x + c * n.area();
        T* to = pixels.get() + s * packing.plane;
        const T g = gate == nullptr ? T(1) : gate[c];
        if (scale == nullptr) {
          packing.copy(n, row, height, from, to, [g](T v) { return v * g; });
        } else {
          const T a = scale[c], d = shift[c];
          packing.copy(n, row, height, from, to, [=](T v) { return rectified(v * a + d) * g; });
        }
      }

      for (int64_t f = 0; f < n.filters; f += kBlock) {
        const int64_t width = std::min(kBlock, n.filters - f);
        const T* filters = block_of(n, table, h, f);
        const int64_t output = gates == nullptr ? h * n.filters + f : f * n.heads + h;
        const int64_t next = gates == nullptr ? 1 : n.heads;
        const auto offset = [&](int64_t j) { return b * samples.y + (output + j * next) * n.out_area() + row * n.x.out; };
        const auto place = [&](int64_t j) { return y + offset(j); };
        for (int64_t j = 0; j < width; ++j) biases[j] = bias == nullptr ? T(0) : bias[output + j * next];
        const int64_t straight = direct ? line / kSize * kSize : 0;  // whole vectors go where they belong
        const int64_t near = n.taps() * width + n.y.taps * 4 * kSize;
        const int64_t step = std::max<int64_t>(kNear / int64_t(sizeof(T)) / near, 1);
        for (int64_t s = 0; s == 0 || s < count; s += step) {
          const int64_t some = std::min(step, count - s);
          const bool last = s + some == count;
          const auto tile = [&](int64_t p, auto vectors, bool within) {
            in_rows(width, [&](int64_t r, auto size) {
              T* to = sums.get() + r * pitch + p;
              int64_t apart = pitch;
              if constexpr (std::is_same<S, T>::value) {
                if (within) {
                  to = place(r) + p;
                  apart = next * n.out_area();
                }
              }
              block<T, decltype(size)::value, decltype(vectors)::value>(
                  pixels.get() + s * packing.plane + p, packing.plane, packing.offsets, kept.data() + s, some,
                  filters + r, width, s == 0, rectify && last && residual == nullptr, biases + r, to, apart);
            });
          };
          in_threes(straight / kSize, [&](int64_t at, auto vectors) { tile(at * kSize, vectors, true); });
          in_threes(vectors_for<T>(line - straight), [&](int64_t at, auto vectors) {
            tile(straight + at * kSize, vectors, false);
          });
        }
        for (int64_t j = 0; j < width; ++j) {
          const T* from = sums.get() + j * pitch;
          S* to = place(j);
          if (direct) {
            for (int64_t p = straight; p < line; ++p) to[p] = S(from[p]);
          } else {
            for (int64_t r = 0; r < height; ++r, from += packing.pitch) {
              for (int64_t q = 0; q < n.x.out; ++q) to[r * n.x.out + q] = S(from[q]);
            }
          }
          if (residual != nullptr) add_residual<S, T>(residual + offset(j), height * n.x.out, rectify, to);
        }
      }
    }
  });
}

}  // namespace dgc
