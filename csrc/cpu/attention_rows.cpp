// attention_rows: P = softmax(scale q k^T) of chosen queries, which attention_fwd multiplies with v, in memory.
//
//   m_i = max_j q_i k_j,  P_ij = exp(scale (q_i k_j - m_i)) / sum_j exp(scale (q_i k_j - m_i))
//
// Threads take blocks of queries of a head. Keys come in blocks, packed into the panels that `tile` of gemm_tile.h
// reads; each row tile of queries leaves its scores where its probabilities will be, and a row becomes them when it is
// whole. Per row 2 L D FLOPs and L exponentials in the precision of the accumulator, whose type the rows have.
#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

// Which queries stand beside each other changes no row: its sums follow from L, D and the dtype.
constexpr int64_t kKeys = 640;    // per block: packed they take 160 KB of L2 (D 64, float32)
constexpr int64_t kQueries = 64;  // per unit of work, for which the keys are packed: 2 to 3 % of its work

// Scratch memory of one thread.
template <class T>
struct Scratch {
  using A = Acc<T>;
  char* keys;   // packed
  T* queries;   // a row tile
  char* words;  // the same, where its words cannot be read in place
  A* scores;    // [kScoreRows<T>, width of a block of keys]
  int64_t bytes;

  Scratch(const AttentionRows& p, char* base) {
    constexpr int64_t kWord = sizeof(Word<Operand<T>>), kElement = sizeof(T), kSum = sizeof(A);
    Arena arena{base};
    const int64_t count = min(p.L, kKeys);
    keys = arena.take(packed_bytes<T>(p.D, count));
    queries = reinterpret_cast<T*>(arena.take(kScoreRows<T> * p.D * kElement));
    words = arena.take(kScoreRows<T> * steps_of<Operand<T>>(p.D) * kWord);
    scores = reinterpret_cast<A*>(arena.take(kScoreRows<T> * Panels<T>(count).width() * kSum));
    bytes = arena.used;
  }
};

// Calls f(j, n) for the vectors of a row of `count`: n elements from j on.
template <class A, class F>
VIT_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) f(j, int64_t{kLanes<A>});
  if (j < count) f(j, count - j);
}

// A row of scores to their softmax, in place. scale includes log2(e). A row of -infinity only becomes NaN, like the
// reference's.
template <class A, bool kNegative>
VIT_INLINE void softmax(A* row, int64_t keys, A scale) {
  const Larger<kNegative> larger;
  Vec<A> largest = broadcast(kLeast<A, kNegative>), sums{};
  for_vectors<A>(keys, [&](int64_t j, int64_t n) {
    largest = larger(keep(load<A>(row + j, n), n, kLeast<A, kNegative>), largest);
  });
  const A origin = fold<A, kLanes<A>>(largest, larger);
  for_vectors<A>(keys, [&](int64_t j, int64_t n) {
    const Vec<A> e = exp2<A>(scale * (load<A>(row + j, n) - origin));
    store<A>(row + j, e, n);
    sums += keep(e, n, A(0));
  });
  const Vec<A> total = broadcast(sum(sums));
  for_vectors<A>(keys, [&](int64_t j, int64_t n) { store<A>(row + j, load<A>(row + j, n) / total, n); });
}

// One thread at work on units, the blocks of queries of each head.
template <class T, bool kNegative>
struct Worker {
  using A = Acc<T>;
  const AttentionRows& p;
  const Scratch<T> scratch;
  const Blocks blocks;
  int64_t packed = -1;  // which block of which head's keys scratch holds

  Worker(const AttentionRows& p, char* memory) : p(p), scratch(p, memory), blocks(Blocks::of(p.R, kQueries)) {}

  int64_t query(int64_t row) const { return p.queries ? static_cast<const int64_t*>(p.queries)[row] : row; }
  A* out(int64_t head, int64_t row) const {
    return static_cast<A*>(p.rows.data) + head / p.H * p.rows.batch + row * p.rows.token + head % p.H * p.rows.head;
  }
  const T* of_head(const Heads& x, int64_t head, int64_t n) const {
    return static_cast<const T*>(x.data) + head / p.H * x.batch + n * x.token + head % p.H * x.head;
  }

  void pack_keys(int64_t head, int64_t j, int64_t keys) {
    const int64_t number = head * p.L + j;
    if (packed == number) return;
    packed = number;
    pack(Matrix<T>{of_head(p.k, head, j), 1, p.k.token}, p.D, keys, scratch.keys);
  }

  // Scores of rows [i, i + rows) with the packed keys.
  void row_tile(int64_t head, int64_t i, int64_t rows, int64_t j, int64_t keys) const {
    for (int64_t r = 0; r < rows; ++r)
      memcpy(scratch.queries + r * p.D, of_head(p.q, head, query(i + r)), static_cast<size_t>(p.D) * sizeof(T));
    const Panels<T> panels(keys);
    const RowTile<A> scores{scratch.scores, panels.width(), rows};
    const Lhs lhs = prepare_a(1, Matrix<T>{scratch.queries, p.D, 1}, rows, p.D, scratch.words);
    PrefetchQueue nothing;
    multiply<T>(lhs.data, lhs.stride, scratch.keys, steps_of<Operand<T>>(p.D), panels, false, scores, nothing);
    for (int64_t r = 0; r < rows; ++r) store_row(scores, r, A(1), keys, out(head, i + r) + j);
  }

  void run(int64_t unit) {
    const int64_t head = unit / blocks.count, block = unit % blocks.count;
    const int64_t first = blocks.begin(block), count = blocks.end(block) - first;
    const Blocks tiles = Blocks::of(count, kScoreRows<T>);
    for (int64_t j = 0; j < p.L; j += kKeys) {
      const int64_t keys = min(kKeys, p.L - j);
      pack_keys(head, j, keys);
      for (int64_t t = 0; t < tiles.count; ++t)
        row_tile(head, first + tiles.begin(t), tiles.end(t) - tiles.begin(t), j, keys);
    }
    const A scale = static_cast<A>(p.scale * 1.44269504088896340736);
    for (int64_t i = first; i < first + count; ++i) softmax<A, kNegative>(out(head, i), p.L, scale);
  }
};

template <class T, bool kNegative>
void run_all(const AttentionRows& p) {
  const int64_t units = p.L ? p.B * p.H * Blocks::of(p.R, kQueries).count : 0, bytes = Scratch<T>(p, nullptr).bytes;
  const int threads = threads_for(p.context.num_threads, p.B * p.H * p.R * p.L * p.D);
  parallel_for(threads, units, [&](int64_t begin, int64_t end, int thread) {
    const TileRegisters<Operand<T>> registers;
    Worker<T, kNegative> worker(p, static_cast<char*>(p.workspace) + thread * bytes);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
  });
}

}  // namespace

void attention_rows(const AttentionRows& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.scale < 0 ? run_all<T, true>(p) : run_all<T, false>(p);
  });
}

std::size_t attention_rows_workspace(const AttentionRows& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) { bytes = Scratch<decltype(t)>(p, nullptr).bytes; });
  return static_cast<std::size_t>(p.context.num_threads * bytes);
}

}  // namespace vit::VIT_ISA
