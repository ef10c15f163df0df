// What every kernel file shares: element types and the step from a runtime DType to a C++ type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vit.h"

namespace vit::VIT_ISA {

#define VIT_INLINE inline __attribute__((always_inline))

struct bf16 {  // bfloat16: the upper half of a float
  uint16_t bits;
};

template <class T>
struct Traits {
  using acc = float;
};
template <>
struct Traits<double> {
  using acc = double;
};

// The accumulator type of an element type: double for double, else float.
template <class T>
using Acc = typename Traits<T>::acc;

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
inline constexpr bool same = Same<A, B>::value;

// Not std::min and std::max: see kernels.h.
template <class T>
VIT_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
VIT_INLINE T max(T a, T b) {
  return a < b ? b : a;
}
VIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VIT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline constexpr int64_t kAlign = 64;  // a cache line; every part of a workspace starts on one

// Hands out parts of a workspace, each on a cache line. From a null base it only counts: `used` is then the size.
struct Arena {
  char* base;
  int64_t used = 0;

  char* take(int64_t bytes) {
    char* part = base ? base + used : nullptr;
    used += round_up(bytes, kAlign);
    return part;
  }
};

inline constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::float64:
      return 8;
    case DType::bfloat16:
    case DType::float16:
      return 2;
  }
  return 0;
}
inline constexpr int64_t acc_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Calls f(T{}) with the element type of dtype; arguments were checked in check.cpp.
template <class F>
VIT_INLINE void with_any_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(bf16{});
    case DType::float16:  // refused by check.cpp
      return;
  }
}

// The same in the functions of a level's table: those of a partial level are called with bfloat16 alone (dispatch.cpp).
template <class F>
VIT_INLINE void with_dtype(DType dtype, const F& f) {
#ifdef VIT_ISA_PARTIAL
  if (dtype == DType::bfloat16) f(bf16{});
#else
  with_any_dtype(dtype, f);
#endif
}

// Calls f(P{}) where P is T or float: the type of parameters or outputs beside activations of type T.
template <class T, class F>
VIT_INLINE void with_param(DType param_dtype, const F& f) {
  if (param_dtype == DType::float32) return f(float{});
  f(T{});
}

}  // namespace vit::VIT_ISA
