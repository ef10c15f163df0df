// The inner product of gemm.h: tile, R rows x V vectors of C in registers. Every step loads V vectors of B and
// broadcasts R words of A. It is also what attention and the inference engine run on operands of their own.
#pragma once

#include "cpu/gemm_amx.h"
#include "cpu/gemm_step.h"

namespace vit::VIT_ISA {

// out[R][V lanes] = A B over `steps`, or with `add` out += A B. Row r, step s of A is the word at a + r stride + s
// sizeof(Word), or with kColumns at a + s stride + r sizeof(Word). b is a panel of V vectors per step. Each step asks
// for one line of what comes next. Rows of out are out_stride elements apart.
template <class T, int R, int V, bool kColumns>
__attribute__((noinline)) void tile(const char* a, int64_t stride, const char* b, int64_t steps, const Prefetch& ahead,
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
using TileFunction = void (*)(const char*, int64_t, const char*, int64_t, const Prefetch&, bool, Acc<T>*, int64_t);

template <class T, bool kColumns, int R, int V>
VIT_INLINE TileFunction<T> vector_tile_for(int64_t rows, int64_t vectors) {
  if constexpr (R > 1) {
    if (rows < R) return vector_tile_for<T, kColumns, R - 1, V>(rows, vectors);
  }
  if constexpr (V > 1) {
    if (vectors < V) return vector_tile_for<T, kColumns, R, V - 1>(rows, vectors);
  }
  return tile<T, R, V, kColumns>;
}

// The tile of `rows` <= kTileRows rows and `vectors` <= kTileVectors vectors, to be called as `tile` is.
template <class T, bool kColumns>
VIT_INLINE auto tile_for(int64_t rows, int64_t vectors) {
#if defined(__AMX_TILE__)
  if constexpr (kMatrixTiles<T>)
    return MatrixTile<T, kColumns>{rows, vectors};
  else
#endif
    return vector_tile_for<T, kColumns, kTileRows<T>, kTileVectors<T>>(rows, vectors);
}

// A finished tile: rows x columns of C from (row, column), `stride` elements from row to row. Where the steps are
// blocked it holds one block's sum; first and last say which.
template <class A>
struct Tile {
  const A* data;
  int64_t stride, row, rows, column, columns;
  bool first, last;
};

// What becomes of finished tiles, seen through two pointers: the loops of gemm.h are compiled once for each type of
// operand, not for each of some fifty epilogues (linear.cpp's object has 0.6 MB in place of 1.7). An epilogue may have
// no `prefetch`.
template <class A>
class EpilogueView {
 public:
  template <class E>
  explicit EpilogueView(const E& epilogue) : epilogue_(&epilogue), run_(run<E>), prefetch_(prefetch_of(epilogue, 0)) {}

  void operator()(const Tile<A>& tile) const { run_(epilogue_, tile); }

  // The lines that a tile will be read from and written to, asked for while it is computed.
  void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (prefetch_) prefetch_(epilogue_, row, rows, column, columns);
  }

 private:
  using Prefetches = void (*)(const void*, int64_t, int64_t, int64_t, int64_t);

  template <class E>
  static void run(const void* epilogue, const Tile<A>& tile) {
    (*static_cast<const E*>(epilogue))(tile);
  }
  template <class E>
  static void call_prefetch(const void* epilogue, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    static_cast<const E*>(epilogue)->prefetch(row, rows, column, columns);
  }
  template <class E>
  static auto prefetch_of(const E& epilogue, int) -> decltype(epilogue.prefetch(0, 0, 0, 0), Prefetches{}) {
    return call_prefetch<E>;
  }
  template <class E>
  static Prefetches prefetch_of(const E&, ...) {
    return nullptr;
  }

  const void* epilogue_;
  void (*run_)(const void*, const Tile<A>&);
  Prefetches prefetch_;
};

}  // namespace vit::VIT_ISA
