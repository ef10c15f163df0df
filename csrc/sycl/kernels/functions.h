// e^x for softmax and GELU: inlined, where the library's is a call that spills the registers around it.
//
//   e^x = 2^n e^r,  n = x / ln 2 rounded,  |r| <= ln(2) / 2,  e^r a polynomial of degree 6, relative error 2e-9 before
//   rounding. Arguments below -104 give 0, above 89 infinity; a NaN stays.
#pragma once

#include "common.h"

// What both functions below have in common, for an x of moderate size.
struct Exponential {
  float e, shifted;  // e^r, and 1.5 * 2^23 + n: n in the low bits
};

VIT_INLINE Exponential exponential_parts(float x) {
  const float shifted = sycl::fma(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = sycl::fma(n, 2.12194440e-4f, sycl::fma(n, -0.693359375f, x));
  float e = 0.00138368464f;
  e = sycl::fma(e, r, 0.00837481584f);
  e = sycl::fma(e, r, 0.0416682256f);
  e = sycl::fma(e, r, 0.166664202f);
  e = sycl::fma(e, r, 0.499999921f);
  e = sycl::fma(e, r, 1.00000004f);
  e = sycl::fma(e, r, 1.0f);
  return {e, shifted};
}

VIT_INLINE float exponential(float x) {
  const Exponential parts = exponential_parts(x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x);
  // In two steps: 2^n alone may be no normal number.
  const int whole = sycl::bit_cast<int>(parts.shifted) - 0x4b400000, half = whole >> 1;
  return parts.e * sycl::bit_cast<float>((half + 127) << 23) * sycl::bit_cast<float>((whole - half + 127) << 23);
}

// The same for x <= 0, or above it by no more than rounding: 15 instructions instead of 24. Below -87 it is e^-87.
VIT_INLINE float exponential_of_negative(float x) {
  const Exponential parts = exponential_parts(x < -87.0f ? -87.0f : x);
  return parts.e * sycl::bit_cast<float>((sycl::bit_cast<int>(parts.shifted) << 23) + (127 << 23));
}

VIT_INLINE double exponential(double x) { return sycl::exp(x); }
VIT_INLINE double exponential_of_negative(double x) { return sycl::exp(x); }
