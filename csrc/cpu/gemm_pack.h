// Operands as tile reads them.
//
//   pack_b    B as panels of kTileColumns columns, [panel][step][column]: what tile reads is one contiguous stream.
//   Rhs     a B whose panels are packed one by one where they are used first.
//   prepare_a A is read where it lies (rows or columns adjacent); it is copied only where its strides forbid that. Not
//             packing A was worth 10 to 15 % (float32, M = 197 and 1576, Zen 4).
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {

inline constexpr int64_t kPackRows = 8;       // rows of a row-major B packed at a time (32 took up to 4 times as long)
inline constexpr int64_t kBlockSteps = 1024;  // steps per partial sum; 512 cost weight gradients 4 % (Zen 4)
inline constexpr int64_t kAheadRows = 16;     // rows of a row-major B that packing asks for in advance

// --- B ---------------------------------------------------------------------------------------------------------------

// A matrix in place: element (i, j) is data[i * row + j * col].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

// A float that takes part in products of bfloat16: rounded when it is read, also where their operands are float.
struct rounded {
  float value;
};
VIT_INLINE float to_acc(rounded x) { return to_acc(from_acc<bf16>(x.value)); }

template <>
struct Memory<float, rounded> {
  static VIT_INLINE f32v load(const rounded* p) { return from_bf16(to_bf16(load_raw<f32v>(p))); }
  static VIT_INLINE f32v load(const rounded* p, int64_t n) { return from_bf16(to_bf16(load_raw<f32v>(p, n))); }
};

// How a product of elements T reads a matrix of elements P.
template <class T, class S, class P>
struct SourceOf {
  using type = P;
};
template <>
struct SourceOf<bf16, float, float> {
  using type = rounded;
};
template <class T, class P>
using Source = typename SourceOf<T, Operand<T>, P>::type;

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
  if constexpr (!same<T, bf16>) {
    (void)second;
    return static_cast<T>(to_acc(first));
  } else if constexpr (same<P, bf16>) {
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
  } else {
    return word_of<bf16>(from_acc<bf16>(first), from_acc<bf16>(second));
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
struct Rhs {
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
  // Steps [begin, end) of a panel that starts at `to`.
  void pack(int64_t panel, int64_t begin, int64_t end, char* to) const {
    if constexpr (!same<P, Packed>)
      pack_panel<T>(matrix, panel * kTileColumns<T>, vectors(panel), begin, end, K, N, to);
  }

  // The lines of a panel that tile number t of the panel before asks for: all steps of one line of its rows, or, where
  // k is adjacent, as many lines of its columns, which follow each other in an ordinary weight.
  Prefetch ahead(int64_t panel, int64_t t, bool pack) const {
    const int64_t line = t * 64;
    if (!pack) return {at(panel) + line * steps(), 64};
    constexpr int64_t size = sizeof(P);
    const char* first = reinterpret_cast<const char*>(matrix.data + panel * kTileColumns<T> * matrix.col);
    if (matrix.row == 1) return {first + line * steps(), 64};
    return {first + line, matrix.row * size * Step<T>::kDepth};
  }
};

// --- A ---------------------------------------------------------------------------------------------------------------

// A as tile reads it.
struct Lhs {
  const char* data;
  int64_t stride;  // bytes: from row to row, or with `columns` from step to step
  bool columns;
};

enum class LhsCopy { none, rows, columns };

// What prepare_a must do with a: nothing where a step's word can be read in place.
template <class T>
VIT_INLINE LhsCopy lhs_copy(const Matrix<T>& a, int64_t K) {
  constexpr bool kPairs = Step<Operand<T>>::kDepth > 1, kSame = same<T, Operand<T>>;
  if (a.col == 1) return kSame && !(kPairs && K % 2) ? LhsCopy::none : LhsCopy::rows;
  if (a.row == 1 && !kMatrixTiles<Operand<T>>) return kSame && !kPairs ? LhsCopy::none : LhsCopy::columns;
  return LhsCopy::rows;
}

// Bytes from row to row of a matrix whose columns tiles read: an odd number of cache lines, which meet every set of a
// cache. Rows of 3072 floats meet a sixteenth of L2's, and its lines push each other out.
VIT_INLINE int64_t spread_bytes(int64_t bytes) { return round_up(bytes, kAlign) | kAlign; }

template <class T>
VIT_INLINE int64_t prepared_a_bytes(const Matrix<T>& a, int64_t M, int64_t K) {
  using S = Operand<T>;
  constexpr int64_t size = sizeof(Word<S>);
  switch (lhs_copy(a, K)) {
    case LhsCopy::none:
      return 0;
    case LhsCopy::columns:
      return steps_of<S>(K) * spread_bytes(M * size);
    case LhsCopy::rows:
      return M * steps_of<S>(K) * size;
  }
  return 0;
}

// a[M, K] with adjacent columns, as words in rows: blocks of lanes x lanes words are transposed in registers.
template <class T>
void transpose_a(int threads, const Matrix<T>& a, int64_t M, int64_t K, char* copy) {
  using S = Operand<T>;
  constexpr int64_t size = sizeof(Word<S>), depth = Step<S>::kDepth, lanes = kWordLanes<S>;
  const int64_t steps = steps_of<S>(K);
  parallel_for(threads, ceil_div(M, lanes), [&](int64_t begin, int64_t end, int) {
    for (int64_t s = 0; s < steps; s += lanes)
      for (int64_t i = begin * lanes; i < min(end * lanes, M); i += lanes) {
        const int64_t rows = min(lanes, M - i);
        Words<S> block[lanes];
        VIT_UNROLL for (int64_t step = 0; step < lanes; ++step) {
          const int64_t k = (s + step) * depth;
          const T* first = a.data + k * a.col + i;
          block[step] = k < K ? column_words<S>(first, k + 1 < K ? first + a.col : nullptr, rows) : Words<S>{};
        }
        transpose(block);
        for (int64_t r = 0; r < rows; ++r) store_words<S>(copy + ((i + r) * steps + s) * size, block[r], steps - s);
      }
  });
}

// a[M, K] as tile reads operands of type Operand<T>; `copy` has prepared_a_bytes.
template <class T>
Lhs prepare_a(int threads, const Matrix<T>& a, int64_t M, int64_t K, char* copy) {
  using S = Operand<T>;
  constexpr int64_t size = sizeof(Word<S>), depth = Step<S>::kDepth, lanes = kWordLanes<S>;
  const int64_t steps = steps_of<S>(K);
  const LhsCopy how = lhs_copy(a, K);
  if (how == LhsCopy::none) {
    const bool columns = a.col != 1;
    return {reinterpret_cast<const char*>(a.data), (columns ? a.col : a.row) * static_cast<int64_t>(sizeof(T)),
            columns};
  }
  if (how == LhsCopy::columns) {
    const int64_t stride = spread_bytes(M * size);
    parallel_for(threads, steps, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) {
        const T* first = a.data + s * depth * a.col;
        const T* second = s * depth + 1 < K ? first + a.col : nullptr;
        for (int64_t i = 0; i < M; i += lanes) {
          const int64_t n = min(lanes, M - i);
          const Words<S> words = column_words<S>(first + i, second ? second + i : nullptr, n);
          store_words<S>(copy + s * stride + i * size, words, n);
        }
      }
    });
    return {copy, stride, true};
  }
  if constexpr (kMatrixTiles<S>) {
    if (a.row == 1 && a.col != 1) {
      transpose_a(threads, a, M, K, copy);
      return {copy, steps * size, false};
    }
  }
  parallel_for(threads, M, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.col == 1) {
        for (int64_t s = 0; s < steps; s += lanes)
          store_words<S>(copy + (i * steps + s) * size, row_words<S>(a.data + i * a.row, s * depth, K), steps - s);
        continue;
      }
      for (int64_t s = 0; s < steps; ++s) {
        const T* first = a.data + i * a.row + s * depth * a.col;
        const Word<S> word = word_of<S>(first[0], s * depth + 1 < K ? first[a.col] : T{});
        memcpy(copy + (i * steps + s) * size, &word, size);
      }
    }
  });
  return {copy, steps * size, false};
}

}  // namespace vit::VIT_ISA
