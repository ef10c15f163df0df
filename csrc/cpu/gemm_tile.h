// The inner product of gemm.h: tile, R rows x V vectors of C in registers. Every step loads V vectors of B and
// broadcasts R words of A. It is also what attention and the inference engine run on operands of their own.
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
inline constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;
#endif

template <class T>
inline constexpr int kWordLanes = kVectorBytes / static_cast<int>(sizeof(Word<T>));
template <class T>
inline constexpr int kTileColumns = kTileVectors * kWordLanes<T>;

// --- tile -----------------------------------------------------------------------------------------------------------

// Lines to be brought into L2 while a tile runs, one per step: they are the next panel (7 % on a whole network of one
// image, whose weights come from memory).
struct Ahead {
  const char* first;
  int64_t stride;
};

// out[R][V lanes] = A B over `steps`, or with `add` out += A B. Row r, step s of A is the word at a + r stride + s
// sizeof(Word), or with kColumns at a + s stride + r sizeof(Word). b is a panel of V vectors per step. Each step asks
// for one line of what comes next. Rows of out are out_stride elements apart.
template <class T, int R, int V, bool kColumns>
__attribute__((noinline)) void tile(const char* a, int64_t stride, const char* b, int64_t steps, const Ahead& ahead,
                                    bool add, Acc<T>* out, int64_t out_stride) {
  using S = Step<T>;
  constexpr int kWord = sizeof(Word<T>), kAhead = 16;
  Vec<Acc<T>> c[R][V];
  VIT_UNROLL for (int r = 0; r < R; ++r) VIT_UNROLL for (int v = 0; v < V; ++v) c[r][v] = Vec<Acc<T>>{};
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kColumns)
      __builtin_prefetch(a + (s + kAhead) * stride, 0, 3);  // strided: the hardware does not see it coming (6 points)
    else
      __builtin_prefetch(ahead.first + s * ahead.stride, 0, 2);
    VIT_UNROLL for (int part = 0; part < S::kParts; ++part) {
      decltype(S::part(Words<T>{}, 0)) bs[V];
      VIT_UNROLL for (int v = 0; v < V; ++v) bs[v] = S::part(load_raw<Words<T>>(b + (s * V + v) * kVectorBytes), part);
      VIT_UNROLL for (int r = 0; r < R; ++r) {
        Word<T> word;
        memcpy(&word, kColumns ? a + s * stride + r * kWord : a + r * stride + s * kWord, kWord);
        const auto as = S::part(broadcast(word), part);
        VIT_UNROLL for (int v = 0; v < V; ++v) c[r][v] = S::dot(as, bs[v], c[r][v]);
      }
    }
  }
  VIT_UNROLL for (int r = 0; r < R; ++r) VIT_UNROLL for (int v = 0; v < V; ++v) {
    Acc<T>* at = out + r * out_stride + v * kLanes<Acc<T>>;
    store<Acc<T>>(at, add ? load<Acc<T>>(at) + c[r][v] : c[r][v]);
  }
}

template <class T>
using TileFunction = void (*)(const char*, int64_t, const char*, int64_t, const Ahead&, bool, Acc<T>*, int64_t);

// The tile of `rows` <= R rows and `vectors` <= V vectors.
template <class T, bool kColumns, int R = kTileRows, int V = kTileVectors>
VIT_INLINE TileFunction<T> tile_for(int64_t rows, int64_t vectors) {
  if constexpr (R > 1) {
    if (rows < R) return tile_for<T, kColumns, R - 1, V>(rows, vectors);
  }
  if constexpr (V > 1) {
    if (vectors < V) return tile_for<T, kColumns, R, V - 1>(rows, vectors);
  }
  return tile<T, R, V, kColumns>;
}

// A finished tile: rows x columns of C from (row, column), `stride` elements from row to row. Where the steps are
// blocked it holds one block's sum; first and last say which.
template <class A>
struct Tile {
  const A* data;
  int64_t stride, row, rows, column, columns;
  bool first, last;
};

}  // namespace vit::VIT_ISA
