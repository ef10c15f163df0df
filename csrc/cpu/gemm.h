// The matrix-product engine shared by matmul, linear and attention:  C[M, N] = A[M, K] B[K, N].
//
//   tile     R rows x V vectors of C in registers; every step loads V vectors of B, broadcasts R words of A.
//   pack_b   B as panels of kTileColumns columns, [panel][step][column]: what tile reads is one contiguous stream.
//   Right    a B whose panels are packed one by one where they are used first.
//   prepare_a A is read where it lies (rows or columns adjacent); it is copied only where its strides forbid that.
//   gemm     runs the tiles over a grid of threads and hands each finished one to an epilogue.
//
// A step covers kDepth values of k, packed into one word: 1 for float and double, 2 for bfloat16, whose products are
// summed in pairs by one instruction. Not packing A was worth 10 to 15 % (float32, M = 197 and 1576).
//
// An element of C is the sum of blocks of kBlockSteps steps, each block a sum over k in order, whatever the layout of A
// and B and whatever tile the element falls into: neither M nor the number of threads can change it.
#pragma once

#include "cpu/simd.h"
#include "cpu/threads.h"

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
// with AVX2 and SSE2. 8 x 3 reached 96 to 100 % of the AVX-512 peak, 12 x 2 and 6 x 4 one to two points less.
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

inline constexpr int64_t kBlockRows = 104;         // rows of A per pass over the panels, at least
inline constexpr int64_t kBlockBytes = 640 << 10;  // and at most as many as these hold: 197 rows of K = 768, one pass
inline constexpr int64_t kColumnBlockRows = 192;   // the same where columns of A are adjacent
inline constexpr int64_t kPackRows = 8;       // rows of a row-major B packed at a time (32 took up to 4 times as long)
inline constexpr int64_t kBlockSteps = 1024;  // steps per partial sum; 512 cost weight gradients 4 %, forward none
inline constexpr int64_t kAheadRows = 16;     // rows of a row-major B that packing asks for in advance

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

// --- packing --------------------------------------------------------------------------------------------------------

// A matrix in place: element (i, j) is data[i * row + j * col].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

template <class T>
VIT_INLINE int64_t panels_of(int64_t N) {
  return ceil_div(N, kTileColumns<T>);
}
template <class T>
VIT_INLINE int64_t packed_b_bytes(int64_t K, int64_t N) {
  return steps_of<T>(K) * round_up(N, kWordLanes<T>) * static_cast<int64_t>(sizeof(Word<T>));
}

// The word of T for one step, from up to two elements of type P.
template <class T, class P>
VIT_INLINE Word<T> word_of(P first, P second) {
  if constexpr (same<P, bf16>) {
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  } else if constexpr (same<T, bf16>) {
    return word_of<bf16>(from_acc<bf16>(first), from_acc<bf16>(second));
  } else {
    (void)second;
    return static_cast<T>(to_acc(first));
  }
}

// Words of the steps from element k of a row of K elements that are adjacent; 0 beyond its end.
template <class T, class P>
VIT_INLINE Words<T> row_words(const P* row, int64_t k, int64_t K) {
  constexpr int64_t lanes = kWordLanes<T>;
  const int64_t n = K - k;
  if constexpr (!same<T, bf16>) {
    return load<T>(row + k, n);
  } else if constexpr (same<P, bf16>) {
    return n >= 2 * lanes ? load_raw<u32v>(row + k) : load_raw<u32v>(row + k, n);
  } else {
    const f32v first = load<float>(row + k, n), second = n > lanes ? load<float>(row + k + lanes, n - lanes) : f32v{};
#if defined(__AVX512BF16__)
    return bit_cast<u32v>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
#else
    struct {
      u16hv first, second;
    } both = {to_bf16(first), to_bf16(second)};
    return bit_cast<u32v>(both);
#endif
  }
}

// bfloat16 bits of n elements, one per 32-bit lane.
VIT_INLINE u32v bf16_bits(const bf16* p, int64_t n) {
  const u16hv bits = n >= kLanes<float> ? load_raw<u16hv>(p) : load_raw<u16hv>(p, n);
  return widen(bits);
}
VIT_INLINE u32v bf16_bits(const float* p, int64_t n) { return widen(to_bf16(load<float>(p, n))); }

// Words of one step for n columns that are adjacent: `first` is the row of element k, `second` the next or null.
template <class T, class P>
VIT_INLINE Words<T> column_words(const P* first, const P* second, int64_t n) {
  if constexpr (same<T, bf16>) {
    const u32v low = bf16_bits(first, n);
    return second ? low | bf16_bits(second, n) << 16 : low;
  } else {
    (void)second;
    return load<T>(first, n);
  }
}

// The first n words to `out`.
template <class T>
VIT_INLINE void store_words(char* out, Words<T> words, int64_t n) {
  store<Acc<T>>(reinterpret_cast<Acc<T>*>(out), bit_cast<Vec<Acc<T>>>(words), n);
}

// Steps [begin, end) of `vectors` vectors of columns from column j of b[K, N], written to `panel`, which starts at step
// 0.
template <class T, class P>
void pack_panel(const Matrix<P>& b, int64_t j, int64_t vectors, int64_t begin, int64_t end, int64_t K, int64_t N,
                char* panel) {
  constexpr int64_t lanes = kWordLanes<T>, depth = Step<T>::kDepth;
  const auto at = [&](int64_t step, int64_t v) { return panel + (step * vectors + v) * kVectorBytes; };
  if (b.row == 1) {  // k adjacent: transpose blocks of lanes x lanes words in registers
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t s = begin; s < end; s += lanes) {
        Words<T> block[lanes];
        VIT_UNROLL for (int i = 0; i < lanes; ++i) {
          const int64_t column = j + v * lanes + i;
          block[i] = column < N ? row_words<T>(b.data + column * b.col, s * depth, K) : Words<T>{};
        }
        transpose(block);
        const int64_t count = min(lanes, end - s);
        if (count == lanes) {
          VIT_UNROLL for (int i = 0; i < lanes; ++i) memcpy(at(s + i, v), &block[i], kVectorBytes);
        } else {
          for (int64_t i = 0; i < count; ++i) memcpy(at(s + i, v), &block[i], kVectorBytes);
        }
      }
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    const int64_t k = s * depth;
    const P* first = b.data + k * b.row;
    const P* second = k + 1 < K ? first + b.row : nullptr;
    for (int64_t v = 0; v < vectors; ++v) {
      if (b.col == 1) __builtin_prefetch(first + kAheadRows * b.row + j + v * lanes, 0, 3);
      const int64_t column = j + v * lanes, n = min(lanes, N - column);
      if (b.col == 1) {
        const Words<T> words = column_words<T>(first + column, second ? second + column : nullptr, n);
        memcpy(at(s, v), &words, kVectorBytes);
      } else {
        Word<T> words[lanes] = {};
        for (int64_t i = 0; i < n; ++i)
          words[i] = word_of<T>(first[(column + i) * b.col], second ? second[(column + i) * b.col] : P{});
        memcpy(at(s, v), words, kVectorBytes);
      }
    }
  }
}

// Packs b[K, N] into packed_b_bytes(K, N) bytes.
template <class T, class P>
void pack_b(int threads, const Matrix<P>& b, int64_t K, int64_t N, char* packed) {
  constexpr int64_t lanes = kWordLanes<T>;
  const int64_t steps = steps_of<T>(K), panels = panels_of<T>(N);
  // Follow the memory of b: all of k for a panel, or a few rows (they stay in L2) for one panel after the other.
  const bool transposed = b.row == 1;
  const int64_t chunk_steps = transposed ? kBlockSteps : kPackRows / Step<T>::kDepth;
  const int64_t chunks = ceil_div(steps, chunk_steps);
  parallel_for(threads, panels * chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = transposed ? unit / chunks : unit % panels;
      const int64_t chunk = transposed ? unit % chunks : unit / panels;
      const int64_t j = panel * kTileColumns<T>, vectors = ceil_div(min<int64_t>(N - j, kTileColumns<T>), lanes);
      pack_panel<T>(b, j, vectors, chunk * chunk_steps, min(steps, (chunk + 1) * chunk_steps), K, N,
                    packed + j * steps * static_cast<int64_t>(sizeof(Word<T>)));
    }
  });
}

struct Packed {};  // in place of the element type of a matrix that is not there any more

// B[K, N] in panels. Where `matrix` is given, whoever reads a panel for the first time packs it, so that it is used
// while it is in L2 and the time its memory takes is spent on the panel before; else `packed` holds all of it already.
template <class T, class P>
struct Right {
  Matrix<P> matrix;  // data may be null
  char* packed;
  int64_t K, N;

  bool packs() const { return matrix.data != nullptr; }
  int64_t steps() const { return steps_of<T>(K); }
  int64_t columns(int64_t panel) const { return min<int64_t>(N - panel * kTileColumns<T>, kTileColumns<T>); }
  int64_t vectors(int64_t panel) const { return ceil_div(columns(panel), kWordLanes<T>); }
  char* at(int64_t panel) const {
    return packed + panel * steps() * kTileColumns<T> * static_cast<int64_t>(sizeof(Word<T>));
  }
  void pack(int64_t panel, int64_t begin, int64_t end) const {
    if constexpr (!same<P, Packed>)
      pack_panel<T>(matrix, panel * kTileColumns<T>, vectors(panel), begin, end, K, N, at(panel));
  }

  // The lines of a panel that tile number t of the panel before asks for: all steps of one line of its rows, or, where
  // k is adjacent, as many lines of its columns, which follow each other in an ordinary weight.
  Ahead ahead(int64_t panel, int64_t t, bool pack) const {
    const int64_t line = t * 64;
    if (!pack) return {at(panel) + line * steps(), 64};
    constexpr int64_t size = sizeof(P);
    const char* first = reinterpret_cast<const char*>(matrix.data + panel * kTileColumns<T> * matrix.col);
    if (matrix.row == 1) return {first + line * steps(), 64};
    return {first + line, matrix.row * size * Step<T>::kDepth};
  }
};

// A as tile reads it.
struct Left {
  const char* data;
  int64_t stride;  // bytes: from row to row, or with `columns` from step to step
  bool columns;
};

enum class LeftCopy { none, rows, columns };

// What prepare_a must do with a: nothing where a step's word can be read in place.
template <class T>
VIT_INLINE LeftCopy left_copy(const Matrix<T>& a, int64_t K) {
  constexpr bool pairs = Step<T>::kDepth > 1;
  if (a.col == 1) return pairs && K % 2 ? LeftCopy::rows : LeftCopy::none;
  if (a.row == 1) return pairs ? LeftCopy::columns : LeftCopy::none;
  return LeftCopy::rows;
}

template <class T>
VIT_INLINE int64_t prepared_a_bytes(const Matrix<T>& a, int64_t M, int64_t K) {
  return left_copy(a, K) == LeftCopy::none ? 0 : M * steps_of<T>(K) * static_cast<int64_t>(sizeof(Word<T>));
}

// a[M, K] as tile can read it; `copy` has prepared_a_bytes.
template <class T>
Left prepare_a(int threads, const Matrix<T>& a, int64_t M, int64_t K, char* copy) {
  constexpr int64_t size = sizeof(Word<T>), depth = Step<T>::kDepth, lanes = kWordLanes<T>;
  const int64_t steps = steps_of<T>(K);
  const LeftCopy how = left_copy(a, K);
  if (how == LeftCopy::none) {
    const bool columns = a.col != 1;
    return {reinterpret_cast<const char*>(a.data), (columns ? a.col : a.row) * static_cast<int64_t>(sizeof(T)),
            columns};
  }
  if (how == LeftCopy::columns) {
    parallel_for(threads, steps, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) {
        const T* first = a.data + s * depth * a.col;
        const T* second = s * depth + 1 < K ? first + a.col : nullptr;
        for (int64_t i = 0; i < M; i += lanes) {
          const int64_t n = min(lanes, M - i);
          const Words<T> words = column_words<T>(first + i, second ? second + i : nullptr, n);
          store_words<T>(copy + (s * M + i) * size, words, n);
        }
      }
    });
    return {copy, M * size, true};
  }
  parallel_for(threads, M, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.col == 1) {
        for (int64_t s = 0; s < steps; s += lanes)
          store_words<T>(copy + (i * steps + s) * size, row_words<T>(a.data + i * a.row, s * depth, K), steps - s);
        continue;
      }
      for (int64_t s = 0; s < steps; ++s) {
        const T* first = a.data + i * a.row + s * depth * a.col;
        const Word<T> word = word_of<T>(first[0], s * depth + 1 < K ? first[a.col] : T{});
        memcpy(copy + (i * steps + s) * size, &word, size);
      }
    }
  });
  return {copy, steps * size, false};
}

// --- gemm -----------------------------------------------------------------------------------------------------------

// A finished tile: rows x columns of C from (row, column), `stride` elements from row to row. Where the steps are
// blocked it holds one block's sum; first and last say which.
template <class A>
struct Tile {
  const A* data;
  int64_t stride, row, rows, column, columns;
  bool first, last;
};

// How many threads share the rows; the others share the panels. Panels alone where there are enough of them: each is
// then packed by the thread that needs it. Else rows first, as long as a thread keeps about 48, because each pass over
// the panels is paid by all rows of a block.
template <class T>
int64_t row_threads(int threads, int64_t M, int64_t panels) {
  if (panels >= 2 * threads) return 1;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t rows = 1; rows <= threads; ++rows) {
    const int64_t share = ceil_div(M, rows), tiles = ceil_div(share, kTileRows);
    const int64_t cost = tiles * ceil_div(panels, threads / rows) * 64 + (share < 48 ? rows : 0);
    if (cost <= best_cost) best = rows, best_cost = cost;
  }
  return best;
}

// Asks for the memory an epilogue will read and write for a tile, while the tile is computed.
template <class E>
VIT_INLINE auto ask(const E& epilogue, int64_t row, int64_t rows, int64_t column, int64_t columns, int)
    -> decltype(epilogue.ask(row, rows, column, columns)) {
  epilogue.ask(row, rows, column, columns);
}
template <class E>
VIT_INLINE void ask(const E&, int64_t, int64_t, int64_t, int64_t, ...) {}  // an epilogue that does not say

// The lines of `columns` elements in each of `rows` rows, to be written or only read.
template <bool kWrite, class O>
VIT_INLINE void ask_rows(const O* first, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(O));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(first + r * stride + j, kWrite, 3);
}

// Rows [row_begin, row_end) x panels [panel_begin, panel_end) on the calling thread.
template <class T, bool kColumns, class P, class E>
void gemm_range(const Left& a, const Right<T, P>& b, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                int64_t panel_end, const E& epilogue) {
  using A = Acc<T>;
  constexpr int64_t word = sizeof(Word<T>), lanes = kWordLanes<T>;
  alignas(64) A sums[kTileRows * kTileColumns<T>];
  const int64_t steps = b.steps();
  const int64_t block_rows = kColumns ? kColumnBlockRows : max(kBlockRows, kBlockBytes / max(steps * word, int64_t{1}));
  const int64_t row_blocks = ceil_div(row_end - row_begin, block_rows);
  const int64_t blocks = max<int64_t>(ceil_div(steps, kBlockSteps), 1);
  for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
    const int64_t r0 = row_begin + (row_end - row_begin) * row_block / row_blocks;
    const int64_t r1 = row_begin + (row_end - row_begin) * (row_block + 1) / row_blocks;
    const int64_t tiles = ceil_div(r1 - r0, kTileRows);  // of nearly equal height: 7 and 8 rows, never 8, 8, 1
    const bool packs = b.packs() && row_block == 0;
    // Rows adjacent in k: a tile runs through all blocks of steps. Else all tiles do one block, then the next, so that
    // the strided part of A stays in L2.
    for (int64_t outer = 0; outer < (kColumns ? blocks : 1); ++outer) {
      const int64_t first_block = outer, end_block = kColumns ? outer + 1 : blocks;
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t vectors = b.vectors(panel), line = vectors * kVectorBytes;
        const char* panel_b = b.at(panel);
        if (packs) b.pack(panel, first_block * kBlockSteps, min(end_block * kBlockSteps, steps));
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t i0 = r0 + (r1 - r0) * t / tiles, i1 = r0 + (r1 - r0) * (t + 1) / tiles;
          const auto run = tile_for<T, kColumns>(i1 - i0, vectors);
          const bool asks = panel + 1 < panel_end && t * 64 < line;
          ask(epilogue, i0, i1 - i0, panel * kTileColumns<T>, b.columns(panel), 0);
          const Ahead ahead = asks ? b.ahead(panel + 1, t, packs) : Ahead{panel_b, 64};
          for (int64_t block = first_block; block < end_block; ++block) {
            const int64_t s0 = block * kBlockSteps, count = min(kBlockSteps, steps - s0);
            const char* left = a.data + (kColumns ? s0 * a.stride + i0 * word : i0 * a.stride + s0 * word);
            run(left, a.stride, panel_b + s0 * line, count, {ahead.first + s0 * ahead.stride, ahead.stride},
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
VIT_INLINE void gemm_range(const Left& a, const char* packed_b, int64_t N, int64_t steps, int64_t row_begin,
                           int64_t row_end, int64_t panel_begin, int64_t panel_end, const E& epilogue) {
  const Right<T, Packed> b{{nullptr, 0, 0}, const_cast<char*>(packed_b), steps * Step<T>::kDepth, N};
  gemm_range<T, kColumns>(a, b, row_begin, row_end, panel_begin, panel_end, epilogue);
}

// C[M, N] = A B for a prepared A; calls epilogue(Tile) on the thread that computed the tile.
template <class T, class P, class E>
void gemm(int threads, const Left& a, Right<T, P> b, int64_t M, const E& epilogue) {
  if (M == 0 || b.N == 0) return;
  const int64_t panels = panels_of<T>(b.N), row_parts = min(row_threads<T>(threads, M, panels), M);
  const int64_t column_parts = min(max<int64_t>(threads / row_parts, 1), panels);
  if (b.packs() && row_parts > 1) {  // several threads read each panel: it must be there before
    pack_b<T>(threads, b.matrix, b.K, b.N, b.packed);
    b.matrix.data = nullptr;
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

// The plain epilogue: stores C as type O, `ld` elements from row to row. Sums of blocked steps wait in `partial`, which
// has the layout of out and is out itself where O is the accumulator type.
template <class A, class O>
struct Store {
  O* out;
  A* partial;
  int64_t ld;

  VIT_INLINE void ask(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    ask_rows<true>(out + row * ld + column, ld, rows, columns);
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

// --- workspace ------------------------------------------------------------------------------------------------------

// Hands out parts of a workspace, each on a cache line. From a null base it only counts: `used` is then the size.
struct Arena {
  char* base;
  int64_t used = 0;

  char* take(int64_t bytes) {
    char* part = base ? base + used : nullptr;
    used += round_up(bytes, kAlign);
    return part;
  }
};

}  // namespace vit::VIT_ISA
