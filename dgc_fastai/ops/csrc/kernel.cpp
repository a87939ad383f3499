// gated_conv2d and its gradients on a CPU. The loops run over the channels that a sample and head keep, and over no
// others. Built and called by cpu.py.
//
// Layout: x, dx [batch, channels, height, width]; y, dy [batch, filters, heads, out height, out width], filters being
// those of one head; gates [batch, heads, channels]; weight [filters, heads, channels, taps]; table see layout.h.

#include <c10/util/BFloat16.h>

#include "backward.h"
#include "backward_pointwise.h"
#include "forward.h"
#include "gates.h"
#include "stem.h"
#include "winograd.h"

namespace {

using dgc::Shape;

template <typename S, typename T>
void fill_table(const Shape& n, const S* weight, T* table) {
  const int64_t taps = n.taps();
  at::parallel_for(0, n.heads * n.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / n.channels, c = i % n.channels;
      for (int64_t f = 0; f < n.filters; f += dgc::kBlock) {
        const int64_t width = std::min(dgc::kBlock, n.filters - f);
        T* to = const_cast<T*>(dgc::block_of<T>(n, table, h, f)) + c * taps * width;
        for (int64_t j = 0; j < width; ++j) {
          const S* from = weight + (((f + j) * n.heads + h) * n.channels + c) * taps;
          for (int64_t t = 0; t < taps; ++t) to[t * width + j] = T(from[t]);
        }
      }
    }
  });
}

// Tables, one after another for each head and point, of filters one tap high.
template <typename S, typename T>
void fill_winograd_table(const Shape& n, const S* weight, T* table) {
  using Exact = dgc::Winograd<double>;
  const Shape point = dgc::at_point<T>(n);
  const int64_t columns = n.x.taps;
  at::parallel_for(0, n.heads * n.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / n.channels, c = i % n.channels;
      for (int64_t f = 0; f < n.filters; f += dgc::kBlock) {
        const int64_t width = std::min(dgc::kBlock, n.filters - f);
        for (int64_t j = 0; j < width; ++j) {
          const S* from = weight + (((f + j) * n.heads + h) * n.channels + c) * n.taps();
          for (int64_t t = 0; t < columns; ++t) {
            double found[Exact::kPoints];
            Exact::filter(from[t], from[columns + t], from[2 * columns + t], found);
            for (int64_t p = 0; p < Exact::kPoints; ++p) {
              T* to = const_cast<T*>(dgc::block_of<T>(point, table, h * Exact::kPoints + p, f));
              to[(c * columns + t) * width + j] = T(found[p]);
            }
          }
        }
      }
    }
  });
}

}  // namespace

#define DGC_FOR_STORED(S, T, SUFFIX)                                                                              \
  extern "C" void dgc_table_##SUFFIX(const Shape* n, const S* weight, T* table) { fill_table(*n, weight, table); } \
  extern "C" void dgc_forward_##SUFFIX(const Shape* n, const S* x, const T* gates, const T* table, S* y) {        \
    const dgc::Samples samples{n->channels * n->area(), n->heads * n->filters * n->out_area()};                   \
    dgc::forward<S, T>(*n, samples, x, gates, table, nullptr, nullptr, nullptr, nullptr, false, y);               \
  }                                                                                                               \
  extern "C" void dgc_group_##SUFFIX(                                                                             \
      const Shape* n, const S* x, int64_t x_sample, const T* table, const T* bias, S* y, int64_t y_sample) {      \
    dgc::forward<S, T>(*n, {x_sample, y_sample}, x, nullptr, table, nullptr, nullptr, bias, nullptr, false, y);   \
  }                                                                                                               \
  extern "C" void dgc_layer_##SUFFIX(                                                                             \
      const Shape* n, const S* x, int64_t x_sample, const T* squeeze, const T* excite, const T* gate_bias,        \
      int64_t hidden, const int64_t* inactive, const T* table, const T* scale, const T* shift, const T* bias,     \
      const S* residual, int64_t rectify, int64_t winograd, S* y) {                                               \
    std::vector<T> gates(n->batch * n->heads * n->channels);                                                      \
    const dgc::Gating<T> gating{hidden, *inactive, squeeze, excite, gate_bias};                                   \
    dgc::compute_gates<S, T>(*n, x, x_sample, scale, shift, gating, gates.data());                                \
    const dgc::Samples samples{x_sample, n->heads * n->filters * n->out_area()};                                  \
    const auto convolve = winograd ? dgc::winograd<S, T> : dgc::forward<S, T>;                                    \
    convolve(*n, samples, x, gates.data(), table, scale, shift, bias, residual, rectify != 0, y);                 \
  }                                                                                                               \
  extern "C" void dgc_stem_##SUFFIX(                                                                              \
      const Shape* n, const S* x, int64_t sample, const T* table, const T* bias, S* y) {                          \
    dgc::stem<S, T>(*n, x, sample, table, bias, y);                                                               \
  }                                                                                                               \
  extern "C" void dgc_winograd_table_##SUFFIX(const Shape* n, const S* weight, T* table) {                        \
    fill_winograd_table(*n, weight, table);                                                                       \
  }

#define DGC_FOR_SUMS(T, SUFFIX)                                                                                   \
  extern "C" void dgc_backward_inputs_##SUFFIX(                                                                   \
      const Shape* n, const T* dy, const T* x, const T* gates, const T* table, T* dx, T* dgates) {                \
    dgc::backward_inputs<T>(*n, dy, x, gates, table, dx, dgates);                                                 \
  }                                                                                                               \
  extern "C" void dgc_backward_filters_##SUFFIX(                                                                  \
      const Shape* n, const T* dy, const T* x, const T* gates, T* across, T* dweight) {                           \
    dgc::backward_filters<T>(*n, dy, x, gates, across, dweight);                                                  \
  }                                                                                                               \
  extern "C" int64_t dgc_across_##SUFFIX(const Shape* n) {                                                        \
    const dgc::FilterGroups<T> groups(*n);                                                                        \
    return n->heads * groups.count * n->batch * n->out_area() * groups.width;                                     \
  }                                                                                                               \
  extern "C" void dgc_backward_pointwise_##SUFFIX(                                                                \
      const Shape* n, const T* dy, const T* x, const T* gates, const T* table, T* dx, T* dgates, T* dweight) {    \
    dgc::backward_pointwise<T>(*n, dy, x, gates, table, dx, dgates, dweight);                                     \
  }

DGC_FOR_STORED(float, float, float32)
DGC_FOR_STORED(double, double, float64)
DGC_FOR_STORED(c10::BFloat16, float, bfloat16)
DGC_FOR_SUMS(float, float32)
DGC_FOR_SUMS(double, float64)
