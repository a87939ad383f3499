// gated_conv2d for 1x1 filters on a CPU. The loops run over the channels that a sample and head keep, and over no
// others. Built and called by cpu.py.
//
// Three small matrix products make up the operation and its gradients. In each, a block of results stays in up to
// twelve vector registers while the loop over the summed dimension reads rows of pixels. Rows of an image lie a power of
// two of bytes apart more often than not, so that they all compete for the same lines of the cache: a stretch of pixels
// of the rows that are needed is copied side by side first, and read from there by all filters.
//
// Layout: x, dx [batch, channels, area]; y, dy [batch, filters, heads, area]; gates [batch, heads, channels];
// weight, dweight [heads, channels, filters], where filters are those of one head.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
  static constexpr int64_t size = kBytes / sizeof(T);
};

template <typename T>
inline typename Vector<T>::type load(const T* from) {
  typename Vector<T>::type v;
  std::memcpy(&v, from, sizeof(v));  // need not be aligned
  return v;
}

template <typename T>
inline void store(T* to, typename Vector<T>::type v) {
  std::memcpy(to, &v, sizeof(v));
}

// The channels that one head keeps for one sample, and that head's filters for them, scaled by the gates.
template <typename T>
struct Kept {
  std::vector<int64_t> channels;
  std::vector<T> filters;  // [kept, filters]

  void read(const T* gates, const T* weight, int64_t count, int64_t width) {
    channels.clear();
    for (int64_t c = 0; c < count; ++c) {
      if (gates[c] != T(0)) channels.push_back(c);
    }
    filters.resize(channels.size() * width);
    for (size_t i = 0; i < channels.size(); ++i) {
      const T* from = weight + channels[i] * width;
      for (int64_t j = 0; j < width; ++j) filters[i * width + j] = from[j] * gates[channels[i]];
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
    vectors = (width + Vector<T>::size - 1) / Vector<T>::size;
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
    vectors = (rows + Vector<T>::size - 1) / Vector<T>::size;
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
inline void block(
    const T* rows, int64_t stride, int64_t length, const T* factors, int64_t by_row, int64_t by_term, Done done) {
  typename Vector<T>::type sums[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < length; ++s, rows += stride, factors += by_term) {
    typename Vector<T>::type values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load(rows + v * Vector<T>::size);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const T factor = factors[r * by_row];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * values[v];
    }
  }
#pragma GCC unroll 4
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
  int64_t p = 0;
  const auto put = [&](int64_t r, int64_t at, typename Vector<T>::type v) {
    T* to = result(r) + at;
    if (at + kSize <= width) {
      store(to, ADD ? load(to) + v : v);
    } else {
      for (int64_t i = 0; i < width - at; ++i) to[i] = ADD ? to[i] + v[i] : v[i];
    }
  };
  const auto tile = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const T* rows = stretch.row(0) + p;
    const int64_t stride = stretch.vectors * kSize;
    int64_t r = 0;
    const auto some = [&](auto size) {
      constexpr int kRows = decltype(size)::value;
      for (; r + kRows <= count; r += kRows) {
        block<T, kRows, kVectors>(
            rows, stride, length, factors + r * by_row, by_row, by_term,
            [&](int i, int v, typename Vector<T>::type sum) { put(r + i, p + v * kSize, sum); });
      }
    };
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
    p += kVectors * kSize;
  };
  for (int64_t left = stretch.vectors; left > 0;) {
    if (left >= 3) {
      tile(std::integral_constant<int, 3>());
      left -= 3;
    } else if (left == 2) {
      tile(std::integral_constant<int, 2>());
      left -= 2;
    } else {
      tile(std::integral_constant<int, 1>());
      left -= 1;
    }
  }
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

struct Shape {
  int64_t batch, heads, channels, filters, area;
};

template <typename T>
void forward(const Shape& n, const T* x, const T* gates, const T* weight, T* y) {
  // Samples and heads share nothing, so both may go to different threads.
  at::parallel_for(0, n.batch * n.heads, 1, [&](int64_t begin, int64_t end) {
    Kept<T> kept;
    Stretch<T> inputs;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.heads, h = i % n.heads;
      kept.read(gates + i * n.channels, weight + h * n.channels * n.filters, n.channels, n.filters);
      const int64_t count = kept.channels.size(), length = Stretch<T>::length(count, n.area);
      for (int64_t p = 0; p < n.area; p += length) {
        const int64_t width = std::min(length, n.area - p);
        inputs.copy(count, width, [&](int64_t s) { return x + (b * n.channels + kept.channels[s]) * n.area + p; });
        product<T, false>(
            n.filters, count, inputs, width, kept.filters.data(), 1, n.filters,
            [&](int64_t j) { return y + ((b * n.filters + j) * n.heads + h) * n.area + p; });
      }
    }
  });
}

// dgates are given as zeros; dweight is [threads, heads, channels, filters] of zeros, to be summed by the caller.
template <typename T>
void backward(
    const Shape& n, const T* dy, const T* x, const T* gates, const T* weight, T* dx, T* dgates, T* dweight) {
  at::parallel_for(0, n.batch, 1, [&](int64_t begin, int64_t end) {
    Kept<T> kept;
    Stretch<T> inputs, gradients, across;
    std::vector<T> sums;
    T* dtable = dweight + at::get_thread_num() * n.heads * n.channels * n.filters;
    for (int64_t i = begin * n.heads; i < end * n.heads; ++i) {
      const int64_t b = i / n.heads, h = i % n.heads, table = h * n.channels * n.filters;
      if (h == 0) std::fill_n(dx + b * n.channels * n.area, n.channels * n.area, T(0));  // soon read again
      kept.read(gates + i * n.channels, weight + table, n.channels, n.filters);
      const int64_t count = kept.channels.size(), length = Stretch<T>::length(count + n.filters, n.area);
      sums.assign(count * n.filters, T(0));
      for (int64_t p = 0; p < n.area; p += length) {
        const int64_t width = std::min(length, n.area - p);
        const auto place = [&](int64_t s) { return (b * n.channels + kept.channels[s]) * n.area + p; };
        inputs.copy(count, width, [&](int64_t s) { return x + place(s); });
        gradients.copy(n.filters, width, [&](int64_t j) { return dy + ((b * n.filters + j) * n.heads + h) * n.area + p; });
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
        const int64_t channel = kept.channels[s], at = table + channel * n.filters;
        const T gate = gates[i * n.channels + channel], *found = sums.data() + s * n.filters;
        T sum = 0;
        for (int64_t j = 0; j < n.filters; ++j) {
          sum += found[j] * weight[at + j];
          dtable[at + j] += found[j] * gate;
        }
        dgates[i * n.channels + channel] = sum;
      }
    }
  });
}

}  // namespace

#define DGC_EXPORT(T, SUFFIX)                                                                                    \
  extern "C" void dgc_forward_##SUFFIX(const Shape* n, const T* x, const T* gates, const T* weight, T* y) {      \
    forward<T>(*n, x, gates, weight, y);                                                                         \
  }                                                                                                              \
  extern "C" void dgc_backward_##SUFFIX(                                                                         \
      const Shape* n, const T* dy, const T* x, const T* gates, const T* weight, T* dx, T* dgates, T* dweight) {  \
    backward<T>(*n, dy, x, gates, weight, dx, dgates, dweight);                                                  \
  }

DGC_EXPORT(float, float32)
DGC_EXPORT(double, float64)
