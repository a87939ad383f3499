// The gates of a layer in evaluation: pooling of what its norm and ReLU leave, two small products a head, selection.

#pragma once

#include <ATen/Parallel.h>

#include "layout.h"

namespace dgc {

// What a layer's gates are made of: squeeze [heads, hidden, channels], excite [heads, hidden, channels], bias
// [heads, channels]; so many channels to drop.
template <typename T>
struct Gating {
  int64_t hidden, inactive;
  const T *squeeze, *excite, *bias;
};

template <typename S, typename T>
inline T pool(const S* x, int64_t area, bool norm, T scale, T shift) {
  constexpr int64_t kLanes = 4 * Vector<T>::size;
  T sums[kLanes] = {};
  const auto add = [&](int64_t p, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      sums[k] += rectified(T(x[p + k]) * scale + shift);
    }
  };
  const auto add_plain = [&](int64_t p, int64_t count) {
    for (int64_t k = 0; k < count; ++k) sums[k] += T(x[p + k]);
  };
  int64_t p = 0;
  if (norm) {
    for (; p + kLanes <= area; p += kLanes) add(p, kLanes);
    add(p, area - p);
  } else {
    for (; p + kLanes <= area; p += kLanes) add_plain(p, kLanes);
    add_plain(p, area - p);
  }
  T sum = 0;
  for (const T part : sums) sum += part;
  return sum / area;
}

// Zero every gate that is not above the count-th smallest. Gates are not negative, so that their bits are in the order
// of their values: the threshold's are found one by one, from the highest on, by counting, which vectors are good at.
// NaN is larger than all, as in PyTorch.
template <typename T>
inline void drop_smallest(T* gates, int64_t channels, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  if (count <= 0) return;
  const auto value = [](Bits bits) {
    T v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  };
  const auto up_to = [&](T limit) {
    Bits found = 0;
    for (int64_t c = 0; c < channels; ++c) found += gates[c] <= limit;
    return found;
  };
  constexpr Bits kInfinity = sizeof(T) == 8 ? Bits(0x7ffLL << (sizeof(T) == 8 ? 52 : 0)) : Bits(0x7f800000);
  if (up_to(value(kInfinity)) < count) return;  // the threshold is NaN
  Bits low = 0, high = kInfinity;               // the threshold lies between, ends included
  while (low < high) {
    const Bits middle = low + (high - low) / 2;
    if (up_to(value(middle)) >= count) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const T threshold = value(high);
  for (int64_t c = 0; c < channels; ++c) gates[c] = gates[c] <= threshold ? T(0) : gates[c];
}

// The sum of left * right.
template <typename T>
inline T dot(const T* left, const T* right, int64_t count) {
  constexpr int64_t kLanes = 4 * Vector<T>::size;
  T lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += left[c + k] * right[c + k];
  }
  for (int64_t k = 0; c + k < count; ++k) lanes[k] += left[c + k] * right[c + k];
  T sum = 0;
  for (const T part : lanes) sum += part;
  return sum;
}

// gates [batch, heads, channels] of x, whose samples are `sample` values apart. scale and shift as in `forward`.
template <typename S, typename T>
void compute_gates(
    const Shape& n, const S* x, int64_t sample, const T* scale, const T* shift, const Gating<T>& gating, T* gates) {
  constexpr int64_t kGrain = 32 * 1024;  // operations that are worth a thread
  std::vector<T> pooled(n.batch * n.channels);
  at::parallel_for(0, n.batch * n.channels, kGrain / n.area() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.channels, c = i % n.channels;
      const bool norm = scale != nullptr;
      pooled[i] = pool(x + b * sample + c * n.area(), n.area(), norm, norm ? scale[c] : T(1), norm ? shift[c] : T(0));
    }
  });
  const int64_t work = 2 * gating.hidden * n.channels;
  at::parallel_for(0, n.batch * n.heads, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    std::vector<T> squeezed(gating.hidden);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.heads, h = i % n.heads;
      const T* in = gating.squeeze + h * gating.hidden * n.channels;
      const T* out = gating.excite + h * gating.hidden * n.channels;
      const T* bias = gating.bias + h * n.channels;
      T* to = gates + i * n.channels;
      for (int64_t r = 0; r < gating.hidden; ++r) {
        squeezed[r] = rectified(dot(in + r * n.channels, pooled.data() + b * n.channels, n.channels));
      }
      constexpr int64_t kLanes = 4 * Vector<T>::size;
      for (int64_t c = 0; c < n.channels; c += kLanes) {
        const int64_t count = std::min(kLanes, n.channels - c);
        T sums[kLanes] = {};
        const auto add = [&](int64_t lanes) {
          for (int64_t r = 0; r < gating.hidden; ++r) {
            const T* from = out + r * n.channels + c;
            for (int64_t k = 0; k < lanes; ++k) sums[k] += from[k] * squeezed[r];
          }
        };
        count == kLanes ? add(kLanes) : add(count);
        for (int64_t k = 0; k < count; ++k) to[c + k] = rectified(sums[k] + bias[c + k]);
      }
      drop_smallest(to, n.channels, gating.inactive);
    }
  });
}

}  // namespace dgc
