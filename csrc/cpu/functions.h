// Exponentials on vectors, from one source for every instruction-set level.
//
//   2^x = 2^n q(x - n),  n = round(x);    e^x = 2^n p(x - n ln 2),  n = round(x / ln 2)
//
// q and p are polynomials with the smallest largest relative error (Remez, computed with 40 digits). Their degree
// follows the type T that the result will be rounded to: bfloat16 needs four terms, float six or seven, double twelve.
#pragma once

#include "cpu/simd.h"

namespace vit::VIT_ISA {

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1).
template <class A, int n>
VIT_INLINE Vec<A> polynomial(const A (&c)[n], Vec<A> x) {
  Vec<A> sum = broadcast(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, x, broadcast(c[i]));
  return sum;
}

// The layout of a floating-point number. `magic` is 1.5 * 2^mantissa_bits: adding it rounds to an integer.
template <class A>
struct Layout;
template <>
struct Layout<float> {
  using Int = i32v;
  static constexpr int32_t not_sign = INT32_MAX;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float magic = 12582912.0f;
  static constexpr float smallest_exponent = -151.0f, largest_exponent = 129.0f;  // 2^x is 0, infinity
};
template <>
struct Layout<double> {
  using Int = i64v;
  static constexpr int64_t not_sign = INT64_MAX;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double smallest_exponent = -1076.0, largest_exponent = 1025.0;
};

// 2^f for |f| <= 1/2.
template <class T>
struct Exp2;
template <>
struct Exp2<bf16> {  // error 8e-5, 2 % of a bfloat16's rounding error
  static constexpr float c[] = {0.999928074f, 0.693260986f, 0.242611122f, 0.0551716675f};
};
template <>
struct Exp2<float> {  // error 7e-8
  static constexpr float c[] = {1.00000007f, 0.693146967f, 0.240221197f, 0.0555071328f, 0.00967554137f, 0.00132764715f};
};
template <>
struct Exp2<double> {  // error 2e-17
  static constexpr double c[] = {1.0,
                                 0.693147180559945309,
                                 0.240226506959100761,
                                 0.0555041086648215826,
                                 0.00961812910761866557,
                                 0.00133335581464232131,
                                 0.000154035304247765276,
                                 1.5252733820795803e-5,
                                 1.32154516332214344e-6,
                                 1.01780672674494268e-7,
                                 7.07097786650813856e-9,
                                 4.45410341058704018e-10};
};

// e^r for |r| <= ln(2) / 2.
template <class A>
struct Exp;
template <>
struct Exp<float> {  // error 2e-9
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  static constexpr float c[] = {1.0f,          1.00000004f,    0.499999921f,  0.166664202f,
                                0.0416682256f, 0.00837481584f, 0.00138368464f};
};
template <>
struct Exp<double> {  // error 2e-17
  static constexpr double log2_e = 1.4426950408889634074;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double c[] = {1.0,
                                 1.0,
                                 0.5,
                                 0.166666666666666675,
                                 0.0416666666666241619,
                                 0.00833333333333006445,
                                 0.00138888889171967191,
                                 0.000198412698630405453,
                                 2.48015213223686933e-5,
                                 2.75572684803100255e-6,
                                 2.76200758799833666e-7,
                                 2.51003758325612337e-8};
};

// The larger or the smaller of x and a constant; a NaN in x stays.
template <class A>
VIT_INLINE Vec<A> at_least(Vec<A> x, A low) {
  return vmax(broadcast(low), x);
}
template <class A>
VIT_INLINE Vec<A> at_most(Vec<A> x, A high) {
  return vmin(broadcast(high), x);
}

template <class A>
VIT_INLINE Vec<A> abs(Vec<A> x) {
  using L = Layout<A>;
  return bit_cast<Vec<A>>(bit_cast<typename L::Int>(x) & L::not_sign);
}

#if defined(__AVX512DQ__)
// x - round(x), 0 for an infinite x.
VIT_INLINE f32v fraction(f32v x) { return bit_cast<f32v>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(x), 0)); }
VIT_INLINE f64v fraction(f64v x) { return bit_cast<f64v>(_mm512_maskz_reduce_pd(0xff, bit_cast<__m512d>(x), 0)); }
#endif

// x 2^n for the integer n = shifted - magic.
template <class A>
VIT_INLINE Vec<A> scale_by_power(Vec<A> x, [[maybe_unused]] Vec<A> n, [[maybe_unused]] Vec<A> shifted) {
#if defined(__AVX512F__)
  if constexpr (same<A, float>)
    return bit_cast<Vec<A>>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(x), bit_cast<__m512>(n)));
  else
    return bit_cast<Vec<A>>(_mm512_maskz_scalef_pd(0xff, bit_cast<__m512d>(x), bit_cast<__m512d>(n)));
#else
  // Two factors, because 2^n itself may be denormal or too large.
  using L = Layout<A>;
  using Int = typename L::Int;
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<Int>(broadcast(L::magic));
  const Int half = exponent >> 1;
  const Vec<A> scale1 = bit_cast<Vec<A>>((half + L::exponent_bias) << L::mantissa_bits);
  const Vec<A> scale2 = bit_cast<Vec<A>>((exponent - half + L::exponent_bias) << L::mantissa_bits);
  return x * scale1 * scale2;
#endif
}

// 2^x to the precision of T, for x up to Layout<A>::largest_exponent; 0 for everything below the smallest one.
template <class T>
VIT_INLINE Vec<Acc<T>> exp2(Vec<Acc<T>> x) {
  using A = Acc<T>;
#if defined(__AVX512DQ__)
  const Vec<A> f = fraction(x);  // also of -infinity: 0
  return scale_by_power<A>(polynomial(Exp2<T>::c, f), x - f, x);
#else
  x = at_least(x, Layout<A>::smallest_exponent);
  const Vec<A> shifted = x + Layout<A>::magic;
  const Vec<A> n = shifted - Layout<A>::magic;
  return scale_by_power<A>(polynomial(Exp2<T>::c, x - n), n, shifted);
#endif
}

// e^(x + rest) without rounding x + rest first, for -150 < x < 88 (float) or -1000 < x < 709 (double).
template <class A>
VIT_INLINE Vec<A> exp_of_sum(Vec<A> x, Vec<A> rest) {
  using E = Exp<A>;
  const Vec<A> shifted = fma(x, broadcast(E::log2_e), broadcast(Layout<A>::magic));
  const Vec<A> n = shifted - Layout<A>::magic;
  const Vec<A> r = fma(n, broadcast(-E::ln2_low), fma(n, broadcast(-E::ln2_high), x) + rest);
  return scale_by_power<A>(polynomial(E::c, r), n, shifted);
}

// a / b to the precision of T, for b from 1 to 2^100. For bfloat16 the approximate reciprocal is enough (14 bits; a
// division keeps a multiplier busy for 10 cycles, gelu gained 9 % on Zen 4). float would need a Newton step, which
// costs as much as the division.
template <class T>
VIT_INLINE Vec<Acc<T>> quotient(Vec<Acc<T>> a, Vec<Acc<T>> b) {
#if defined(__AVX512F__)
  if constexpr (same<T, bf16>) return a * bit_cast<f32v>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(b)));
#endif
  return a / b;
}

// a b - product, the rounding error of product = a b (0 on levels without FMA). Not opaque, the compiler would take
// that product and find 0.
template <class V>
VIT_INLINE V product_error(V a, V b, V product) {
  return fma(opaque(a), b, -product);
}

}  // namespace vit::VIT_ISA
