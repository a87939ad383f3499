// SIMD vectors of the processor that the kernel is compiled for, by the extension that GCC and Clang share.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dgc {

// A register tile is up to kMaxRows rows of up to three vectors.
#if defined(__AVX512F__) || defined(DGC_WIDE_VECTORS)  // the latter for tests, on any processor
constexpr int kVectorBytes = 64, kMaxRows = 8;         // 24 of 32 registers accumulate
#else
constexpr int kVectorBytes = 32, kMaxRows = 4;  // 12 of 16 registers
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t size = kVectorBytes / sizeof(T);
};

template <typename T>
inline typename Vector<T>::type load(const T* from) {
  typename Vector<T>::type v;
  std::memcpy(&v, from, sizeof(v));  // need not be aligned
  return v;
}

template <typename T>
inline void store(T* to, typename Vector<T>::type v) {
  std::memcpy(to, &v, sizeof(v));
}

// As torch.relu, NaN stays NaN.
inline float relu(float v) { return v < 0 ? 0 : v; }
inline double relu(double v) { return v < 0 ? 0 : v; }

template <typename V>
inline V relu(V v) {
  return v < 0 ? V{} : v;
}

// Vectors that hold so many values.
template <typename T>
constexpr int64_t vectors_for(int64_t values) {
  return (values + Vector<T>::size - 1) / Vector<T>::size;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls tile(first, Constant<count>) for tiles that cover [0, vectors): three vectors at a time. Four are taken as two
// and two, since a tile of a single vector has too few sums to keep both multipliers busy.
template <typename Tile>
inline void for_vector_tiles(int64_t vectors, Tile tile) {
  for (int64_t first = 0; first < vectors;) {
    const int64_t left = vectors - first;
    if (left == 1) {
      tile(first, Constant<1>());
      first += 1;
    } else if (left == 2 || left == 4) {
      tile(first, Constant<2>());
      first += 2;
    } else {
      tile(first, Constant<3>());
      first += 3;
    }
  }
}

// Calls tile(first, Constant<count>) for tiles that cover [0, rows): kMaxRows at a time, then four, two, one.
template <typename Tile>
inline void for_row_tiles(int64_t rows, Tile tile) {
  int64_t r = 0;
  for (; r + kMaxRows <= rows; r += kMaxRows) tile(r, Constant<kMaxRows>());
  for (; r + 4 <= rows; r += 4) tile(r, Constant<4>());
  for (; r + 2 <= rows; r += 2) tile(r, Constant<2>());
  for (; r < rows; ++r) tile(r, Constant<1>());
}

}  // namespace dgc
