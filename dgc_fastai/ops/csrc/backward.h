// Gradients of the convolution, for filters of any size.
//
// For x and the gates: per sample and head, a transposed convolution gives the gradient of each kept channel's scaled
// input. Times the gate, it is a part of the gradient of x; times x, summed over pixels, it is the gradient of the
// gate.
//
// For the weight: per head and channel, over all samples that keep it, so that no partial sums go through memory.
// Vectors hold filters there.

#pragma once

#include <ATen/Parallel.h>

#include "heads.h"
#include "input_packing.h"

namespace dgc {

// As InputPacking, but of the gradient of y, and for one phase of x at a time: outputs [0, out) begin `lead` values
// after the start of their row.
struct GradPacking {
  struct Side {
    int64_t lead, end;  // the packed positions are [-lead, end)

    explicit Side(const Axis& axis) {
      int64_t first = axis.out, last = axis.out;
      for (int64_t tap = 0; tap < axis.taps; ++tap) {
        first = std::min(first, axis.first(axis.phase(tap)));
        last = std::max(last, axis.last(axis.phase(tap)));
      }
      lead = std::max<int64_t>(axis.max_shift() - first, 0);
      end = last;
    }
  };
  struct Phase {
    int64_t a, b;  // vertical and horizontal
    std::vector<int64_t> taps, offsets;
  };

  Side x;
  int64_t rows, pitch, plane;
  std::vector<Phase> phases;

  GradPacking(const ConvDesc& n, int64_t rows) : x(n.x), rows(rows) {
    const int64_t shared = std::min(x.lead, x.end - n.x.out);
    pitch = x.lead + x.end - shared;
    plane = (rows + n.y.max_shift()) * pitch + shared;
    for (int64_t i = 0; i < n.y.taps; ++i) {
      for (int64_t j = 0; j < n.x.taps; ++j) {
        const int64_t a = n.y.phase(i), b = n.x.phase(j);
        auto phase = std::find_if(phases.begin(), phases.end(), [&](const Phase& p) { return p.a == a && p.b == b; });
        if (phase == phases.end()) phase = phases.insert(phase, {a, b, {}, {}});
        phase->taps.push_back(i * n.x.taps + j);
        phase->offsets.push_back((n.y.max_shift() - n.y.shift(i)) * pitch + x.lead - n.x.shift(j));
      }
    }
  }

  // Copies what positions [top, top + rows) of x need of the gradient of one output channel. `to` must hold zeros.
  template <typename T>
  void pack(const ConvDesc& n, int64_t top, const T* __restrict__ from, T* __restrict__ to) const {
    const int64_t first = std::max<int64_t>(top - n.y.max_shift(), 0), last = std::min(top + rows, n.y.out);
    T* out = to + (first - top + n.y.max_shift()) * pitch + x.lead;
    for (int64_t r = first; r < last; ++r, out += pitch) {
      for (int64_t q = 0; q < n.x.out; ++q) out[q] = from[r * n.x.out + q];
    }
  }
};

// sums[r][:] += filters[r] * gradients, over the filters of a block and the taps of a phase, for ROWS kept channels and
// VECTORS vectors of neighboring pixels. Starts with zero if this is the `first` call for these sums.
template <typename T, int ROWS, int VECTORS>
inline void backward_input_micro_kernel(
    const T* gradients, int64_t plane, const GradPacking::Phase& phase, int64_t width, const T* const* filters,
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

// to[i * stride] += from[i] * gate for i in [0, count); returns the sum of from[i] * x[i * stride].
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

template <typename T, typename Heads>
struct BackwardInput {
  static constexpr int64_t kSize = Vector<T>::size;
  const ConvDesc& n;
  const PackedLayer<T>& layer;
  const BackwardArgs<T>& args;
  const Heads heads;
  // The heads of a sample add to the same gradient. With fewer samples than threads, the threads share a sample by its
  // channels, in so many parts.
  const int64_t parts;
  int64_t begin, end;  // the positions of all phases
  int64_t rows;        // of positions at a time

  struct Workspace {
    std::vector<int64_t> kept;
    std::vector<T> gradients, sums;
    std::vector<const T*> filters;  // of each kept channel
  };
  // Positions [top, top + rows) of the channels [from, to) of a sample.
  struct Tile {
    int64_t b, h, from, to, top;
  };

  BackwardInput(const ConvDesc& n, const PackedLayer<T>& layer, const BackwardArgs<T>& args, const Heads& heads)
      : n(n),
        layer(layer),
        args(args),
        heads(heads),
        parts(n.batch >= at::get_num_threads() ? 1 : std::min<int64_t>(at::get_num_threads(), n.channels)) {
    const GradPacking one(n, 1);
    begin = n.y.out + n.y.max_shift();
    end = 0;
    for (const auto& phase : one.phases) {
      begin = std::min(begin, n.y.first(phase.a));
      end = std::max(end, n.y.last(phase.a));
    }
    const int64_t line = (heads.max_kept() / parts + n.filters + 1) * one.pitch;
    const int64_t fit = 2 * kL2Bytes / int64_t(sizeof(T)) / line - n.y.max_shift();
    rows = std::max<int64_t>(std::min(fit, end - begin), 1);
  }

  void run() const {
    const GradPacking packing(n, rows);
    at::parallel_for(0, n.batch * parts, 1, [&](int64_t first, int64_t last) {
      Workspace work;
      work.gradients.resize(n.filters * packing.plane + 4 * kSize);
      for (int64_t i = first; i < last; ++i) {
        const int64_t b = i / parts, part = i % parts;
        const int64_t from = n.channels * part / parts, to = n.channels * (part + 1) / parts;
        for (int64_t top = begin; top < end; top += rows) {
          std::fill(work.gradients.begin(), work.gradients.end(), T(0));
          for (int64_t h = 0; h < n.heads; ++h) {
            const Tile tile{b, h, from, to, top};
            heads.list_kept(b, h, from, to, work.kept);
            if (work.kept.empty()) continue;
            for (int64_t f = 0; f < n.filters; ++f) {
              const T* grad = args.grad_y + (b * n.out_channels() + heads.output(h, f)) * n.out_area();
              packing.pack(n, top, grad, work.gradients.data() + f * packing.plane);
            }
            for (const auto& phase : packing.phases) run_phase(tile, packing, phase, work);
          }
        }
      }
    });
  }

  // The gradients of the pixels of one phase.
  void run_phase(const Tile& tile, const GradPacking& packing, const GradPacking::Phase& phase, Workspace& work) const {
    const int64_t y0 = std::max(n.y.first(phase.a), tile.top), y1 = std::min(n.y.last(phase.a), tile.top + rows);
    const int64_t x0 = n.x.first(phase.b), x1 = n.x.last(phase.b);
    if (y0 >= y1 || x0 >= x1) return;
    const int64_t vectors = vectors_for<T>((y1 - y0 - 1) * packing.pitch + x1 - x0), pitch = vectors * kSize;
    const int64_t count = work.kept.size();
    work.sums.resize(std::max<size_t>(work.sums.size(), count * pitch));
    work.filters.resize(count);
    for (int64_t f = 0; f < n.filters; f += kFilterBlock) {
      const int64_t width = std::min(kFilterBlock, n.filters - f);
      for (int64_t s = 0; s < count; ++s) {
        work.filters[s] = filter_block(n, layer.weight, tile.h, f) + work.kept[s] * n.taps() * width;
      }
      const T* gradients = work.gradients.data() + f * packing.plane + (y0 - tile.top) * packing.pitch + x0;
      for_vector_tiles(vectors, [&](int64_t at, auto wide) {
        for_row_tiles(count, [&](int64_t s, auto size) {
          backward_input_micro_kernel<T, decltype(size)::value, decltype(wide)::value>(
              gradients + at * kSize, packing.plane, phase, width, work.filters.data() + s, f == 0,
              work.sums.data() + s * pitch + at * kSize, pitch);
        });
      });
    }
    for (int64_t s = 0; s < count; ++s) {
      const int64_t c = work.kept[s], channel = tile.b * n.in_channels() + heads.input(tile.h, c);
      const T gate = heads.gate(tile.b, tile.h, c);
      T sum = 0;
      for (int64_t r = y0; r < y1; ++r) {
        const int64_t row = n.y.pixel(r, phase.a), at = channel * n.area() + row * n.x.size + n.x.pixel(x0, phase.b);
        const T* from = work.sums.data() + s * pitch + (r - y0) * packing.pitch;
        sum += scatter(from, x1 - x0, n.x.stride, gate, args.x + at, args.grad_x + at);
      }
      if constexpr (Heads::kGated) args.grad_gates[(tile.b * n.heads + tile.h) * n.channels + c] += sum;
    }
  }
};

// grad_x and, unless the convolution is grouped, grad_gates. Both must hold zeros.
template <typename T>
void backward_input(const ConvDesc& n, const PackedLayer<T>& layer, const BackwardArgs<T>& args) {
  if (n.batch == 0) return;
  if (n.grouped) {
    BackwardInput<T, Groups<T>>(n, layer, args, {n}).run();
  } else {
    BackwardInput<T, GatedHeads<T>>(n, layer, args, {n, args.gates}).run();
  }
}

// sums[t][:] += pixels that tap t reads * gradients of VECTORS vectors of filters, for TAPS taps, over all outputs.
template <typename T, int TAPS, int VECTORS>
inline void backward_weight_micro_kernel(
    const ConvDesc& n, const T* pixels, const int64_t* offsets, int64_t pitch, const T* gradients, T* sums) {
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

// The filters of a head are taken in `count` groups of up to four vectors.
template <typename T>
struct FilterGroups {
  int64_t count, vectors, width;

  explicit FilterGroups(const ConvDesc& n) {
    const int64_t all = vectors_for<T>(n.filters);
    count = (all + 3) / 4;
    vectors = (all + count - 1) / count;
    width = vectors * Vector<T>::size;
  }
};

// Values of scratch memory for `backward_weight`: [heads, filter groups, batch, out_area, width]
template <typename T>
int64_t backward_weight_scratch(const ConvDesc& n) {
  const FilterGroups<T> groups(n);
  return n.heads * groups.count * n.batch * n.out_area() * groups.width;
}

template <typename T, typename Heads>
struct BackwardWeight {
  const ConvDesc& n;
  const BackwardArgs<T>& args;
  const Heads heads;
  const FilterGroups<T> groups;
  const InputPacking packing;

  BackwardWeight(const ConvDesc& n, const BackwardArgs<T>& args, const Heads& heads)
      : n(n), args(args), heads(heads), groups(n), packing(n, n.y.out) {}

  void run() const {
    transpose_gradients();
    // So many samples at a time that their gradients stay in the cache while one channel after the other reads them.
    const int64_t samples = std::max<int64_t>(2 * kL2Bytes / int64_t(sizeof(T)) / (n.out_area() * groups.width), 1);
    const int64_t units = n.heads * groups.count;
    const int64_t parts = std::min(n.channels, (4 * at::get_num_threads() + units - 1) / units);
    at::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> pixels(packing.plane), sums;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts, unit = i / parts;
        const int64_t from = n.channels * part / parts, to = n.channels * (part + 1) / parts;
        sums.assign((to - from) * n.taps() * groups.width, T(0));
        for (int64_t start = 0; start < n.batch; start += samples) {
          const int64_t stop = std::min(start + samples, n.batch);
          for (int64_t c = from; c < to; ++c) {
            accumulate(unit, c, start, stop, pixels.data(), sums.data() + (c - from) * n.taps() * groups.width);
          }
        }
        store_weight(unit, from, to, sums.data());
      }
    });
  }

  // scratch [heads, groups, batch, out_area, width] of grad_y; filters that are not there have zeros.
  void transpose_gradients() const {
    const int64_t area = n.out_area(), width = groups.width;
    at::parallel_for(0, n.heads * groups.count * n.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i % n.batch, f = i / n.batch % groups.count * width, h = i / n.batch / groups.count;
        T* to = args.scratch + i * area * width;
        for (int64_t j = 0; j < width; ++j) {
          if (f + j >= n.filters) {
            for (int64_t p = 0; p < area; ++p) to[p * width + j] = T(0);
            continue;
          }
          const T* from = args.grad_y + (b * n.out_channels() + heads.output(h, f + j)) * area;
          for (int64_t p = 0; p < area; ++p) to[p * width + j] = from[p];
        }
      }
    });
  }

  // result [taps, width] += what the samples [start, stop) add for one head, group of filters (`unit`) and channel.
  void accumulate(int64_t unit, int64_t c, int64_t start, int64_t stop, T* pixels, T* result) const {
    const int64_t h = unit / groups.count;
    for (int64_t b = start; b < stop; ++b) {
      const T gate = heads.gate(b, h, c);
      if (gate == T(0)) continue;
      const T* channel = args.x + (b * n.in_channels() + heads.input(h, c)) * n.area();
      packing.pack(n, 0, n.y.out, channel, pixels, [gate](T v) { return v * gate; });
      const T* gradients = args.scratch + (unit * n.batch + b) * n.out_area() * groups.width;
      // As many taps at a time as registers allow for so many vectors.
      switch (groups.vectors) {
        case 1:
          for_tap_tiles<1, 9, 1>(pixels, gradients, result);
          break;
        case 2:
          for_tap_tiles<2, 5, 4, 1>(pixels, gradients, result);
          break;
        case 3:
          for_tap_tiles<3, 3, 1>(pixels, gradients, result);
          break;
        default:
          for_tap_tiles<4, 3, 1>(pixels, gradients, result);
      }
    }
  }

  // All taps, TAPS[0] at a time as long as there are as many, then TAPS[1], and so on.
  template <int VECTORS, int... TAPS>
  void for_tap_tiles(const T* pixels, const T* gradients, T* result) const {
    int64_t t = 0;
    const auto some = [&](auto size) {
      constexpr int kTaps = decltype(size)::value;
      for (; t + kTaps <= n.taps(); t += kTaps) {
        backward_weight_micro_kernel<T, kTaps, VECTORS>(
            n, pixels, packing.offsets.data() + t, packing.pitch, gradients, result + t * groups.width);
      }
    };
    (some(Constant<TAPS>()), ...);
  }

  void store_weight(int64_t unit, int64_t from, int64_t to, const T* sums) const {
    const int64_t f = unit % groups.count * groups.width, h = unit / groups.count, taps = n.taps();
    for (int64_t c = from; c < to; ++c) {
      for (int64_t j = 0; j < std::min(groups.width, n.filters - f); ++j) {
        T* out = args.grad_weight + (heads.output(h, f + j) * n.channels + c) * taps;
        const T* found = sums + (c - from) * taps * groups.width + j;
        for (int64_t t = 0; t < taps; ++t) out[t] = found[t * groups.width];
      }
    }
  }
};

// grad_weight. Needs `backward_weight_scratch` values of scratch memory, and no weight.
template <typename T>
void backward_weight(const ConvDesc& n, const PackedLayer<T>&, const BackwardArgs<T>& args) {
  if (n.grouped) {
    BackwardWeight<T, Groups<T>>(n, args, {n}).run();
  } else {
    BackwardWeight<T, GatedHeads<T>>(n, args, {n, args.gates}).run();
  }
}

}  // namespace dgc
