// rotary of one head, shared by rotary.cpp and the inference engine.
#pragma once

#include "cpu/simd.h"

namespace vit::VIT_ISA {

// (-1, 1, -1, 1, ...), and each lane's neighbour.
template <class A>
VIT_INLINE Vec<A> alternating() {
  Vec<A> signs{};
  for (int i = 0; i < kLanes<A>; ++i) signs[i] = i % 2 ? A(1) : A(-1);
  return signs;
}
template <class A>
VIT_INLINE Vec<A> neighbours(Vec<A> v) {
  typename VecOf<A>::mask other{};
  for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ 1;
  return __builtin_shuffle(v, other);
}

// Calls f(i, partner, n) for every vector of a head whose elements i .. i + n - 1 are turned together with those of
// `partner`: with kHalf each of them stands D / 2 further on, else they are each other's neighbours.
template <class A, bool kHalf, class F>
VIT_INLINE void for_pairs(int64_t D, const F& f) {
  const int64_t count = kHalf ? D / 2 : D;
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) f(i, i + D / 2, int64_t{kLanes<A>});
  if (i < count) f(i, i + D / 2, count - i);
}

// y = x cos + r(x) sin of one head, or with kBack its transpose y = x cos - r(x sin); y may be x.
template <class T, class P, bool kHalf, bool kBack>
VIT_INLINE void turn(const T* x, const P* sin, const P* cos, T* y, int64_t D) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_pairs<A, kHalf>(D, [&](int64_t i, int64_t partner, int64_t n) {
    const V a = load<A>(x + i, n), c = load<A>(cos + i, n), s = load<A>(sin + i, n);
    if constexpr (kHalf) {
      const V b = load<A>(x + partner, n), d = load<A>(cos + partner, n), t = load<A>(sin + partner, n);
      store<A>(y + i, kBack ? fma(b, t, a * c) : a * c - b * s, n);
      store<A>(y + partner, kBack ? b * d - a * s : fma(a, t, b * d), n);
    } else if constexpr (kBack) {
      store<A>(y + i, a * c - alternating<A>() * neighbours<A>(a * s), n);
    } else {
      store<A>(y + i, a * c + alternating<A>() * neighbours<A>(a) * s, n);
    }
  });
}

}  // namespace vit::VIT_ISA
