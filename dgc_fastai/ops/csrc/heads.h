// Which channels the heads of a convolution read, and where their outputs are.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "descriptors.h"

namespace dgc {

// The heads of a DGC layer: all read the same channels, scaled by gates of their own for each sample; a gate of zero
// drops its channel. Their outputs are interleaved.
template <typename T>
struct GatedHeads {
  static constexpr bool kGated = true;
  const ConvDesc& n;
  const T* gates;  // [batch, heads, channels]

  T gate(int64_t b, int64_t h, int64_t c) const { return gates[(b * n.heads + h) * n.channels + c]; }
  // Where channel c of head h is among the channels of x, and filter f of head h among those of y and of the weight.
  int64_t input(int64_t, int64_t c) const { return c; }
  int64_t output(int64_t h, int64_t f) const { return f * n.heads + h; }
  int64_t output_step() const { return n.heads; }

  // The channels of [from, to) that head h keeps for sample b.
  void list_kept(int64_t b, int64_t h, int64_t from, int64_t to, std::vector<int64_t>& kept) const {
    const T* row = gates + (b * n.heads + h) * n.channels;
    kept.clear();
    for (int64_t c = from; c < to; ++c) {
      if (row[c] != T(0)) kept.push_back(c);
    }
  }

  // The largest number of channels that any head keeps for any sample.
  int64_t max_kept() const {
    int64_t most = 0;
    const T* row = gates;
    for (int64_t i = 0; i < n.batch * n.heads; ++i, row += n.channels) {
      most = std::max<int64_t>(most, n.channels - std::count(row, row + n.channels, T(0)));
    }
    return most;
  }
};

// The groups of an ordinary convolution: each reads all of its own channels, and its outputs lie side by side.
template <typename T>
struct Groups {
  static constexpr bool kGated = false;
  const ConvDesc& n;

  T gate(int64_t, int64_t, int64_t) const { return T(1); }
  int64_t input(int64_t h, int64_t c) const { return h * n.channels + c; }
  int64_t output(int64_t h, int64_t f) const { return h * n.filters + f; }
  int64_t output_step() const { return 1; }

  void list_kept(int64_t, int64_t, int64_t from, int64_t to, std::vector<int64_t>& kept) const {
    kept.resize(to - from);
    std::iota(kept.begin(), kept.end(), from);
  }
  int64_t max_kept() const { return n.channels; }
};

}  // namespace dgc
