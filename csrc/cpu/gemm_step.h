// One step of the products of gemm.h, by type of operand and instruction set, and the sizes of a tile.
//
// A step covers kDepth values of k, packed into one word: 1 for float and double, 2 for bfloat16, whose products are
// summed in pairs by one instruction. Levels without that instruction compute products of bfloat16 in float: see
// Operand.
#pragma once

#include "cpu/simd.h"

namespace vit::VIT_ISA {

#define VIT_UNROLL _Pragma("GCC unroll 16")

// --- one step of an inner product -----------------------------------------------------------------------------------

// Word: what is broadcast of A and what a lane of B holds. kParts: fused multiply-adds per step.
template <class T>
struct Step {
  using Word = T;
  using Words = Vec<T>;
  static constexpr int kDepth = 1, kParts = 1;
  static VIT_INLINE Words part(Words words, int) { return words; }
  static VIT_INLINE Words dot(Words a, Words b, Words c) { return fma(a, b, c); }
};

template <>
struct Step<bf16> {
  using Word = uint32_t;
  using Words = u32v;
  static constexpr int kDepth = 2;
#if defined(__AVX512BF16__)
  static constexpr int kParts = 1;
  static VIT_INLINE Words part(Words words, int) { return words; }
  static VIT_INLINE f32v dot(Words a, Words b, f32v c) {
    return bit_cast<f32v>(_mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
#else
  static constexpr int kParts = 2;  // a bfloat16 becomes a float by moving it to the upper half of the word
  static VIT_INLINE f32v part(Words words, int i) { return bit_cast<f32v>(i ? words & 0xffff0000u : words << 16); }
  static VIT_INLINE f32v dot(f32v a, f32v b, f32v c) { return fma(a, b, c); }
#endif
};

// What elements of type T become where they are packed for a product: float for bfloat16 without its dot instruction.
// Each is then converted once. Taken apart in every tile, a pair costs two operations beside its products
// (VIT_CPU_ISA=v3 on two cores of a Zen 5: 68 % of the limit of multiply-adds in place of 92 %). The engine keeps
// pairs: its weights would take twice the memory.
#if defined(__AVX512BF16__)
template <class T>
using Operand = T;
#else
template <class T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<bf16> {
  using type = float;
};
template <class T>
using Operand = typename OperandOf<T>::type;
#endif

template <class T>
using Word = typename Step<T>::Word;
template <class T>
using Words = typename Step<T>::Words;

VIT_INLINE u32v broadcast(uint32_t x) { return x | u32v{}; }

template <class T>
VIT_INLINE int64_t steps_of(int64_t K) {
  return ceil_div(K, Step<T>::kDepth);
}

// --- tile sizes -----------------------------------------------------------------------------------------------------

// The largest tile whose accumulators, one row of B and one word of A fit the registers: 32 with AVX-512 and NEON, 16
// with AVX2 and SSE2. 8 x 3 reached 96 to 100 % of a Zen 4 core's peak, 12 x 2 and 6 x 4 one to two points less.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectorTileRows = 8, kVectorTileVectors = 3;
#elif defined(__AVX2__)
inline constexpr int kVectorTileRows = 6, kVectorTileVectors = 2;
#else
inline constexpr int kVectorTileRows = 4, kVectorTileVectors = 2;
#endif

// Whether the words of T meet in the matrix registers of gemm_amx.h.
#if defined(__AMX_TILE__)
template <class T>
inline constexpr bool kMatrixTiles = Step<T>::kDepth > 1;
#else
template <class T>
inline constexpr bool kMatrixTiles = false;
#endif

template <class T>
inline constexpr int kTileRows = kMatrixTiles<T> ? 32 : kVectorTileRows;
template <class T>
inline constexpr int kTileVectors = kMatrixTiles<T> ? 2 : kVectorTileVectors;

template <class T>
inline constexpr int kWordLanes = kVectorBytes / static_cast<int>(sizeof(Word<T>));
template <class T>
inline constexpr int kTileColumns = kTileVectors<T> * kWordLanes<T>;

// Lines to be brought into L2 while a tile runs, one per step: they are the next panel (7 % on a whole network of one
// image, whose weights come from memory).
struct Prefetch {
  const char* first;
  int64_t stride;
};

// Held by a thread while it runs tiles of T: what they need to be set up, which for vectors is nothing.
template <class T, bool kMatrix = kMatrixTiles<T>>
struct TileRegisters {
  TileRegisters() {}
};

}  // namespace vit::VIT_ISA
