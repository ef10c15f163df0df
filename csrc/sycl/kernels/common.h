// What every kernel shares: the types of elements, loads and stores, and the place of a work-item.
//
// The code below kernels/ is compiled at run time by SYCL's own compiler, for the device it runs on. Only the small
// headers of SYCL are included: <sycl/sycl.hpp> alone takes 0.7 s. VIT_LANES is the size of a sub-group, VIT_SUB_GROUPS
// how many of them form a work-group; with VIT_LOCAL they share operands in local memory.
//
// Two rules keep loads and stores vectors of adjacent elements on the CPU device: a uniform pointer is formed first and
// the lane added last, and nothing that reaches an address goes through sycl::min or sycl::max (a gather: 15 times
// slower).
#pragma once

#include <sycl/builtins.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/ext/oneapi/work_group_static.hpp>
#include <sycl/group_algorithm.hpp>
#include <sycl/group_barrier.hpp>
#include <sycl/nd_item.hpp>

#include "sizes.h"

// Sub-group functions give wrong results when the compiler is free to choose another size.
#define VIT_KERNEL                                                                                \
  SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))        \
  SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::sub_group_size<VIT_LANES>)) \
  void
// For every lambda: one that is a call keeps what it captures in memory, where pointers are no longer uniform, and all
// its loads and stores become gathers and scatters (the epilogue of linear took as long as 800 values of k).
#define VIT_ALWAYS __attribute__((always_inline))
#define VIT_INLINE inline VIT_ALWAYS
#define VIT_UNROLL _Pragma("unroll")

using int64 = long;

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;  // what sums of T are kept in

// ----- elements. The conversions are integer code: no device needs native 16-bit types, and denormals survive.

VIT_INLINE float widen(bf16 x) { return sycl::bit_cast<float>(unsigned(x.bits) << 16); }

VIT_INLINE float widen(f16 x) {
  const unsigned exponent = 0x7c00u << 13;  // of a half, at the place of a float's
  unsigned bits = (x.bits & 0x7fffu) << 13;
  const unsigned e = bits & exponent;
  bits += (127 - 15) << 23;
  if (e == exponent) bits += (128 - 16) << 23;  // infinities and NaN
  const float denormal = sycl::bit_cast<float>(bits + (1u << 23)) - 0x1p-14f;
  const float magnitude = e == 0 ? denormal : sycl::bit_cast<float>(bits);
  return sycl::bit_cast<float>(sycl::bit_cast<unsigned>(magnitude) | (x.bits & 0x8000u) << 16);
}

VIT_INLINE float widen(float x) { return x; }
VIT_INLINE double widen(double x) { return x; }
VIT_INLINE float widen(signed char x) { return float(x); }

VIT_INLINE void narrow(float& to, float x) { to = x; }
VIT_INLINE void narrow(float& to, double x) { to = float(x); }
VIT_INLINE void narrow(double& to, double x) { to = x; }

// Round to nearest, ties to even; NaN stays NaN.
VIT_INLINE void narrow(bf16& to, float x) {
  const unsigned bits = sycl::bit_cast<unsigned>(x);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<unsigned short>(x != x ? 0x7fc0u : rounded);
}

VIT_INLINE void narrow(f16& to, float x) {
  const unsigned all = sycl::bit_cast<unsigned>(x), sign = all & 0x80000000u, bits = all ^ sign;
  const unsigned magic = (127u - 15 + 23 - 10 + 1) << 23;  // adding it rounds at the last bit of a denormal half
  const unsigned denormal =
      sycl::bit_cast<unsigned>(sycl::bit_cast<float>(bits) + sycl::bit_cast<float>(magic)) - magic;
  const unsigned normal = (bits - ((127u - 15) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  unsigned half = bits < (113u << 23) ? denormal : normal;
  if (bits >= (143u << 23)) half = bits > (255u << 23) ? 0x7e00u : 0x7c00u;
  to.bits = static_cast<unsigned short>(half | sign >> 16);
}

template <class A, class T>
VIT_INLINE A load(const T* p) {
  return A(widen(*p));
}

template <class T, class A>
VIT_INLINE void store(T* p, A x) {
  narrow(*p, x);
}

// ----- places

// `unit` counts the sub-groups of a launch; a kernel's work is divided into units.
struct Place {
  int lane;
  int64 unit;
};

VIT_INLINE Place place() {
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
#if VIT_SUB_GROUPS == 1
  return {int(item.get_local_id(0)), int64(item.get_group(0))};
#else
  const auto group = item.get_sub_group();
  return {int(group.get_local_linear_id()), int64(item.get_group(0)) * VIT_SUB_GROUPS + group.get_group_linear_id()};
#endif
}

template <class A>
VIT_INLINE A sum_over_lanes(A x) {
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
  return sycl::reduce_over_group(item.get_sub_group(), x, sycl::plus<A>());
}

// What the lanes of a sub-group wrote is seen by all of them.
VIT_INLINE void sub_group_barrier() {
  sycl::group_barrier(sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_sub_group());
}

// Calls f(column) for the vectors of a row of n columns; in the last one only for the lanes that have an element.
template <class F>
VIT_INLINE void for_columns(int n, int lane, const F& f) {
  int c = 0;
  for (; c + VIT_LANES <= n; c += VIT_LANES) f(c);
  if (c < n && c + lane < n) f(c);
}

// The sum over a row of n columns of f(column, sum so far), four vectors at a time: one chain of additions would wait
// for each of them.
template <class A, class F>
VIT_INLINE A sum_columns(int n, int lane, const F& f) {
  constexpr int kChains = 4;
  A sums[kChains] = {0, 0, 0, 0};
  int c = 0;
  for (; c + kChains * VIT_LANES <= n; c += kChains * VIT_LANES)
    VIT_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = f(c + i * VIT_LANES, sums[i]);
  for_columns(n - c, lane, [&](int d) VIT_ALWAYS { sums[0] = f(c + d, sums[0]); });
  return sum_over_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
