// Gradients of the convolution for 1x1 filters without padding or stride, where they are matrix products with few
// operations per pixel: what matters is how often a pixel is fetched.
//
// A tile of results stays in registers while the loop over the summed dimension reads rows of pixels. Rows of an image
// are often a power of two of bytes apart, so that they compete for the same cache lines: a panel, a range of pixels of
// all rows that are needed, is copied first, side by side, and read from there by all filters.

#pragma once

#include <ATen/Parallel.h>

#include "heads.h"
#include "input_packing.h"

namespace dgc {

// The channels that one head keeps for one sample, and that head's filters for them, scaled by the gates.
template <typename T>
struct KeptChannels {
  std::vector<int64_t> channels;
  std::vector<T> filters;  // [kept, filters]

  void read(const ConvDesc& n, const GatedHeads<T>& heads, const T* weight, int64_t b, int64_t h) {
    heads.list_kept(b, h, 0, n.channels, channels);
    filters.resize(channels.size() * n.filters);
    for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
      const int64_t width = std::min(kFilterBlock, n.filters - f);
      for (size_t i = 0; i < channels.size(); ++i) {
        const T *from = filter_block(n, weight, h, f) + channels[i] * width, gate = heads.gate(b, h, channels[i]);
        for (int64_t j = 0; j < width; ++j) filters[i * n.filters + f + j] = from[j] * gate;
      }
    }
  }
};

// A range of pixels of several rows, side by side, filled up with zeros to whole vectors.
template <typename T>
struct Panel {
  static constexpr int64_t kMaxValues = 192 * 1024 / sizeof(T);  // in the second-level cache

  int64_t vectors = 0;
  std::vector<T> values;

  // How many pixels of so many rows to take at a time.
  static int64_t length(int64_t rows, int64_t area) {
    constexpr int64_t kStep = 6 * Vector<T>::size;
    const int64_t fit = kMaxValues / std::max<int64_t>(rows, 1) / kStep * kStep;
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

  // The transpose of another panel, of so many rows and pixels.
  void transpose(const Panel& other, int64_t rows, int64_t width) {
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
inline void product_micro_kernel(
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

// result(r)[:width] = (ADD: +=) sum over s of factors[r * by_row + s * by_term] * panel.row(s)
template <typename T, bool ADD, typename Result>
void product(
    int64_t count, int64_t length, const Panel<T>& panel, int64_t width, const T* factors, int64_t by_row,
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
  for_vector_tiles(panel.vectors, [&](int64_t at, auto vectors) {
    const int64_t p = at * kSize;
    for_row_tiles(count, [&](int64_t r, auto size) {
      product_micro_kernel<T, decltype(size)::value, decltype(vectors)::value>(
          panel.row(0) + p, panel.vectors * kSize, length, factors + r * by_row, by_row, by_term,
          [&](int i, int v, typename Vector<T>::type sum) { put(r + i, p + v * kSize, sum); });
    });
  });
}

// sums[r * by_row + c] += dot(left.row(r), right.row(c)), for ROWS x COLUMNS results.
template <typename T, int ROWS, int COLUMNS>
inline void dot_micro_kernel(const T* left, const T* right, int64_t width, T* sums, int64_t by_row) {
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
void add_outer_product(int64_t rows, int64_t columns, const Panel<T>& left, const Panel<T>& right, T* sums) {
  const int64_t width = left.vectors * Vector<T>::size;
  int64_t r = 0;
  const auto some_rows = [&](auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    for (; r + kRows <= rows; r += kRows) {
      int64_t c = 0;
      const auto some_columns = [&](auto column_count) {
        constexpr int kColumns = decltype(column_count)::value;
        for (; c + kColumns <= columns; c += kColumns) {
          dot_micro_kernel<T, kRows, kColumns>(left.row(r), right.row(c), width, sums + r * columns + c, columns);
        }
      };
      some_columns(std::integral_constant<int, 4>());
      some_columns(std::integral_constant<int, 1>());
    }
  };
  some_rows(std::integral_constant<int, 3>());
  some_rows(std::integral_constant<int, 1>());
}

template <typename T>
struct BackwardPointwise {
  const ConvDesc& n;
  const PackedLayer<T>& layer;
  const BackwardArgs<T>& args;
  const GatedHeads<T> heads;

  struct Workspace {
    KeptChannels<T> kept;
    Panel<T> inputs, gradients, transposed;
    std::vector<T> sums;  // [kept, filters]: the gradient of the scaled filters
  };

  void run() const {
    const int64_t channels = n.channels;
    at::parallel_for(0, n.batch, 1, [&](int64_t begin, int64_t end) {
      Workspace work;
      T* grad_weight = args.scratch + at::get_thread_num() * n.heads * channels * n.filters;
      for (int64_t b = begin; b < end; ++b) {
        std::fill_n(args.grad_x + b * channels * n.area(), channels * n.area(), T(0));  // now, as it is read again soon
        for (int64_t h = 0; h < n.heads; ++h) {
          work.kept.read(n, heads, layer.weight, b, h);
          convolve(b, h, work);
          split(b, h, work, grad_weight + h * channels * n.filters);
        }
      }
    });
  }

  // Adds to grad_x, and computes work.sums.
  void convolve(int64_t b, int64_t h, Workspace& work) const {
    const int64_t count = work.kept.channels.size(), length = Panel<T>::length(count + n.filters, n.area());
    work.sums.assign(count * n.filters, T(0));
    for (int64_t p = 0; p < n.area(); p += length) {
      const int64_t width = std::min(length, n.area() - p);
      const auto offset = [&](int64_t s) { return (b * n.channels + work.kept.channels[s]) * n.area() + p; };
      work.inputs.copy(count, width, [&](int64_t s) { return args.x + offset(s); });
      work.gradients.copy(n.filters, width, [&](int64_t f) {
        return args.grad_y + (b * n.out_channels() + heads.output(h, f)) * n.area() + p;
      });
      product<T, true>(count, n.filters, work.gradients, width, work.kept.filters.data(), n.filters, 1, [&](int64_t s) {
        return args.grad_x + offset(s);
      });
      if (n.filters < 4 * Vector<T>::size) {
        add_outer_product(count, n.filters, work.inputs, work.gradients, work.sums.data());
      } else {  // with filters in the lanes of vectors, no sums across lanes are needed
        work.transposed.transpose(work.gradients, n.filters, width);
        product<T, true>(
            count, width, work.transposed, n.filters, work.inputs.row(0), work.inputs.vectors * Vector<T>::size, 1,
            [&](int64_t s) { return work.sums.data() + s * n.filters; });
      }
    }
  }

  // The gradients of the gates and, added to grad_weight [channels, filters], of the filters from that of their
  // product.
  void split(int64_t b, int64_t h, const Workspace& work, T* grad_weight) const {
    for (size_t s = 0; s < work.kept.channels.size(); ++s) {
      const int64_t channel = work.kept.channels[s];
      const T gate = heads.gate(b, h, channel), *found = work.sums.data() + int64_t(s) * n.filters;
      T *to = grad_weight + channel * n.filters, sum = 0;
      for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
        const int64_t width = std::min(kFilterBlock, n.filters - f);
        const T* filters = filter_block(n, layer.weight, h, f) + channel * width;
        for (int64_t j = 0; j < width; ++j) {
          sum += found[f + j] * filters[j];
          to[f + j] += found[f + j] * gate;
        }
      }
      args.grad_gates[(b * n.heads + h) * n.channels + channel] = sum;
    }
  }
};

// grad_x, grad_gates, which must hold zeros, and in scratch the gradient of the weight: [threads, heads, channels,
// filters], which must hold zeros, and is to be summed over threads. grad_x may hold anything.
template <typename T>
void backward_pointwise(const ConvDesc& n, const PackedLayer<T>& layer, const BackwardArgs<T>& args) {
  BackwardPointwise<T>{n, layer, args, {n, args.gates}}.run();
}

}  // namespace dgc
