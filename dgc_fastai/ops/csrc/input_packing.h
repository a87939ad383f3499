// How the channels of an image are laid out so that every tap of a filter reads whole vectors of pixels.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "descriptors.h"
#include "vectors.h"

namespace dgc {

constexpr int64_t kL2Bytes = 128 * 1024;  // packed pixels at a time: a part of the second-level cache
constexpr int64_t kL1Bytes = 20 * 1024;   // pixels and filters that one pass reads again and again: of the first-level

// How many of `all` rows to take at a time: at most `fit`, and about as many each time; fewer if threads would idle
// with `units` times the resulting number of parts to share.
inline int64_t balanced_rows(int64_t all, int64_t fit, int64_t units, int64_t threads) {
  fit = std::min(std::max<int64_t>(fit, 1), all);
  int64_t parts = (all + fit - 1) / fit;
  while (units * parts < 4 * threads && units * parts % threads && parts < all) ++parts;
  return (all + parts - 1) / parts;
}

// Filters are packed in blocks of so many; see `pack_weight`.
constexpr int64_t kFilterBlock = 16;

// The block of the packed weight that begins with this filter of a head. T may be const.
template <typename T>
T* filter_block(const ConvDesc& n, T* packed, int64_t head, int64_t filter) {
  return packed + (head * n.filters + filter) * n.channels * n.taps();
}

// The layout of some rows of a channel: its phases one after another, each with the padding that its taps read. Outputs
// of a row have the same pitch as pixels, so that all rows form one long line, on which a tap is an offset. The padding
// at the end of a row is also the padding at the start of the next.
struct InputPacking {
  std::vector<std::pair<int64_t, int64_t>> phases;  // vertical and horizontal
  std::vector<int64_t> offsets;                     // of taps
  int64_t rows;                                     // of the output
  int64_t pitch;                                    // values from one row to the next
  int64_t phase_size, plane;                        // values of a phase, and of all phases: one channel
  bool has_padding;                                 // whether `pack` leaves values out, which have to be zero

  InputPacking(const ConvDesc& n, int64_t rows) : rows(rows) {
    const int64_t columns = n.x.out + n.x.max_shift();
    int64_t shared = columns;
    for (int64_t j = 0; j < n.x.taps; ++j) {
      const int64_t phase = n.x.phase(j);
      shared = std::min({shared, n.x.first(phase), std::max<int64_t>(columns - n.x.last(phase), 0)});
    }
    shared = std::min(shared, columns - 1);
    pitch = columns - shared;
    phase_size = (rows + n.y.max_shift()) * pitch + shared;
    for (int64_t i = 0; i < n.y.taps; ++i) {
      for (int64_t j = 0; j < n.x.taps; ++j) {
        const std::pair<int64_t, int64_t> phase(n.y.phase(i), n.x.phase(j));
        const auto known = std::find(phases.begin(), phases.end(), phase);
        offsets.push_back((known - phases.begin()) * phase_size + n.y.shift(i) * pitch + n.x.shift(j));
        if (known == phases.end()) phases.push_back(phase);
      }
    }
    plane = phase_size * int64_t(phases.size());
    has_padding = n.taps() > 1 || n.y.padding > 0 || n.x.padding > 0;
  }

  // Values from the first output of so many rows to the last.
  int64_t line(const ConvDesc& n, int64_t rows) const { return (rows - 1) * pitch + n.x.out; }

  // Rows of the output for which so many channels of input fit into `bytes`; fewer if threads would idle.
  static int64_t fitting_rows(
      const ConvDesc& n, int64_t bytes, int64_t channels, int64_t value_size, int64_t units, int64_t threads) {
    const InputPacking one(n, 1);
    const int64_t line = std::max<int64_t>(channels, 1) * int64_t(one.phases.size()) * one.pitch * value_size;
    return balanced_rows(n.y.out, bytes / line - n.y.max_shift(), units, threads);
  }

  // Copies the pixels of channel x that outputs of rows [row, row + count) read, each as `transform` makes it. `to`
  // must hold zeros, or what was packed before for the same rows.
  template <typename S, typename T, typename Transform>
  void pack(
      const ConvDesc& n, int64_t row, int64_t count, const S* __restrict__ x, T* __restrict__ to,
      Transform transform) const {
    for (size_t i = 0; i < phases.size(); ++i) {
      const auto [a, b] = phases[i];
      const int64_t left = std::min(n.x.first(b), pitch), width = std::min(n.x.last(b), pitch) - left;
      const int64_t top = std::max(row, n.y.first(a)), bottom = std::min(row + count + n.y.max_shift(), n.y.last(a));
      if (top >= bottom || width <= 0) continue;
      T* out = to + int64_t(i) * phase_size + (top - row) * pitch + left;
      const S* from = x + n.y.pixel(top, a) * n.x.size + n.x.pixel(left, b);
      for (int64_t r = top; r < bottom; ++r, out += pitch, from += n.y.stride * n.x.size) {
        // Written out, because compilers vectorize loops of constant stride only.
        if (n.x.stride == 1) {
          for (int64_t j = 0; j < width; ++j) out[j] = transform(T(from[j]));
        } else if (n.x.stride == 2) {
          for (int64_t j = 0; j < width; ++j) out[j] = transform(T(from[2 * j]));
        } else {
          for (int64_t j = 0; j < width; ++j) out[j] = transform(T(from[j * n.x.stride]));
        }
      }
    }
  }
};

}  // namespace dgc
