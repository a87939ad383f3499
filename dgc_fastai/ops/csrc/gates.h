// The gates of a layer in inference: normalization, ReLU and pooling in one pass, two small matrix products per head,
// and the selection of channels.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "descriptors.h"
#include "vectors.h"

namespace dgc {

// The mean of one channel; with `normalize`, of relu(x * scale + shift).
template <typename S, typename T>
inline T pool(const S* x, int64_t area, bool normalize, T scale, T shift) {
  constexpr int64_t kLanes = 4 * Vector<T>::size;
  T sums[kLanes] = {};
  const auto add = [&](int64_t p, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      sums[k] += relu(T(x[p + k]) * scale + shift);
    }
  };
  const auto add_as_is = [&](int64_t p, int64_t count) {
    for (int64_t k = 0; k < count; ++k) sums[k] += T(x[p + k]);
  };
  int64_t p = 0;
  if (normalize) {
    for (; p + kLanes <= area; p += kLanes) add(p, kLanes);
    add(p, area - p);
  } else {
    for (; p + kLanes <= area; p += kLanes) add_as_is(p, kLanes);
    add_as_is(p, area - p);
  }
  T sum = 0;
  for (const T part : sums) sum += part;
  return sum / area;
}

// Zeroes every gate that is not above the count-th smallest. Gates are not negative, so that their bit patterns, read
// as integers, are in the order of their values: a binary search over bit patterns finds the threshold, and each of its
// steps is a count, which vectorizes well. NaN is larger than all numbers, as in PyTorch.
template <typename T>
inline void drop_smallest(T* gates, int64_t channels, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  if (count <= 0) return;
  const auto value = [](Bits bits) {
    T v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  };
  const auto count_up_to = [&](T limit) {
    Bits found = 0;
    for (int64_t c = 0; c < channels; ++c) found += gates[c] <= limit;
    return found;
  };
  constexpr Bits kInfinity = sizeof(T) == 8 ? Bits(0x7ffLL << (sizeof(T) == 8 ? 52 : 0)) : Bits(0x7f800000);
  if (count_up_to(value(kInfinity)) < count) return;  // the threshold is NaN
  Bits low = 0, high = kInfinity;                     // the threshold lies in [low, high]
  while (low < high) {
    const Bits middle = low + (high - low) / 2;
    if (count_up_to(value(middle)) >= count) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const T threshold = value(high);
  for (int64_t c = 0; c < channels; ++c) gates[c] = gates[c] <= threshold ? T(0) : gates[c];
}

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

constexpr int64_t kOperationsPerThread = 32 * 1024;  // fewer are not worth another thread

// pooled [batch, channels]
template <typename S, typename T>
void pool_channels(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args, T* pooled) {
  const bool normalize = layer.scale != nullptr;
  at::parallel_for(0, n.batch * n.channels, kOperationsPerThread / n.area() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.channels, c = i % n.channels;
      const T scale = normalize ? layer.scale[c] : T(1), shift = normalize ? layer.shift[c] : T(0);
      pooled[i] = pool(args.x + b * args.x_stride + c * n.area(), n.area(), normalize, scale, shift);
    }
  });
}

// to [blocks] = relu(W2 squeezed + bias), with W2 transposed [hidden, blocks]
template <typename T>
void excite(const T* weight, const T* squeezed, int64_t hidden, const T* bias, int64_t blocks, T* to) {
  constexpr int64_t kLanes = 4 * Vector<T>::size;
  for (int64_t c = 0; c < blocks; c += kLanes) {
    const int64_t count = std::min(kLanes, blocks - c);
    T sums[kLanes] = {};
    const auto add = [&](int64_t lanes) {
      for (int64_t r = 0; r < hidden; ++r) {
        const T* from = weight + r * blocks + c;
        for (int64_t k = 0; k < lanes; ++k) sums[k] += from[k] * squeezed[r];
      }
    };
    count == kLanes ? add(kLanes) : add(count);
    for (int64_t k = 0; k < count; ++k) to[c + k] = relu(sums[k] + bias[c + k]);
  }
}

// In place, [blocks] -> [blocks * granularity]: every channel of a block gets its gate.
template <typename T>
void spread_blocks(T* gates, int64_t blocks, int64_t granularity) {
  if (granularity == 1) return;
  for (int64_t k = blocks - 1; k >= 0; --k) {  // from the end, where no gate is overwritten before it is read
    const T gate = gates[k];
    std::fill_n(gates + k * granularity, granularity, gate);
  }
}

// gates [batch, heads, channels] of args.x
template <typename S, typename T>
void compute_gates(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args, T* gates) {
  std::vector<T> pooled(n.batch * n.channels);
  pool_channels(n, layer, args, pooled.data());
  const int64_t hidden = layer.hidden, blocks = n.channels / layer.granularity;
  const int64_t operations = hidden * (n.channels + blocks);
  at::parallel_for(0, n.batch * n.heads, kOperationsPerThread / operations + 1, [&](int64_t begin, int64_t end) {
    std::vector<T> squeezed(hidden);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.heads, h = i % n.heads;
      const T* weight = layer.squeeze + h * hidden * n.channels;
      for (int64_t r = 0; r < hidden; ++r) {
        squeezed[r] = relu(dot(weight + r * n.channels, pooled.data() + b * n.channels, n.channels));
      }
      T* to = gates + i * n.channels;
      excite(layer.excite + h * hidden * blocks, squeezed.data(), hidden, layer.gate_bias + h * blocks, blocks, to);
      drop_smallest(to, blocks, *layer.inactive / layer.granularity);
      spread_blocks(to, blocks, layer.granularity);
    }
  });
}

}  // namespace dgc
