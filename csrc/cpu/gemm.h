// The matrix product shared by matmul, linear and the inference engine:  C[M, N] = A[M, K] B[K, N].
//
// gemm runs the tiles of gemm_tile.h on the operands of gemm_pack.h over a grid of threads and hands each finished one
// to an epilogue. Three layers, three files: the tile in registers, the operands in memory, the loops around both. A
// few rows take the short way of gemm_direct.h.
//
// An element of C is the sum of blocks of kBlockSteps steps, each block a sum over k in order (in matrix registers one
// chain, gemm_amx.h), whatever the layout of A and B and whatever tile the element falls into: neither M nor the number
// of threads can change it.
#pragma once

#include "cpu/gemm_direct.h"

namespace vit::VIT_ISA {

inline constexpr int64_t kBlockRows = 104;         // rows of A per pass over the panels, at least
inline constexpr int64_t kBlockBytes = 800 << 10;  // or as many as these hold: 197 rows of K = 1024, one pass
inline constexpr int64_t kColumnBlockRows = 192;   // the same where columns of A are adjacent

// How many threads share the rows; the others share the panels. Panels alone where there are enough of them: each is
// then packed by the thread that needs it. Else rows first, as long as a thread keeps about 48, because each pass over
// the panels is paid by all rows of a block.
template <class T>
int64_t row_threads(int threads, int64_t M, int64_t panels) {
  if (panels >= 2 * threads) return 1;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= threads; ++rows) {
    const int64_t share = ceil_div(M, rows), tiles = ceil_div(share, kTileRows<T>);
    const int64_t cost = tiles * ceil_div(panels, threads / rows) * 64 + (share < 48 ? rows : 0);
    if (cost <= best_cost) best = rows, best_cost = cost;
  }
  return best;
}

// Rows [first, last) in tiles. Of vector registers nearly equal heights: 7 and 8 rows, never 8, 8, 1. Of matrix
// registers whole ones, for part of one costs as much.
template <class T>
struct RowTiles {
  int64_t first, last, count;

  RowTiles(int64_t first, int64_t last) : first(first), last(last), count(ceil_div(last - first, kTileRows<T>)) {}
  int64_t begin(int64_t t) const {
    return kMatrixTiles<T> ? min(first + t * kTileRows<T>, last) : first + (last - first) * t / count;
  }
};

// The lines of `columns` elements in each of `rows` rows, to be written or only read.
template <bool kWrite, class O>
VIT_INLINE void prefetch_rows(const O* first, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(O));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(first + r * stride + j, kWrite, 3);
}

// Rows [row_begin, row_end) x panels [panel_begin, panel_end) on the calling thread.
template <class T, bool kColumns, class P>
void gemm_range(const Lhs& a, const Rhs<T, P>& b, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                int64_t panel_end, const EpilogueView<Acc<T>>& epilogue) {
  using A = Acc<T>;
  constexpr int64_t word = sizeof(Word<T>), lanes = kWordLanes<T>;
  alignas(64) A sums[kTileRows<T> * kTileColumns<T>];
  const TileRegisters<T> registers;
  const int64_t steps = b.steps();
  const int64_t block_rows = kColumns ? kColumnBlockRows : max(kBlockRows, kBlockBytes / max(steps * word, int64_t{1}));
  const int64_t row_blocks = ceil_div(row_end - row_begin, block_rows);
  const int64_t blocks = max<int64_t>(ceil_div(steps, kBlockSteps), 1);
  // One pass needs each panel once: all are packed where the first is, which stays in L2 (197 rows, K = 768: 4 to 6 %).
  const bool once = b.packs() && row_blocks == 1;
  for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
    const int64_t r0 = row_begin + (row_end - row_begin) * row_block / row_blocks;
    const int64_t r1 = row_begin + (row_end - row_begin) * (row_block + 1) / row_blocks;
    const RowTiles<T> tiles(r0, r1);
    const bool packs = b.packs() && row_block == 0;
    // Rows adjacent in k: a tile runs through all blocks of steps. Else all tiles do one block, then the next, so that
    // the strided part of A stays in L2.
    for (int64_t outer = 0; outer < (kColumns ? blocks : 1); ++outer) {
      const int64_t first_block = outer, end_block = kColumns ? outer + 1 : blocks;
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t vectors = b.vectors(panel), line = vectors * kVectorBytes;
        char* panel_b = b.at(once ? panel_begin : panel);
        if (packs) b.pack(panel, first_block * kBlockSteps, min(end_block * kBlockSteps, steps), panel_b);
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t i0 = tiles.begin(t), i1 = tiles.begin(t + 1);
          const auto run = tile_for<T, kColumns>(i1 - i0, vectors);
          const bool asks = panel + 1 < panel_end && t * 64 < line;
          epilogue.prefetch(i0, i1 - i0, panel * kTileColumns<T>, b.columns(panel));
          const Prefetch ahead = asks ? b.ahead(panel + 1, t, packs) : Prefetch{panel_b, 64};
          for (int64_t block = first_block; block < end_block; ++block) {
            const int64_t s0 = block * kBlockSteps, count = min(kBlockSteps, steps - s0);
            const char* lhs = a.data + (kColumns ? s0 * a.stride + i0 * word : i0 * a.stride + s0 * word);
            run(lhs, a.stride, panel_b + s0 * line, count, {ahead.first + s0 * ahead.stride, ahead.stride},
                block > first_block, sums, vectors * lanes);
          }
          epilogue(Tile<A>{sums, vectors * lanes, i0, i1 - i0, panel * kTileColumns<T>, b.columns(panel),
                           first_block == 0, end_block == blocks});
        }
      }
    }
  }
}

// The same for a B that is packed already.
template <class T, bool kColumns, class E>
VIT_INLINE void gemm_range(const Lhs& a, const char* packed_b, int64_t N, int64_t steps, int64_t row_begin,
                           int64_t row_end, int64_t panel_begin, int64_t panel_end, const E& epilogue) {
  const Rhs<T, Packed> b{{nullptr, 0, 0}, const_cast<char*>(packed_b), steps * Step<T>::kDepth, N};
  gemm_range<T, kColumns>(a, b, row_begin, row_end, panel_begin, panel_end, EpilogueView<Acc<T>>(epilogue));
}

// C[M, N] = A B for a prepared A; calls epilogue(Tile) on the thread that computed the tile.
template <class T, class P>
void gemm_view(int threads, const Lhs& a, Rhs<T, P> b, int64_t M, const EpilogueView<Acc<T>>& epilogue) {
  if (M == 0 || b.N == 0) return;
  if constexpr (!same<P, Packed>) {
    if (M <= kDirectRows<T> && b.packs() && b.matrix.row == 1 && !a.columns)
      return gemm_direct(threads, a, b, M, epilogue);
  }
  const int64_t panels = panels_of<T>(b.N), row_parts = min(row_threads<T>(threads, M, panels), M);
  const int64_t column_parts = min(max<int64_t>(threads / row_parts, 1), panels);
  if constexpr (!same<P, Packed>) {
    if (b.packs() && row_parts > 1) {  // several threads read each panel: it must be there before
      pack_b<T>(threads, b.matrix, b.K, b.N, b.packed);
      b.matrix.data = nullptr;
    }
  }
  parallel_for(threads, row_parts * column_parts, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / column_parts, j = unit % column_parts;
      const int64_t r0 = M * i / row_parts, r1 = M * (i + 1) / row_parts;
      const int64_t p0 = panels * j / column_parts, p1 = panels * (j + 1) / column_parts;
      if (a.columns)
        gemm_range<T, true>(a, b, r0, r1, p0, p1, epilogue);
      else
        gemm_range<T, false>(a, b, r0, r1, p0, p1, epilogue);
    }
  });
}

template <class T, class P, class E>
VIT_INLINE void gemm(int threads, const Lhs& a, const Rhs<T, P>& b, int64_t M, const E& epilogue) {
  gemm_view(threads, a, b, M, EpilogueView<Acc<T>>(epilogue));
}

// The plain epilogue: stores C as type O, `ld` elements from row to row. Sums of blocked steps wait in `partial`, which
// has the layout of out and is out itself where O is the accumulator type.
template <class A, class O>
struct Store {
  O* out;
  A* partial;
  int64_t ld;

  VIT_INLINE void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    prefetch_rows<true>(out + row * ld + column, ld, rows, columns);
  }

  void operator()(const Tile<A>& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * ld + tile.column;
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        const int64_t n = tile.columns - j;
        Vec<A> v = load<A>(tile.data + r * tile.stride + j);
        if (!tile.first) v = load<A>(partial + at + j, n) + v;
        if (tile.last)
          store<A>(out + at + j, v, n);
        else
          store<A>(partial + at + j, v, n);
      }
    }
  }
};

// Bytes of `partial` for an M x N result of type O.
template <class A, class O>
VIT_INLINE int64_t partial_bytes(int64_t M, int64_t N) {
  return same<A, O> ? 0 : M * N * static_cast<int64_t>(sizeof(A));
}

template <class A, class O>
VIT_INLINE Store<A, O> store_to(O* out, char* partial, int64_t ld) {
  if constexpr (same<A, O>) return {out, out, ld};
  return {out, reinterpret_cast<A*>(partial), ld};
}

}  // namespace vit::VIT_ISA
