// Direct convolution, for filters of any size. Per sample and head the kept channels are packed side by side, scaled by
// their gates; then tiles of outputs accumulate in registers over kept channels and taps.

#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "heads.h"
#include "input_packing.h"

namespace dgc {

// sums[r][:] += filters[r] * pixels, over kept channels and taps, for ROWS filters and VECTORS vectors of neighboring
// outputs. Starts with bias[r] if this is the `first` call for these sums, and applies ReLU if `apply_relu`.
template <typename T, int ROWS, int VECTORS>
inline void micro_kernel(
    const T* pixels, int64_t plane, const std::vector<int64_t>& offsets, const int64_t* kept, int64_t count,
    const T* filters, int64_t width, bool first, bool apply_relu, const T* bias, T* sums, int64_t pitch) {
  using V = typename Vector<T>::type;
  constexpr int64_t kSize = Vector<T>::size;
  const int64_t taps = offsets.size();
  const int64_t* offset = offsets.data();
  V results[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) results[r][v] = first ? V{} + bias[r] : load(sums + r * pitch + v * kSize);
  }
  const auto multiply_add = [&](const T* from, const T* factors) {
    V values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load(from + v * kSize);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = factors[r];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) results[r][v] += factor * values[v];
    }
  };
  if (taps == 1) {  // a loop of one iteration would cost as much as its body
    for (int64_t s = 0; s < count; ++s, pixels += plane) multiply_add(pixels, filters + kept[s] * width);
  } else {
    for (int64_t s = 0; s < count; ++s, pixels += plane) {
      const T* factors = filters + kept[s] * taps * width;
#pragma GCC unroll 3  // worth 3 % for 3x3 filters
      for (int64_t t = 0; t < taps; ++t, factors += width) multiply_add(pixels + offset[t], factors);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      V result = results[r][v];
      if (apply_relu) result = relu(result);
      store(sums + r * pitch + v * kSize, result);
    }
  }
}

// How many kept channels the micro kernel takes at a time, so that what it reads stays in the first-level cache.
// `lines` is the number of rows of pixels per channel.
template <typename T>
inline int64_t channels_in_l1(int64_t taps, int64_t width, int64_t lines) {
  const int64_t values = taps * width + lines * 4 * Vector<T>::size;
  return std::max<int64_t>(kL1Bytes / int64_t(sizeof(T)) / values, 1);
}

// y = relu(y + residual)
template <typename S, typename T>
inline void add_residual(const S* __restrict__ residual, int64_t count, S* __restrict__ y) {
  for (int64_t p = 0; p < count; ++p) y[p] = S(relu(T(y[p]) + T(residual[p])));
}

// to = transform(from). Where a convolution reads each pixel at the place of its output, the rows of a channel lie side
// by side, before and after; in an image of one tile, so do neighboring channels.
template <typename S, typename T, typename Transform>
inline void pack_line(const S* __restrict__ from, int64_t count, T* __restrict__ to, Transform transform) {
  for (int64_t p = 0; p < count; ++p) to[p] = transform(T(from[p]));
}

// Calls pack(transform) with what makes an input of the convolution of a pixel: normalization and ReLU, if the layer
// has them, and the gate.
template <typename T, typename Pack>
inline void with_input_transform(const PackedLayer<T>& layer, int64_t channel, T gate, Pack pack) {
  if (layer.scale == nullptr) {
    pack([gate](auto v) { return v * gate; });
  } else {
    const T scale = layer.scale[channel], shift = layer.shift[channel];
    pack([=](auto v) { return relu(v * scale + shift) * gate; });
  }
}

template <typename S, typename T, typename Heads>
struct DirectConv {
  static constexpr int64_t kSize = Vector<T>::size;
  const ConvDesc& n;
  const PackedLayer<T>& layer;
  const ForwardArgs<S, T>& args;
  const Heads heads;
  const int64_t max_kept, rows, tiles;
  const InputPacking packing;
  const bool in_place;  // whether rows of sums are as far apart as rows of y, so that most can be accumulated there
  const bool in_lines;  // whether each output reads the one pixel at its own place; see `pack_line`

  struct Workspace {
    std::vector<int64_t> kept;
    std::unique_ptr<T[]> pixels, sums;  // not initialized
    int64_t pixels_size, pitch;         // values of pixels, and of the sums of a filter
  };
  // Outputs of rows [row, row + height) of one head and sample.
  struct Tile {
    int64_t b, h, row, height;
  };

  DirectConv(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args, const Heads& heads)
      : n(n),
        layer(layer),
        args(args),
        heads(heads),
        max_kept(heads.max_kept()),
        rows(InputPacking::fitting_rows(n, kL2Bytes, max_kept, sizeof(T), n.batch * n.heads, at::get_num_threads())),
        tiles((n.y.out + rows - 1) / rows),
        packing(n, rows),
        in_place(std::is_same<S, T>::value && packing.pitch == n.x.out),
        in_lines(!packing.has_padding && n.y.stride == 1 && n.x.stride == 1) {}

  void run() const {
    at::parallel_for(0, n.batch * n.heads * tiles, 1, [&](int64_t begin, int64_t end) {
      Workspace work;
      work.pixels_size = max_kept * packing.plane + 4 * kSize;
      work.pitch = vectors_for<T>(packing.line(n, rows)) * kSize;
      work.pixels.reset(new T[work.pixels_size]);
      work.sums.reset(new T[kFilterBlock * work.pitch]);
      int64_t unit_before = -1, row_before = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / tiles, row = i % tiles * rows;
        const Tile tile{unit / n.heads, unit % n.heads, row, std::min(rows, n.y.out - row)};
        if (unit != unit_before) heads.list_kept(tile.b, tile.h, 0, n.channels, work.kept);
        if (row != row_before && packing.has_padding) std::fill_n(work.pixels.get(), work.pixels_size, T(0));
        unit_before = unit;
        row_before = row;
        pack_input(tile, work);
        for (int64_t f = 0; f < n.filters; f += kFilterBlock) convolve_block(tile, f, work);
      }
    });
  }

  void pack_input(const Tile& tile, Workspace& work) const {
    const int64_t values = tile.height * n.x.out;
    const bool by_block = in_lines && values == n.area() && layer.scale == nullptr;
    for (int64_t s = 0, some; s < int64_t(work.kept.size()); s += some) {
      some = by_block ? count_equal(tile, work.kept, s) : 1;
      const int64_t c = work.kept[s];
      const S* from = args.x + tile.b * args.x_stride + heads.input(tile.h, c) * n.area();
      T* to = work.pixels.get() + s * packing.plane;
      with_input_transform(layer, c, heads.gate(tile.b, tile.h, c), [&](auto transform) {
        if (in_lines) {
          pack_line(from + tile.row * n.x.size, some * values, to, transform);
        } else {
          packing.pack(n, tile.row, tile.height, from, to, transform);
        }
      });
    }
  }

  // How many kept channels from kept[s] on are neighbors with the same gate, such as those of a block.
  int64_t count_equal(const Tile& tile, const std::vector<int64_t>& kept, int64_t s) const {
    const T gate = heads.gate(tile.b, tile.h, kept[s]);
    int64_t count = 1;
    for (; s + count < int64_t(kept.size()); ++count) {
      const int64_t c = kept[s + count];
      if (c != kept[s] + count || heads.gate(tile.b, tile.h, c) != gate) break;
    }
    return count;
  }

  // y of the block of filters that begins with f.
  void convolve_block(const Tile& tile, int64_t f, Workspace& work) const {
    const int64_t width = std::min(kFilterBlock, n.filters - f), line = packing.line(n, tile.height);
    const int64_t output = heads.output(tile.h, f), step = heads.output_step(), count = work.kept.size();
    const int64_t offset = output * n.out_area() + tile.row * n.x.out, filter_stride = step * n.out_area();
    S* y = args.y + tile.b * args.y_stride + offset;
    const T* filters = filter_block(n, layer.weight, tile.h, f);
    T bias[kFilterBlock];
    for (int64_t j = 0; j < width; ++j) bias[j] = layer.bias == nullptr ? T(0) : layer.bias[output + j * step];
    const bool apply_relu = layer.relu != 0;
    const int64_t whole = in_place ? line / kSize * kSize : 0;  // outputs that fill whole vectors
    const int64_t channels = channels_in_l1<T>(n.taps(), width, n.y.taps);
    for (int64_t s = 0; s == 0 || s < count; s += channels) {
      const int64_t some = std::min(channels, count - s);
      const bool first = s == 0, last = s + some == count;
      const auto accumulate = [&](int64_t p, auto vectors, bool to_y) {
        for_row_tiles(width, [&](int64_t r, auto size) {
          T* to = work.sums.get() + r * work.pitch + p;
          int64_t pitch = work.pitch;
          if constexpr (std::is_same<S, T>::value) {
            if (to_y) {
              to = y + r * filter_stride + p;
              pitch = filter_stride;
            }
          }
          micro_kernel<T, decltype(size)::value, decltype(vectors)::value>(
              work.pixels.get() + s * packing.plane + p, packing.plane, packing.offsets, work.kept.data() + s, some,
              filters + r, width, first, apply_relu && last, bias + r, to, pitch);
        });
      };
      for_vector_tiles(whole / kSize, [&](int64_t at, auto vectors) { accumulate(at * kSize, vectors, true); });
      for_vector_tiles(vectors_for<T>(line - whole), [&](int64_t at, auto vectors) {
        accumulate(whole + at * kSize, vectors, false);
      });
    }
    for (int64_t j = 0; j < width; ++j) {
      store_output(work.sums.get() + j * work.pitch, tile.height, whole, line, y + j * filter_stride);
      if (args.residual != nullptr) {
        const S* residual = args.residual + tile.b * n.out_channels() * n.out_area() + offset + j * filter_stride;
        add_residual<S, T>(residual, tile.height * n.x.out, y + j * filter_stride);
      }
    }
  }

  // The sums of one filter, without what lies between their rows; y already has the first `whole` of them.
  void store_output(const T* sums, int64_t height, int64_t whole, int64_t line, S* y) const {
    if (in_place) {
      for (int64_t p = whole; p < line; ++p) y[p] = S(sums[p]);
      return;
    }
    for (int64_t r = 0; r < height; ++r, sums += packing.pitch) {
      for (int64_t q = 0; q < n.x.out; ++q) y[r * n.x.out + q] = S(sums[q]);
    }
  }
};

// The convolution of a DGC layer with gates that are given.
template <typename S, typename T>
void gated_conv2d(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args) {
  if (n.batch == 0) return;
  DirectConv<S, T, GatedHeads<T>>(n, layer, args, {n, args.gates}).run();
}

// An ordinary group convolution.
template <typename S, typename T>
void group_conv2d(const ConvDesc& n, const PackedLayer<T>& layer, const ForwardArgs<S, T>& args) {
  if (n.batch == 0) return;
  DirectConv<S, T, Groups<T>>(n, layer, args, {n}).run();
}

}  // namespace dgc
