// Gradients of the convolution, for filters of any size.
//
// For x and the gates: per sample and head, the gradients of the results, packed, meet the filters of four kept channels
// at a time. Multiplied by its gate, what comes out is the channel's part of the gradient for x; multiplied by x and
// summed up, it is the gate's.
//
// For the filters: per head and channel, over all samples that keep it, so that nothing is added up in memory. The
// vectors are of filters there.

#pragma once

#include <ATen/Parallel.h>

#include "layout.h"

namespace dgc {

// As Packing, but of gradients, for a phase of x at a time: positions [0, out) lie `lead` after the start of their row.
struct GradientPacking {
  struct Side {
    int64_t lead, end;  // positions packed are [-lead, end)

    explicit Side(const Axis& axis) {
      int64_t first = axis.out, last = axis.out;
      for (int64_t tap = 0; tap < axis.taps; ++tap) {
        first = std::min(first, axis.first(axis.phase(tap)));
        last = std::max(last, axis.last(axis.phase(tap)));
      }
      lead = std::max<int64_t>(axis.reach() - first, 0);
      end = last;
    }
  };
  struct Phase {
    int64_t a, b;
    std::vector<int64_t> taps, offsets;
  };

  Side x;
  int64_t rows, pitch, plane;
  std::vector<Phase> phases;

  GradientPacking(const Shape& n, int64_t rows) : x(n.x), rows(rows) {
    const int64_t shared = std::min(x.lead, x.end - n.x.out);
    pitch = x.lead + x.end - shared;
    plane = (rows + n.y.reach()) * pitch + shared;
    for (int64_t i = 0; i < n.y.taps; ++i) {
      for (int64_t j = 0; j < n.x.taps; ++j) {
        const int64_t a = n.y.phase(i), b = n.x.phase(j);
        auto phase = std::find_if(phases.begin(), phases.end(), [&](const Phase& p) { return p.a == a && p.b == b; });
        if (phase == phases.end()) phase = phases.insert(phase, {a, b, {}, {}});
        phase->taps.push_back(i * n.x.taps + j);
        phase->offsets.push_back((n.y.reach() - n.y.shift(i)) * pitch + x.lead - n.x.shift(j));
      }
    }
  }

  // What positions [top, top + rows) of x see of one filter's gradients; the rest of `to` is zero.
  template <typename T>
  void copy(const Shape& n, int64_t top, const T* __restrict__ from, T* __restrict__ to) const {
    const int64_t first = std::max<int64_t>(top - n.y.reach(), 0), last = std::min(top + rows, n.y.out);
    T* out = to + (first - top + n.y.reach()) * pitch + x.lead;
    for (int64_t r = first; r < last; ++r, out += pitch) {
      for (int64_t q = 0; q < n.x.out; ++q) out[q] = from[r * n.x.out + q];
    }
  }
};

// sums[r][:] (zero at first) += filters of kept channel r * gradients, over the filters of a block and a phase's taps.
template <typename T, int ROWS, int VECTORS>
inline void gradient_block(
    const T* gradients, int64_t plane, const GradientPacking::Phase& phase, int64_t width, const T* const* filters,
    bool first, T* sums, int64_t pitch) {
  using V = typename Vector<T>::type;
  constexpr int64_t kSize = Vector<T>::size;
  V results[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) results[r][v] = first ? V{} : load(sums + r * pitch + v * kSize);
  }
  for (size_t t = 0; t < phase.taps.size(); ++t) {
    const T *from = gradients + phase.offsets[t], *factors[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) factors[r] = filters[r] + phase.taps[t] * width;
    for (int64_t f = 0; f < width; ++f, from += plane) {
      V values[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) values[v] = load(from + v * kSize);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const T factor = factors[r][f];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) results[r][v] += factor * values[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(sums + r * pitch + v * kSize, results[r][v]);
  }
}

// to[i * stride] += from[i] * gate, for so many i; returns the sum of from[i] * x[i * stride].
template <typename T>
inline T scatter(
    const T* __restrict__ from, int64_t count, int64_t stride, T gate, const T* __restrict__ x, T* __restrict__ to) {
  using V = typename Vector<T>::type;
  constexpr int64_t kSize = Vector<T>::size;
  T sum = 0;
  int64_t i = 0;
  if (stride == 1) {
    V sums = {};
    for (; i + kSize <= count; i += kSize) {
      const V found = load(from + i);
      store(to + i, load(to + i) + found * gate);
      sums += found * load(x + i);
    }
    for (int64_t k = 0; k < kSize; ++k) sum += sums[k];
  }
  for (; i < count; ++i) {
    to[i * stride] += from[i] * gate;
    sum += from[i] * x[i * stride];
  }
  return sum;
}

// Where what belongs to a head lies, in x, y and the filters as they are stored: heads see all channels, and their
// results are interleaved; groups, where there are no gates, have channels of their own.
struct Places {
  const Shape& n;
  bool groups;

  int64_t channel(int64_t b, int64_t h, int64_t c) const {
    return (groups ? (b * n.heads + h) * n.channels + c : b * n.channels + c) * n.area();
  }
  int64_t filter(int64_t h, int64_t f) const { return groups ? h * n.filters + f : f * n.heads + h; }
  int64_t result(int64_t b, int64_t h, int64_t f) const {
    return (b * n.heads * n.filters + filter(h, f)) * n.out_area();
  }
};

// dx and dgates, both given as zeros, from the gradients dy of y; the other arguments as in `forward`. Without gates,
// null, as dgates is then, too, those of a group convolution.
template <typename T>
void backward_inputs(
    const Shape& n, const T* dy, const T* x, const T* gates, const T* table, T* dx, T* dgates) {
  constexpr int64_t kSize = Vector<T>::size;
  const Places places{n, gates == nullptr};
  const int64_t most = places.groups ? n.channels : most_kept(n, gates), threads = at::get_num_threads();
  // A sample's heads add to the same dx. Where there are too few samples, threads share one by its channels.
  const int64_t parts = n.batch >= threads ? 1 : std::min(threads, n.channels);
  const GradientPacking one(n, 1);
  int64_t top_end = 0, top_begin = n.y.out + n.y.reach();
  for (const auto& phase : one.phases) {
    top_begin = std::min(top_begin, n.y.first(phase.a));
    top_end = std::max(top_end, n.y.last(phase.a));
  }
  const int64_t fit = 2 * kPacked / int64_t(sizeof(T)) / ((most / parts + n.filters + 1) * one.pitch) - n.y.reach();
  const int64_t rows = std::max<int64_t>(std::min(fit, top_end - top_begin), 1);
  const GradientPacking packing(n, rows);

  at::parallel_for(0, n.batch * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> kept;
    std::vector<T> gradients(n.filters * packing.plane + 4 * kSize), sums;
    std::vector<const T*> filters;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      const int64_t from = n.channels * part / parts, to = n.channels * (part + 1) / parts;
      for (int64_t top = top_begin; top < top_end; top += rows) {
        std::fill(gradients.begin(), gradients.end(), T(0));
        for (int64_t h = 0; h < n.heads; ++h) {
          const int64_t unit = b * n.heads + h;
          kept.clear();
          for (int64_t c = from; c < to; ++c) {
            if (places.groups || gates[unit * n.channels + c] != T(0)) kept.push_back(c);
          }
          const int64_t count = kept.size();
          if (count == 0) continue;
          for (int64_t f = 0; f < n.filters; ++f) {
            const T* found = dy + places.result(b, h, f);
            packing.copy(n, top, found, gradients.data() + f * packing.plane);
          }
          filters.resize(count);
          for (const auto& phase : packing.phases) {
            const int64_t y0 = std::max(n.y.first(phase.a), top), y1 = std::min(n.y.last(phase.a), top + rows);
            const int64_t x0 = n.x.first(phase.b), x1 = n.x.last(phase.b);
            if (y0 >= y1 || x0 >= x1) continue;
            const int64_t vectors = vectors_for<T>((y1 - y0 - 1) * packing.pitch + x1 - x0), pitch = vectors * kSize;
            sums.resize(std::max<size_t>(sums.size(), count * pitch));
            for (int64_t f = 0; f < n.filters; f += kBlock) {
              const int64_t width = std::min(kBlock, n.filters - f);
              for (int64_t s = 0; s < count; ++s) {
                filters[s] = block_of(n, table, h, f) + kept[s] * n.taps() * width;
              }
              const T* seen = gradients.data() + f * packing.plane + (y0 - top) * packing.pitch + x0;
              in_threes(vectors, [&](int64_t at, auto wide) {
                in_rows(count, [&](int64_t s, auto size) {
                  gradient_block<T, decltype(size)::value, decltype(wide)::value>(
                      seen + at * kSize, packing.plane, phase, width, filters.data() + s, f == 0,
                      sums.data() + s * pitch + at * kSize, pitch);
                });
              });
            }
            for (int64_t s = 0; s < count; ++s) {
              const int64_t c = kept[s], channel = places.channel(b, h, c);
              const T gate = places.groups ? T(1) : gates[unit * n.channels + c];
              T sum = 0;
              for (int64_t r = y0; r < y1; ++r) {
                const int64_t at = channel + n.y.pixel(r, phase.a) * n.x.size + n.x.pixel(x0, phase.b);
                sum += scatter(sums.data() + s * pitch + (r - y0) * packing.pitch, x1 - x0, n.x.stride, gate, x + at, dx + at);
              }
              if (!places.groups) dgates[unit * n.channels + c] += sum;
            }
          }
        }
      }
    }
  });
}

// sums[t][:] += pixels seen by tap t * gradients of VECTORS vectors of filters, for TAPS taps, over all results.
template <typename T, int TAPS, int VECTORS>
inline void filter_block(
    const Shape& n, const T* pixels, const int64_t* offsets, int64_t pitch, const T* gradients, T* sums) {
  using V = typename Vector<T>::type;
  constexpr int64_t kSize = Vector<T>::size;
  V results[TAPS][VECTORS];
#pragma GCC unroll 9
  for (int t = 0; t < TAPS; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) results[t][v] = load(sums + (t * VECTORS + v) * kSize);
  }
  for (int64_t r = 0; r < n.y.out; ++r, pixels += pitch) {
    const T* seen[TAPS];
#pragma GCC unroll 9
    for (int t = 0; t < TAPS; ++t) seen[t] = pixels + offsets[t];
    for (int64_t q = 0; q < n.x.out; ++q, gradients += VECTORS * kSize) {
      V values[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) values[v] = load(gradients + v * kSize);
#pragma GCC unroll 9
      for (int t = 0; t < TAPS; ++t) {
        const T pixel = seen[t][q];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) results[t][v] += pixel * values[v];
      }
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < TAPS; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(sums + (t * VECTORS + v) * kSize, results[t][v]);
  }
}

// How filters' gradients are grouped: so many vectors of filters together, of a head's.
template <typename T>
struct FilterGroups {
  int64_t count, vectors, width;

  explicit FilterGroups(const Shape& n) {
    const int64_t all = vectors_for<T>(n.filters);
    count = (all + 3) / 4;
    vectors = (all + count - 1) / count;
    width = vectors * Vector<T>::size;
  }
};

// dweight, as weight is stored, from x, gates and dy as in `backward_inputs`. `across` is room for
// [heads, groups, batch, out_area, width] values.
template <typename T>
void backward_filters(const Shape& n, const T* dy, const T* x, const T* gates, T* across, T* dweight) {
  const Places places{n, gates == nullptr};
  const FilterGroups<T> groups(n);
  const int64_t area = n.out_area(), width = groups.width, taps = n.taps();
  at::parallel_for(0, n.heads * groups.count * n.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % n.batch, f = i / n.batch % groups.count * width, h = i / n.batch / groups.count;
      T* to = across + i * area * width;
      for (int64_t j = 0; j < width; ++j) {
        if (f + j >= n.filters) {
          for (int64_t p = 0; p < area; ++p) to[p * width + j] = T(0);
          continue;
        }
        const T* from = dy + places.result(b, h, f + j);
        for (int64_t p = 0; p < area; ++p) to[p * width + j] = from[p];
      }
    }
  });

  const Packing packing(n, n.y.out);
  // So many samples at a time that their gradients stay in the cache while channel after channel meets them.
  const int64_t samples = std::max<int64_t>(2 * kPacked / int64_t(sizeof(T)) / (area * width), 1);
  const int64_t units = n.heads * groups.count;
  const int64_t parts = std::min(n.channels, (4 * at::get_num_threads() + units - 1) / units);
  at::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> pixels(packing.plane), sums;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, group = i / parts, f = group % groups.count * width, h = group / groups.count;
      const int64_t from = n.channels * part / parts, to = n.channels * (part + 1) / parts;
      sums.assign((to - from) * taps * width, T(0));
      for (int64_t start = 0; start < n.batch; start += samples) {
        for (int64_t c = from; c < to; ++c) {
          for (int64_t b = start; b < std::min(start + samples, n.batch); ++b) {
            const T gate = places.groups ? T(1) : gates[(b * n.heads + h) * n.channels + c];
            if (gate == T(0)) continue;
            const T* channel = x + places.channel(b, h, c);
            packing.copy(n, 0, n.y.out, channel, pixels.data(), [gate](T v) { return v * gate; });
            const T* gradients = across + (group * n.batch + b) * area * width;
            T* result = sums.data() + (c - from) * taps * width;
            int64_t t = 0;
            const auto some = [&](auto size, auto vectors) {
              constexpr int kTaps = decltype(size)::value;
              for (; t + kTaps <= taps; t += kTaps) {
                filter_block<T, kTaps, decltype(vectors)::value>(
                    n, pixels.data(), packing.offsets.data() + t, packing.pitch, gradients, result + t * width);
              }
            };
            switch (groups.vectors) {
              case 1:
                some(Constant<9>(), Constant<1>());
                some(Constant<1>(), Constant<1>());
                break;
              case 2:
                some(Constant<5>(), Constant<2>());
                some(Constant<4>(), Constant<2>());
                some(Constant<1>(), Constant<2>());
                break;
              case 3:
                some(Constant<3>(), Constant<3>());
                some(Constant<1>(), Constant<3>());
                break;
              default:
                some(Constant<3>(), Constant<4>());
                some(Constant<1>(), Constant<4>());
            }
          }
        }
      }
      for (int64_t c = from; c < to; ++c) {
        for (int64_t j = 0; j < std::min(width, n.filters - f); ++j) {
          T* out = dweight + (places.filter(h, f + j) * n.channels + c) * taps;
          const T* found = sums.data() + (c - from) * taps * width + j;
          for (int64_t t = 0; t < taps; ++t) out[t] = found[t * width];
        }
      }
    }
  });
}

}  // namespace dgc
