// The entry points of the kernel. In the forward and backward passes of a DGC layer, all loops run over the channels
// that a sample and head keep, and over no others. Built by ops/build.py, declared in Python by ops/kernel.py.
//
// Tensors are contiguous unless descriptors.h says otherwise. S is the type of images, T that of parameters and sums.

#include <c10/util/BFloat16.h>

#include "backward.h"
#include "backward_pointwise.h"
#include "forward.h"
#include "gates.h"
#include "pack_weight.h"
#include "stem.h"
#include "winograd.h"

namespace {

// A whole DGC layer in inference: normalization, gates, selection, convolution, bias, residual, ReLU.
template <typename S, typename T>
void gated_layer(const dgc::ConvDesc& n, const dgc::PackedLayer<T>& layer, dgc::ForwardArgs<S, T> args) {
  std::vector<T> gates(n.batch * n.heads * n.channels);
  dgc::compute_gates<S, T>(n, layer, args, gates.data());
  args.gates = gates.data();
  // Winograd's tiles are four rows high: with one or two rows, more would be computed than is saved.
  const bool winograd = layer.winograd_weight != nullptr && n.y.out > 2;
  winograd ? dgc::winograd_conv2d<S, T>(n, layer, args) : dgc::gated_conv2d<S, T>(n, layer, args);
}

}  // namespace

#define DGC_PACK(name, S, T, SUFFIX)                                                               \
  extern "C" void dgc_##name##_##SUFFIX(const dgc::ConvDesc* n, const dgc::PackArgs<S, T>* args) { \
    dgc::name<S, T>(*n, *args);                                                                    \
  }
#define DGC_FORWARD(name, function, S, T, SUFFIX)                                                     \
  extern "C" void dgc_##name##_##SUFFIX(                                                              \
      const dgc::ConvDesc* n, const dgc::PackedLayer<T>* layer, const dgc::ForwardArgs<S, T>* args) { \
    function<S, T>(*n, *layer, *args);                                                                \
  }
#define DGC_BACKWARD(name, T, SUFFIX)                                                               \
  extern "C" void dgc_##name##_##SUFFIX(                                                            \
      const dgc::ConvDesc* n, const dgc::PackedLayer<T>* layer, const dgc::BackwardArgs<T>* args) { \
    dgc::name<T>(*n, *layer, *args);                                                                \
  }

#define DGC_INFERENCE(S, T, SUFFIX)                          \
  DGC_PACK(pack_weight, S, T, SUFFIX)                        \
  DGC_PACK(pack_winograd_weight, S, T, SUFFIX)               \
  DGC_FORWARD(gated_conv2d, dgc::gated_conv2d, S, T, SUFFIX) \
  DGC_FORWARD(gated_layer, gated_layer, S, T, SUFFIX)        \
  DGC_FORWARD(group_conv2d, dgc::group_conv2d, S, T, SUFFIX) \
  DGC_FORWARD(stem, dgc::stem, S, T, SUFFIX)

#define DGC_TRAINING(T, SUFFIX)                                                     \
  DGC_BACKWARD(backward_input, T, SUFFIX)                                           \
  DGC_BACKWARD(backward_weight, T, SUFFIX)                                          \
  DGC_BACKWARD(backward_pointwise, T, SUFFIX)                                       \
  extern "C" int64_t dgc_backward_weight_scratch_##SUFFIX(const dgc::ConvDesc* n) { \
    return dgc::backward_weight_scratch<T>(*n);                                     \
  }

DGC_INFERENCE(float, float, float32)
DGC_INFERENCE(double, double, float64)
DGC_INFERENCE(c10::BFloat16, float, bfloat16)
DGC_TRAINING(float, float32)
DGC_TRAINING(double, float64)

extern "C" const char* dgc_describe_structures() { return dgc::describe_structures().c_str(); }
