// Vectors of the processor that the kernel is compiled for, by the extension that GCC and Clang share.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dgc {

#if defined(__AVX512F__) || defined(DGC_WIDE_VECTORS)  // the latter to test it on any processor
constexpr int kBytes = 64, kRows = 8;  // of 32 registers, 3 x 8 hold results
#else
constexpr int kBytes = 32, kRows = 4;  // of 16 registers, 3 x 4
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
  static constexpr int64_t size = kBytes / sizeof(T);
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

inline float rectified(float v) { return v < 0 ? 0 : v; }  // NaN stays, here and below
inline double rectified(double v) { return v < 0 ? 0 : v; }

template <typename V>
inline V rectified(V v) {
  return v < 0 ? V{} : v;
}

template <typename T>
constexpr int64_t vectors_for(int64_t values) {
  return (values + Vector<T>::size - 1) / Vector<T>::size;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls tile(at, Constant<vectors>) for so many vectors side by side, three at a time; four are two and two, since a
// single one leaves too few sums to keep both multipliers busy.
template <typename Tile>
inline void in_threes(int64_t vectors, Tile tile) {
  for (int64_t at = 0; at < vectors;) {
    const int64_t left = vectors - at;
    if (left == 1) {
      tile(at, Constant<1>());
      at += 1;
    } else if (left == 2 || left == 4) {
      tile(at, Constant<2>());
      at += 2;
    } else {
      tile(at, Constant<3>());
      at += 3;
    }
  }
}

// Calls some(at, Constant<rows>) for so many rows, kRows at a time as long as there are as many.
template <typename Some>
inline void in_rows(int64_t rows, Some some) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) some(r, Constant<kRows>());
  for (; r + 4 <= rows; r += 4) some(r, Constant<4>());
  for (; r + 2 <= rows; r += 2) some(r, Constant<2>());
  for (; r < rows; ++r) some(r, Constant<1>());
}

}  // namespace dgc
