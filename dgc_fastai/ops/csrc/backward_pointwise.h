// Gradients of the convolution for 1x1 filters without border or stride, where they are matrix products: of few numbers
// a pixel, so that what matters is how often a pixel is fetched.
//
// A block of results stays in registers while the loop over the summed dimension reads rows of pixels. Rows of an image
// lie a power of two of bytes apart more often than not, so that they all compete for the same lines of the cache: a
// stretch of pixels of the rows that are needed is copied side by side first, and read from there by all filters.

#pragma once

#include <ATen/Parallel.h>

#include "layout.h"

namespace dgc {

// The channels that one head keeps for one sample, and that head's filters for them, scaled by the gates.
template <typename T>
struct Kept {
  std::vector<int64_t> channels;
  std::vector<T> filters;  // [kept, filters]

  void read(const Shape& n, const T* gates, const T* table, int64_t head) {
    list_kept(n, gates, channels);
    filters.resize(channels.size() * n.filters);
    for (int64_t f = 0; f < n.filters; f += kBlock) {
      const int64_t width = std::min(kBlock, n.filters - f);
      for (size_t i = 0; i < channels.size(); ++i) {
        const T *from = block_of(n, table, head, f) + channels[i] * width, gate = gates[channels[i]];
        for (int64_t j = 0; j < width; ++j) filters[i * n.filters + f + j] = from[j] * gate;
      }
    }
  }
};

// A stretch of pixels of several rows, side by side, filled up with zeros to whole vectors.
template <typename T>
struct Stretch {
  static constexpr int64_t kMost = 192 * 1024 / sizeof(T);  // values, of a cache of the second level

  int64_t vectors = 0;
  std::vector<T> values;

  // How many pixels of so many rows are to be taken at a time.
  static int64_t length(int64_t rows, int64_t area) {
    constexpr int64_t kStep = 6 * Vector<T>::size;
    const int64_t fit = kMost / std::max<int64_t>(rows, 1) / kStep * kStep;
    return std::min(area, std::max(fit, kStep));
  }

  template <typename Row>
  void copy(int64_t rows, int64_t width, Row row) {
    vectors = vectors_for<T>(width);
    const int64_t padded = vectors * Vector<T>::size;
    values.resize(rows * padded);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = values.data() + r * padded;
      std::memcpy(to, row(r), width * sizeof(T));
      std::fill(to + width, to + padded, T(0));
    }
  }

  // The same with the roles of rows and pixels exchanged.
  void transpose(const Stretch& other, int64_t rows, int64_t width) {
    vectors = vectors_for<T>(rows);
    const int64_t padded = vectors * Vector<T>::size;
    values.assign(width * padded, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = other.row(r);
      for (int64_t p = 0; p < width; ++p) values[p * padded + r] = from[p];
    }
  }

  const T* row(int64_t r) const { return values.data() + r * vectors * Vector<T>::size; }
};

// sums[r] = sum over s of factors[r * by_row + s * by_term] * rows[s], for ROWS results of VECTORS vectors each.
template <typename T, int ROWS, int VECTORS, typename Done>
inline void rows_block(
    const T* rows, int64_t stride, int64_t length, const T* factors, int64_t by_row, int64_t by_term, Done done) {
  typename Vector<T>::type sums[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < length; ++s, rows += stride, factors += by_term) {
    typename Vector<T>::type values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load(rows + v * Vector<T>::size);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = factors[r * by_row];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * values[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) done(r, v, sums[r][v]);
  }
}

// result(r)[:width] = (ADD: +=) sum over s of factors[r * by_row + s * by_term] * stretch.row(s)
template <typename T, bool ADD, typename Result>
void product(
    int64_t count, int64_t length, const Stretch<T>& stretch, int64_t width, const T* factors, int64_t by_row,
    int64_t by_term, Result result) {
  constexpr int64_t kSize = Vector<T>::size;
  const auto put = [&](int64_t r, int64_t at, typename Vector<T>::type v) {
    T* to = result(r) + at;
    if (at + kSize <= width) {
      store(to, ADD ? load(to) + v : v);
    } else {
      for (int64_t i = 0; i < width - at; ++i) to[i] = ADD ? to[i] + v[i] : v[i];
    }
  };
  in_threes(stretch.vectors, [&](int64_t at, auto vectors) {
    const int64_t p = at * kSize;
    in_rows(count, [&](int64_t r, auto size) {
      rows_block<T, decltype(size)::value, decltype(vectors)::value>(
          stretch.row(0) + p, stretch.vectors * kSize, length, factors + r * by_row, by_row, by_term,
          [&](int i, int v, typename Vector<T>::type sum) { put(r + i, p + v * kSize, sum); });
    });
  });
}

// sums[r * by_row + c] += dot(left.row(r), right.row(c)), for ROWS x COLUMNS results.
template <typename T, int ROWS, int COLUMNS>
inline void dots(const T* left, const T* right, int64_t width, T* sums, int64_t by_row) {
  typename Vector<T>::type partial[ROWS][COLUMNS] = {};
  for (int64_t p = 0; p < width; p += Vector<T>::size) {
    typename Vector<T>::type columns[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) columns[c] = load(right + c * width + p);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const typename Vector<T>::type values = load(left + r * width + p);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) partial[r][c] += values * columns[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      T sum = 0;
      for (int64_t i = 0; i < Vector<T>::size; ++i) sum += partial[r][c][i];
      sums[r * by_row + c] += sum;
    }
  }
}

// sums[rows, columns] += left times right transposed
template <typename T>
void outer(int64_t rows, int64_t columns, const Stretch<T>& left, const Stretch<T>& right, T* sums) {
  const int64_t width = left.vectors * Vector<T>::size;
  int64_t r = 0;
  const auto some_rows = [&](auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    for (; r + kRows <= rows; r += kRows) {
      int64_t c = 0;
      const auto some_columns = [&](auto column_count) {
        constexpr int kColumns = decltype(column_count)::value;
        for (; c + kColumns <= columns; c += kColumns) {
          dots<T, kRows, kColumns>(left.row(r), right.row(c), width, sums + r * columns + c, columns);
        }
      };
      some_columns(std::integral_constant<int, 4>());
      some_columns(std::integral_constant<int, 1>());
    }
  };
  some_rows(std::integral_constant<int, 3>());
  some_rows(std::integral_constant<int, 1>());
}

// As `backward_inputs` and `backward_filters`, but dx need not be given as zeros, and dweight is
// [threads, heads, channels, filters] of zeros, to be summed by the caller.
template <typename T>
void backward_pointwise(
    const Shape& n, const T* dy, const T* x, const T* gates, const T* table, T* dx, T* dgates, T* dweight) {
  at::parallel_for(0, n.batch, 1, [&](int64_t begin, int64_t end) {
    Kept<T> kept;
    Stretch<T> inputs, gradients, across;
    std::vector<T> sums;
    T* dtable = dweight + at::get_thread_num() * n.heads * n.channels * n.filters;
    for (int64_t i = begin * n.heads; i < end * n.heads; ++i) {
      const int64_t b = i / n.heads, h = i % n.heads;
      if (h == 0) std::fill_n(dx + b * n.channels * n.area(), n.channels * n.area(), T(0));  // soon read again
      kept.read(n, gates + i * n.channels, table, h);
      const int64_t count = kept.channels.size(), length = Stretch<T>::length(count + n.filters, n.area());
      sums.assign(count * n.filters, T(0));
      for (int64_t p = 0; p < n.area(); p += length) {
        const int64_t width = std::min(length, n.area() - p);
        const auto place = [&](int64_t s) { return (b * n.channels + kept.channels[s]) * n.area() + p; };
        inputs.copy(count, width, [&](int64_t s) { return x + place(s); });
        gradients.copy(n.filters, width, [&](int64_t j) { return dy + ((b * n.filters + j) * n.heads + h) * n.area() + p; });
        product<T, true>(
            count, n.filters, gradients, width, kept.filters.data(), n.filters, 1,
            [&](int64_t s) { return dx + place(s); });
        if (n.filters < 4 * Vector<T>::size) {
          outer(count, n.filters, inputs, gradients, sums.data());
        } else {  // sums lie in the lanes of vectors and need not be added up across them
          across.transpose(gradients, n.filters, width);
          product<T, true>(
              count, width, across, n.filters, inputs.row(0), inputs.vectors * Vector<T>::size, 1,
              [&](int64_t s) { return sums.data() + s * n.filters; });
        }
      }
      for (int64_t s = 0; s < count; ++s) {
        const int64_t channel = kept.channels[s];
        const T gate = gates[i * n.channels + channel], *found = sums.data() + s * n.filters;
        T *to = dtable + (h * n.channels + channel) * n.filters, sum = 0;
        for (int64_t f = 0; f < n.filters; f += kBlock) {
          const int64_t width = std::min(kBlock, n.filters - f);
          const T* filters = block_of(n, table, h, f) + channel * width;
          for (int64_t j = 0; j < width; ++j) {
            sum += found[f + j] * filters[j];
            to[f + j] += found[f + j] * gate;
          }
        }
        dgates[i * n.channels + channel] = sum;
      }
    }
  });
}

}  // namespace dgc
