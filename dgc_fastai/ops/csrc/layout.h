// Shapes, and how channels lie side by side so that every tap of a filter reads whole vectors of pixels.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"

namespace dgc {

// One of the two axes of a convolution.
//
// With a stride, taps see every so-manieth pixel only. Which ones is a tap's phase, and within its phase it is shifted
// by whole pixels, as all taps are where the stride is one. Positions of a phase count from the border's first pixel.
struct Axis {
  int64_t size, out, taps, stride, padding, dilation;

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t reach() const { return shift(taps - 1); }
  int64_t pixel(int64_t position, int64_t phase) const { return position * stride + phase - padding; }
  // A phase's positions in the image are those from first to last, without last.
  int64_t first(int64_t phase) const { return phase >= padding ? 0 : (padding - phase + stride - 1) / stride; }
  int64_t last(int64_t phase) const {
    const int64_t end = padding + size - phase;
    return end <= 0 ? 0 : (end + stride - 1) / stride;
  }
};

struct Shape {
  int64_t batch, heads, channels, filters;  // filters of one head
  Axis y, x;

  int64_t taps() const { return y.taps * x.taps; }
  int64_t area() const { return y.size * x.size; }
  int64_t out_area() const { return y.out * x.out; }
};

constexpr int64_t kPacked = 128 * 1024;  // bytes of packed pixels: a part of a cache of the second level
constexpr int64_t kNear = 20 * 1024;     // bytes that one pass reads again and again: of the first level


// Rows to take at a time of all there are, at most `fit` of them and about as many each time; fewer if threads would idle
// with so many units to share.
inline int64_t even_rows(int64_t all, int64_t fit, int64_t units, int64_t threads) {
  fit = std::min(std::max<int64_t>(fit, 1), all);
  int64_t parts = (all + fit - 1) / fit;
  while (units * parts < 4 * threads && units * parts % threads && parts < all) ++parts;
  return (all + parts - 1) / parts;
}

// Filters are stored as a table [heads, blocks, channels, taps, 16]: a line of the cache is what 16 filters have for a
// tap. The last block is narrower where 16 does not divide a head's filters.
constexpr int64_t kBlock = 16;

template <typename T>
const T* block_of(const Shape& n, const T* table, int64_t head, int64_t filter) {
  return table + (head * n.filters + filter) * n.channels * n.taps();
}

// The largest number of channels that a head keeps.
template <typename T>
int64_t most_kept(const Shape& n, const T* gates) {
  int64_t most = 0;
  for (int64_t i = 0; i < n.batch * n.heads; ++i, gates += n.channels) {
    most = std::max<int64_t>(most, n.channels - std::count(gates, gates + n.channels, T(0)));
  }
  return most;
}

template <typename T>
void list_kept(const Shape& n, const T* gates, std::vector<int64_t>& kept) {
  kept.clear();
  for (int64_t c = 0; c < n.channels; ++c) {
    if (gates[c] != T(0)) kept.push_back(c);
  }
}

// Some rows of a channel, its phases one after another, each with the border of zeros that its taps see. Results of a
// row are as far apart as its pixels are, so that the rows form one long line on which a tap is an offset. The
// border at the end of a row serves as the border at the start of the next.
struct Packing {
  std::vector<std::pair<int64_t, int64_t>> phases;
  std::vector<int64_t> offsets;  // of taps
  int64_t rows, pitch, shared, phase_size, plane;
  bool bordered;  // whether `copy` leaves something out that has to be zero

  // For so many rows of the result at a time.
  Packing(const Shape& n, int64_t rows) : rows(rows) {
    const int64_t columns = n.x.out + n.x.reach();
    shared = columns;
    for (int64_t j = 0; j < n.x.taps; ++j) {
      const int64_t phase = n.x.phase(j);
      shared = std::min({shared, n.x.first(phase), std::max<int64_t>(columns - n.x.last(phase), 0)});
    }
    shared = std::min(shared, columns - 1);
    pitch = columns - shared;
    phase_size = (rows + n.y.reach()) * pitch + shared;
    for (int64_t i = 0; i < n.y.taps; ++i) {
      for (int64_t j = 0; j < n.x.taps; ++j) {
        const std::pair<int64_t, int64_t> phase(n.y.phase(i), n.x.phase(j));
        const auto known = std::find(phases.begin(), phases.end(), phase);
        offsets.push_back((known - phases.begin()) * phase_size + n.y.shift(i) * pitch + n.x.shift(j));
        if (known == phases.end()) phases.push_back(phase);
      }
    }
    plane = phase_size * phases.size();
    bordered = n.taps() > 1 || n.y.padding > 0 || n.x.padding > 0;
  }

  // Results of so many rows, with what lies between them.
  int64_t line(const Shape& n, int64_t rows) const { return (rows - 1) * pitch + n.x.out; }

  // Rows of the result whose inputs, so many channels of them, fit into so many bytes; fewer if threads would idle.
  static int64_t fitting_rows(
      const Shape& n, int64_t room, int64_t channels, int64_t value_size, int64_t units, int64_t threads) {
    const Packing one(n, 1);
    const int64_t line = std::max<int64_t>(channels, 1) * one.phases.size() * one.pitch * value_size;
    return even_rows(n.y.out, room / line - n.y.reach(), units, threads);
  }

  // Copies what results of rows [row, row + count) need of a channel x to where all is zero, or was copied before for
  // the same rows.
  template <typename S, typename T, typename Value>
  void copy(const Shape& n, int64_t row, int64_t count, const S* __restrict__ x, T* __restrict__ to, Value value) const {
    for (size_t i = 0; i < phases.size(); ++i) {
      const auto [a, b] = phases[i];
      const int64_t left = std::min(n.x.first(b), pitch), width = std::min(n.x.last(b), pitch) - left;
      const int64_t top = std::max(row, n.y.first(a)), bottom = std::min(row + count + n.y.reach(), n.y.last(a));
      T* out = to + i * phase_size + (top - row) * pitch + left;
      const S* from = x + n.y.pixel(top, a) * n.x.size + n.x.pixel(left, b);
      for (int64_t r = top; r < bottom; ++r, out += pitch, from += n.y.stride * n.x.size) {
        // Written out, because compilers make vectors of strides they know only.
        if (n.x.stride == 1) {
          for (int64_t j = 0; j < width; ++j) out[j] = value(T(from[j]));
        } else if (n.x.stride == 2) {
          for (int64_t j = 0; j < width; ++j) out[j] = value(T(from[2 * j]));
        } else {
          for (int64_t j = 0; j < width; ++j) out[j] = value(T(from[j * n.x.stride]));
        }
      }
    }
  }
};

}  // namespace dgc
