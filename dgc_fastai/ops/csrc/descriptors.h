// What the entry points of kernel.cpp are given. ops/kernel.py declares the same structures in Python, and compares the
// names and offsets of all fields with `describe_structures` when it loads the library.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dgc {

// One of the two axes of a convolution.
//
// With a stride, a tap reads every stride-th pixel only, starting with pixel tap * dilation. The remainder of that is
// the tap's phase: taps of one phase read the same pixels, shifted by whole positions. Positions of a phase count from
// the first pixel of the padding.
struct Axis {
  int64_t size;      // pixels of the input
  int64_t out;       // pixels of the output
  int64_t taps;      // size of a filter
  int64_t stride;    // input pixels from one output to the next
  int64_t padding;   // zeros at either end of the input
  int64_t dilation;  // input pixels from one tap to the next

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  // Position, relative to that of the output, which a tap reads.
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t max_shift() const { return shift(taps - 1); }
  int64_t pixel(int64_t position, int64_t phase) const { return position * stride + phase - padding; }
  // The positions of a phase that lie in the image, rather than in its padding, are [first, last).
  int64_t first(int64_t phase) const { return phase >= padding ? 0 : (padding - phase + stride - 1) / stride; }
  int64_t last(int64_t phase) const {
    const int64_t end = padding + size - phase;
    return end <= 0 ? 0 : (end + stride - 1) / stride;
  }
};

// The geometry of a convolution: x [batch, in_channels, y.size, x.size], y [batch, heads * filters, y.out, x.out].
struct ConvDesc {
  int64_t batch;
  int64_t heads;     // of a DGC layer, or groups of an ordinary convolution
  int64_t channels;  // input channels that one head can read
  int64_t filters;   // output channels of one head
  int64_t grouped;   // 1: each head reads channels of its own, and its outputs lie side by side.
                     // 0: all heads read the same channels, and their outputs are interleaved.
  Axis y, x;         // vertical and horizontal

  int64_t taps() const { return y.taps * x.taps; }
  int64_t area() const { return y.size * x.size; }
  int64_t out_area() const { return y.out * x.out; }
  int64_t in_channels() const { return grouped ? heads * channels : channels; }
  int64_t out_channels() const { return heads * filters; }
};

// The parameters of a layer, all contiguous. T is the type that sums are accumulated in. What is optional may be null.
template <typename T>
struct PackedLayer {
  const T* weight;           // see `pack_weight`
  const T* winograd_weight;  // optional; see `pack_winograd_weight`
  const T* bias;             // optional [out_channels]
  const T* scale;            // optional [channels]: the convolution reads relu(x * scale + shift) instead of x
  const T* shift;            // with scale
  const T* squeeze;          // [heads, hidden, channels]; this and the rest are for `gated_layer` only
  const T* excite;           // [heads, hidden, channels / granularity]
  const T* gate_bias;        // [heads, channels / granularity]
  const int64_t* inactive;   // how many channels each head drops; one number
  int64_t hidden;            // hidden units of the gates of a head
  int64_t granularity;       // how many neighboring channels, a block, share a gate
  int64_t relu;              // 1: y = relu(y), before a residual is added
};

// The tensors of one forward pass. S is the type of images. Samples of x and y are contiguous, but may lie any number
// of values apart.
template <typename S, typename T>
struct ForwardArgs {
  const S* x;
  int64_t x_stride;   // values from one sample of x to the next
  const T* gates;     // [batch, heads, channels] for `gated_conv2d`
  const S* residual;  // optional, contiguous, as y: y = relu(y + residual)
  S* y;
  int64_t y_stride;
};

// The tensors of a backward pass, all contiguous; grad_x is the gradient of x, and so on. Each function writes the
// gradients that its comment names, and needs no others.
template <typename T>
struct BackwardArgs {
  const T* grad_y;
  const T* x;
  const T* gates;  // [batch, heads, channels], unless the convolution is grouped
  T* grad_x;       // zeros
  T* grad_gates;   // zeros, with gates
  T* grad_weight;  // [out_channels, channels, taps]
  T* scratch;      // see `backward_weight` and `backward_pointwise`
};

template <typename S, typename T>
struct PackArgs {
  const S* weight;  // [out_channels, channels, taps]
  T* packed;
};

// One line for each structure: its name, size, and the offset and size of each field, in bytes.
inline const std::string& describe_structures() {
  using Layer = PackedLayer<float>;
  using Forward = ForwardArgs<float, float>;
  using Backward = BackwardArgs<float>;
  using Pack = PackArgs<float, float>;
#define DGC_FIELD(Struct, field) \
  (" " #field "=" + std::to_string(offsetof(Struct, field)) + "+" + std::to_string(sizeof(Struct::field)))
#define DGC_STRUCT(Struct, name) (std::string(name) + " " + std::to_string(sizeof(Struct)))
  static const std::string text =
      DGC_STRUCT(Axis, "Axis") + DGC_FIELD(Axis, size) + DGC_FIELD(Axis, out) + DGC_FIELD(Axis, taps) +
      DGC_FIELD(Axis, stride) + DGC_FIELD(Axis, padding) + DGC_FIELD(Axis, dilation) + "\n" +
      DGC_STRUCT(ConvDesc, "ConvDesc") + DGC_FIELD(ConvDesc, batch) + DGC_FIELD(ConvDesc, heads) +
      DGC_FIELD(ConvDesc, channels) + DGC_FIELD(ConvDesc, filters) + DGC_FIELD(ConvDesc, grouped) +
      DGC_FIELD(ConvDesc, y) + DGC_FIELD(ConvDesc, x) + "\n" + DGC_STRUCT(Layer, "PackedLayer") +
      DGC_FIELD(Layer, weight) + DGC_FIELD(Layer, winograd_weight) + DGC_FIELD(Layer, bias) + DGC_FIELD(Layer, scale) +
      DGC_FIELD(Layer, shift) + DGC_FIELD(Layer, squeeze) + DGC_FIELD(Layer, excite) + DGC_FIELD(Layer, gate_bias) +
      DGC_FIELD(Layer, inactive) + DGC_FIELD(Layer, hidden) + DGC_FIELD(Layer, granularity) + DGC_FIELD(Layer, relu) +
      "\n" + DGC_STRUCT(Forward, "ForwardArgs") + DGC_FIELD(Forward, x) + DGC_FIELD(Forward, x_stride) +
      DGC_FIELD(Forward, gates) + DGC_FIELD(Forward, residual) + DGC_FIELD(Forward, y) + DGC_FIELD(Forward, y_stride) +
      "\n" + DGC_STRUCT(Backward, "BackwardArgs") + DGC_FIELD(Backward, grad_y) + DGC_FIELD(Backward, x) +
      DGC_FIELD(Backward, gates) + DGC_FIELD(Backward, grad_x) + DGC_FIELD(Backward, grad_gates) +
      DGC_FIELD(Backward, grad_weight) + DGC_FIELD(Backward, scratch) + "\n" + DGC_STRUCT(Pack, "PackArgs") +
      DGC_FIELD(Pack, weight) + DGC_FIELD(Pack, packed) + "\n";
#undef DGC_STRUCT
#undef DGC_FIELD
  return text;
}

}  // namespace dgc
