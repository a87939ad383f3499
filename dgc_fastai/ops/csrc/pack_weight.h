// Reorders the filters of a layer for the kernels.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "winograd.h"

namespace dgc {

// Packed weight [heads, blocks, channels, taps, 16]: the values that 16 filters have for one tap of one channel lie
// together; of floats, they are one cache line. The last block is narrower where 16 does not divide the filters of a
// head.
template <typename S, typename T>
void pack_weight(const ConvDesc& n, const PackArgs<S, T>& args) {
  const int64_t taps = n.taps();
  at::parallel_for(0, n.heads * n.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / n.channels, c = i % n.channels;
      for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
        const int64_t width = std::min(kFilterBlock, n.filters - f);
        T* to = filter_block(n, args.packed, h, f) + c * taps * width;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t output = n.grouped ? h * n.filters + f + j : (f + j) * n.heads + h;
          const S* from = args.weight + (output * n.channels + c) * taps;
          for (int64_t t = 0; t < taps; ++t) to[t * width + j] = T(from[t]);
        }
      }
    }
  });
}

// Packed weights, one for each head and Winograd point, of filters one tap high; see winograd.h. Of gated heads.
template <typename S, typename T>
void pack_winograd_weight(const ConvDesc& n, const PackArgs<S, T>& args) {
  using Exact = Winograd<double>;
  const ConvDesc point = point_desc<T>(n);
  const int64_t columns = n.x.taps;
  at::parallel_for(0, n.heads * n.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / n.channels, c = i % n.channels;
      for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
        const int64_t width = std::min(kFilterBlock, n.filters - f);
        for (int64_t j = 0; j < width; ++j) {
          const S* from = args.weight + (((f + j) * n.heads + h) * n.channels + c) * n.taps();
          for (int64_t t = 0; t < columns; ++t) {
            double transformed[Exact::kPoints];
            Exact::weight_transform(from[t], from[columns + t], from[2 * columns + t], transformed);
            for (int64_t p = 0; p < Exact::kPoints; ++p) {
              T* to = filter_block(point, args.packed, h * Exact::kPoints + p, f);
              to[(c * columns + t) * width + j] = T(transformed[p]);
            }
          }
        }
      }
    }
  });
}

}  // namespace dgc
