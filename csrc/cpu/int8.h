// 32-bit integers as accumulators of a tile, and products of signed bytes that are exact on every instruction-set
// level.
//
//   VNNI      unsigned x signed: a holds q + 128, and 128 times the sum of b is subtracted at the end
//   AVX2      bytes widened to 16 bits, two products to an addition in 32 bits
//   baseline  bytes widened to 32 bits
//
// (The engine's q8, engine/int8.h, scales its weights so that pairs of products fit 16 bits: one instruction less with
// AVX2. Here the weight is given.)
#pragma once

#include "cpu/gemm.h"

namespace vit::VIT_ISA {

template <>
struct VecOf<int32_t> {
  using type = i32v;
  using mask = i32v;
};
template <>
struct Memory<int32_t, int32_t> {
  static VIT_INLINE i32v load(const int32_t* p) { return load_raw<i32v>(p); }
  static VIT_INLINE i32v load(const int32_t* p, int64_t n) { return load_raw<i32v>(p, n); }
  static VIT_INLINE void store(int32_t* p, i32v v) { memcpy(p, &v, sizeof v); }
};

struct Most {
  template <class V>
  VIT_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

struct s8 {  // a signed byte of an exact product
  int8_t bits;
};

template <>
struct Traits<s8> {
  using acc = int32_t;
};

template <>
struct Step<s8> {
  using Word = uint32_t;
  using Words = u32v;
  static constexpr int kDepth = 4;
#if defined(__AVX512VNNI__)
  static constexpr int kParts = 1, kZero = 128;
  static VIT_INLINE Words part(Words words, int) { return words; }
  static VIT_INLINE i32v dot(Words a, Words b, i32v c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // not the intrinsic: see Step<q8>
    return c;
  }
#elif defined(__AVX2__)
  typedef int16_t Pairs __attribute__((vector_size(kVectorBytes)));
  static constexpr int kParts = 2, kZero = 0;
  static VIT_INLINE Pairs part(Words words, int i) {
    const Pairs pairs = bit_cast<Pairs>(words);
    return i ? pairs >> 8 : pairs << 8 >> 8;
  }
  static VIT_INLINE i32v dot(Pairs a, Pairs b, i32v c) {
#if defined(__AVX512F__)
    return c + bit_cast<i32v>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#else
    return c + bit_cast<i32v>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#endif
  }
#else
  static constexpr int kParts = 4, kZero = 0;
  static VIT_INLINE i32v part(Words words, int i) { return bit_cast<i32v>(words << (24 - 8 * i)) >> 24; }
  static VIT_INLINE i32v dot(i32v a, i32v b, i32v c) { return c + a * b; }
#endif
};

}  // namespace vit::VIT_ISA
