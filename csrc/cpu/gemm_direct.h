// Products of few rows whose B has adjacent k, as a weight has: C[M, N] = A[M, K] B[K, N] without packing.
//
// A packed panel pays when many rows read it. For a class token or a classification head it would be written and read
// back once: here each block of B is transposed in registers, as for packing, and multiplied at once. Every element of
// C is the same chain of fused multiply-adds as in tile, block of kBlockSteps after block: the same bits.
#pragma once

#include "cpu/gemm_pack.h"

namespace vit::VIT_ISA {

// As many rows as have an accumulator beside the words of a block.
template <class T>
inline constexpr int kDirectRows = kMatrixTiles<T> ? 16 : kTileRows<T>;
inline constexpr int64_t kAheadBlocks = 6;  // blocks of B asked for in advance, on every one of its rows

// out[R][lanes] = A B for the columns of B from j, `lanes` of them; row r, step s of A is the word at a + r stride + s
// sizeof(Word). Columns beyond N are made from column N - 1.
template <class T, int R, class P>
__attribute__((noinline)) void direct_tile(const char* a, int64_t stride, const Matrix<P>& b, int64_t j, int64_t K,
                                           int64_t N, Acc<T>* out) {
  using S = Step<T>;
  using A = Acc<T>;
  constexpr int64_t lanes = kWordLanes<T>, word = sizeof(Word<T>), depth = S::kDepth, size = sizeof(P);
  const int64_t steps = steps_of<T>(K), column = b.col;
  const P* first = b.data + j * column;
  const int64_t last = N - 1 - j;  // column of the block
  Vec<A> total[R];
  VIT_UNROLL for (int r = 0; r < R; ++r) total[r] = Vec<A>{};
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    const int64_t end = min(begin + kBlockSteps, steps);
    Vec<A> c[R];
    VIT_UNROLL for (int r = 0; r < R; ++r) c[r] = Vec<A>{};
    for (int64_t s = begin; s < end; s += lanes) {
      // The block asked for is the one of these columns or, near their end, of the next ones.
      const int64_t ahead = s + kAheadBlocks * lanes;
      const P* next = ahead < steps ? first + ahead * depth : first + lanes * column + (ahead - steps) * depth;
      Words<T> block[lanes];
      VIT_UNROLL for (int i = 0; i < lanes; ++i) {
        block[i] = row_words<T>(first + min<int64_t>(i, last) * column, s * depth, K);
        __builtin_prefetch(reinterpret_cast<const char*>(next) + i * column * size, 0, 3);
      }
      transpose(block);
      const int64_t count = end - s;
      const auto multiply = [&](int i) __attribute__((always_inline)) {
        VIT_UNROLL for (int part = 0; part < S::kParts; ++part) {
          const auto bs = S::part(block[i], part);
          VIT_UNROLL for (int r = 0; r < R; ++r) {
            Word<T> value;
            memcpy(&value, a + r * stride + (s + i) * word, sizeof value);
            c[r] = S::dot(S::part(broadcast(value), part), bs, c[r]);
          }
        }
      };
      if (count >= lanes) {
        VIT_UNROLL for (int i = 0; i < lanes; ++i) multiply(i);
      } else {
        VIT_UNROLL for (int i = 0; i < lanes; ++i) {
          if (i < count) multiply(i);
        }
      }
    }
    VIT_UNROLL for (int r = 0; r < R; ++r) total[r] = begin ? total[r] + c[r] : c[r];
  }
  VIT_UNROLL for (int r = 0; r < R; ++r) store<A>(out + r * lanes, total[r]);
}

template <class T, class P, int R = kDirectRows<T>>
VIT_INLINE auto direct_tile_for(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return direct_tile_for<T, P, R - 1>(rows);
  }
  return direct_tile<T, R, P>;
}

// The same of matrix registers, which read B from memory: some steps of a vector are packed and multiplied at once.
template <class T, class P>
void direct_matrix(const char* a, int64_t stride, const Matrix<P>& b, int64_t j, int64_t K, int64_t N, int64_t rows,
                   Acc<T>* out) {
  constexpr int64_t kSteps = 256;  // 16 KB
  alignas(64) char panel[kSteps * kVectorBytes];
  const auto run = tile_for<T, false>(rows, 1);
  const int64_t steps = steps_of<T>(K);
  for (int64_t s = 0; s < steps; s += kSteps) {
    const int64_t k = s * Step<T>::kDepth, count = min(kSteps, steps - s);
    pack_panel<T>(Matrix<P>{b.data + k * b.row, b.row, b.col}, j, 1, 0, count, K - k, N, panel);
    run(a + s * static_cast<int64_t>(sizeof(Word<T>)), stride, panel, count, {panel, 64}, s > 0, out, kWordLanes<T>);
  }
}

// C = A B for M <= kDirectRows<T> rows; calls epilogue(Tile) on the thread that computed the tile.
template <class T, class P>
void gemm_direct(int threads, const Lhs& a, const Rhs<T, P>& b, int64_t M, const EpilogueView<Acc<T>>& epilogue) {
  using A = Acc<T>;
  constexpr int64_t lanes = kWordLanes<T>;
  parallel_for(threads, ceil_div(b.N, lanes), [&](int64_t begin, int64_t end, int) {
    alignas(64) A sums[kDirectRows<T> * lanes];
    const TileRegisters<T> registers;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit * lanes;
      if constexpr (kMatrixTiles<T>)
        direct_matrix<T>(a.data, a.stride, b.matrix, j, b.K, b.N, M, sums);
      else
        direct_tile_for<T, P>(M)(a.data, a.stride, b.matrix, j, b.K, b.N, sums);
      epilogue(Tile<A>{sums, lanes, 0, M, j, min(lanes, b.N - j), true, true});
    }
  });
}

}  // namespace vit::VIT_ISA
