// attention forward: out = P v, P = softmax(scale q k^T) for each batch and head.
//
//   m_i = max_j q_i k_j,  l_i = sum_j exp(scale (q_i k_j - m_i)),  P_ij = exp(scale (q_i k_j - m_i)) / l_i
//
// Saved for the backward: out, m and 1 / l. Per head 4 N L D FLOPs and N L exponentials on (2 N + 2 L) D elements.
//
// Threads take blocks of queries of a head. Keys come in blocks, those of a head packed once where all of them fit L2,
// into the panels that `tile` of gemm_tile.h reads; each row tile of queries makes its scores, their exponentials and
// the product with v while they are in L1. With more than one block of keys the softmax is online: sums and outputs so
// far are rescaled when a larger score appears. The rows of q, k and v that come next are asked for meanwhile: in a
// packed projection they lie 3 KB or more apart, where no hardware looks for them (15 % of the time, 8 images, Zen 4).
//
// Sources: Dao et al., "FlashAttention", arXiv:2205.14135; Milakov and Gimelshein, "Online normalizer calculation for
// softmax", arXiv:1805.02867.
#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

// --- sizes ----------------------------------------------------------------------------------------------------------
// All of them follow from N, L, D and the dtype, never from the batch or the threads: they decide the order of sums.

constexpr int64_t kForwardKeys = 640;  // per block: K and V packed take 320 KB of L2 (D 64, float32)
constexpr int64_t kKeyUnit = 16;       // blocks begin at multiples of it: only the last one has columns of padding
constexpr int64_t kResidentBytes = 768 << 10;  // of L2, for all packed keys and values of a head: 1370 of them, float32
constexpr int64_t kForwardQueries = 64;        // per unit of work: B 1, H 3 still gives 12 units
constexpr int64_t kLongForwardQueries = 256;   // where each unit packs all keys again: 2 to 5 % of the work

template <class T>
struct Sizes {
  int64_t L;
  Blocks key_units;  // kKeyUnit keys each
  Panels<T> key_panels, head_panels;
  int64_t keys_bytes, values_bytes;  // of a packed block
  bool resident;                     // all blocks of a head stay packed
  Blocks queries;
  int64_t steps;  // of a product over the head

  explicit Sizes(const AttentionFwd& p)
      : L(p.L),
        key_units(Blocks::of(ceil_div(p.L, kKeyUnit), kForwardKeys / kKeyUnit)),
        key_panels(min(key_units.largest() * kKeyUnit, p.L)),
        head_panels(p.D),
        keys_bytes(packed_bytes<T>(p.D, key_panels.width())),
        values_bytes(packed_bytes<T>(key_panels.width(), p.D)),
        resident(key_blocks() == 1 || key_blocks() * (keys_bytes + values_bytes) <= kResidentBytes),
        queries(Blocks::of(p.N, resident ? kForwardQueries : kLongForwardQueries)),
        steps(steps_of<Operand<T>>(p.D)) {}

  int64_t key_blocks() const { return key_units.count; }
  int64_t packed_blocks() const { return resident ? key_blocks() : 1; }
  int64_t key_begin(int64_t block) const { return key_units.begin(block) * kKeyUnit; }
  int64_t key_end(int64_t block) const { return min(key_units.end(block) * kKeyUnit, L); }
};

// Scratch memory of one thread.
template <class T>
struct Scratch {
  using A = Acc<T>;
  char *keys, *values;        // packed
  char* queries;              // a row tile, where its words cannot be read in place
  A* scores;                  // [kScoreRows<T>, key_panels.width()]
  Operand<T>* probabilities;  // the same, in place of the scores where the type is theirs
  A* outputs;                 // [queries, head_panels.width()], not yet divided by their totals
  A *largest, *totals;        // of each query of the block

  Scratch(const Sizes<T>& s, Arena& arena) {
    const auto take = [&](int64_t count, int64_t size) { return arena.take(count * size); };
    keys = take(s.packed_blocks(), s.keys_bytes);
    values = take(s.packed_blocks(), s.values_bytes);
    queries = take(kScoreRows<T> * s.steps, sizeof(Word<Operand<T>>));
    scores = reinterpret_cast<A*>(take(kScoreRows<T> * s.key_panels.width(), sizeof(A)));
    if constexpr (same<Operand<T>, A>)
      probabilities = scores;
    else
      probabilities = reinterpret_cast<Operand<T>*>(take(kScoreRows<T> * s.key_panels.width(), sizeof(Operand<T>)));
    outputs = reinterpret_cast<A*>(take(s.queries.largest() * s.head_panels.width(), sizeof(A)));
    largest = reinterpret_cast<A*>(take(s.queries.largest(), sizeof(A)));
    totals = reinterpret_cast<A*>(take(s.queries.largest(), sizeof(A)));
  }
};

// --- softmax --------------------------------------------------------------------------------------------------------

// The largest of a row of scores.
template <class A, bool kNegative>
VIT_INLINE A largest_of(const A* row, int64_t keys) {
  constexpr int64_t lanes = kLanes<A>;
  const Larger<kNegative> larger;
  Vec<A> largest = broadcast(kLeast<A, kNegative>);
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes) largest = larger(load<A>(row + j), largest);
  if (j < keys) largest = larger(keep(load<A>(row + j), keys - j, kLeast<A, kNegative>), largest);
  return fold<A, lanes>(largest, larger);
}

// A row of scores to their exponentials relative to `origin`; returns the sum of them. scale includes log2(e).
template <class T>
VIT_INLINE Acc<T> exponentials(const Acc<T>* row, int64_t keys, Acc<T> scale, Acc<T> origin, Operand<T>* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  V sums{};
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes) {
    const V e = exp2<T>(scale * (load<A>(row + j) - origin));
    sums += e;
    store<A>(out + j, e);
  }
  if (j < keys) {
    const V e = keep(exp2<T>(scale * (load<A>(row + j) - origin)), keys - j, A(0));
    sums += e;
    store<A>(out + j, e);
  }
  return sum(sums);
}

// A row tile of scores to exponentials. The largest score of each row and the total of its exponentials are updated;
// where they were those of older keys, rescale(row, factor) is called for what was summed with the older total.
// All rows have their largest score before the first exponential: the latencies of eight reductions overlap.
template <class T, bool kNegative, class F>
VIT_INLINE void softmax(const RowTile<Acc<T>>& scores, int64_t keys, Acc<T> scale, Operand<T>* out, bool first,
                        Acc<T>* largest, Acc<T>* totals, const F& rescale) {
  using A = Acc<T>;
  constexpr A least = kLeast<A, kNegative>;
  A now[kScoreRows<T>];
  for (int64_t r = 0; r < scores.rows; ++r) now[r] = largest_of<A, kNegative>(scores.data + r * scores.stride, keys);
  for (int64_t r = 0; r < scores.rows; ++r) {
    A total = A(0);
    if (!first) now[r] = (kNegative ? now[r] < largest[r] : now[r] > largest[r]) ? now[r] : largest[r];
    // A row of -infinity only has the total 0 and, divided by it, NaN everywhere, like the reference.
    const A origin = now[r] == least ? A(0) : now[r];
    if (!first) {
      const A factor = largest[r] == least ? A(0) : exp2<A>(broadcast(scale * (largest[r] - origin)))[0];
      total = totals[r] * factor;
      if (factor != A(1)) rescale(r, factor);
    }
    const int64_t at = r * scores.stride;
    totals[r] = total + exponentials<T>(scores.data + at, keys, scale, origin, out + at);
    largest[r] = now[r];
  }
}

// --- units ----------------------------------------------------------------------------------------------------------

// One thread at work on units, the blocks of queries of each head.
template <class T, bool kNegative>
struct Worker {
  using A = Acc<T>;
  const AttentionFwd& p;
  const Sizes<T> s;
  const Scratch<T> scratch;
  const int64_t end;    // of the units of this thread
  int64_t packed = -1;  // the keys that scratch holds: see `packing`

  Worker(const AttentionFwd& p, Arena arena, int64_t end) : p(p), s(p), scratch(s, arena), end(end) {}

  const T* of_head(const Heads& x, int64_t head) const {
    return static_cast<const T*>(x.data) + head / p.H * x.batch + head % p.H * x.head;
  }
  const T* query(int64_t unit) const {
    return of_head(p.q, unit / s.queries.count) + s.queries.begin(unit % s.queries.count) * p.q.token;
  }
  T* output(int64_t unit) const {
    const int64_t head = unit / s.queries.count, i = s.queries.begin(unit % s.queries.count);
    return static_cast<T*>(p.out) + ((head / p.H * p.N + i) * p.H + head % p.H) * p.D;
  }
  int64_t queries(int64_t unit) const {
    return s.queries.end(unit % s.queries.count) - s.queries.begin(unit % s.queries.count);
  }
  const T* key(int64_t head, int64_t j) const { return of_head(p.k, head) + j * p.k.token; }
  const T* value(int64_t head, int64_t j) const { return of_head(p.v, head) + j * p.v.token; }

  // A number for what is packed together: the keys of a head, or a block of them.
  int64_t packing(int64_t head, int64_t block) const { return s.resident ? head : head * s.key_blocks() + block; }

  // What is read after this block of keys: what is packed next, and the queries of the next unit.
  PrefetchQueue after(int64_t unit, int64_t block) const {
    PrefetchQueue upcoming;
    const bool last = block + 1 == s.key_blocks();
    const int64_t next_unit = unit + last, next_block = last ? 0 : block + 1, head = next_unit / s.queries.count;
    if (next_unit == end) return upcoming;
    if (packed != packing(head, next_block)) {
      const int64_t j = s.resident ? 0 : s.key_begin(next_block), keys = (s.resident ? s.L : s.key_end(next_block)) - j;
      upcoming.add(key(head, j), p.k.token, keys, p.D);
      upcoming.add(value(head, j), p.v.token, keys, p.D);
    }
    if (last) {
      upcoming.add(query(next_unit), p.q.token, queries(next_unit), p.D);
      upcoming.add(output(next_unit), p.H * p.D, queries(next_unit), p.D);
    }
    return upcoming;
  }

  char* keys_of(int64_t block) const { return scratch.keys + (s.resident ? block * s.keys_bytes : 0); }
  char* values_of(int64_t block) const { return scratch.values + (s.resident ? block * s.values_bytes : 0); }

  void pack_keys(int64_t head, int64_t block) {
    if (packed == packing(head, block)) return;
    packed = packing(head, block);
    for (int64_t b = s.resident ? 0 : block; b < (s.resident ? s.key_blocks() : block + 1); ++b) {
      const int64_t j = s.key_begin(b), keys = s.key_end(b) - j;
      pack(Matrix<T>{key(head, j), 1, p.k.token}, p.D, keys, keys_of(b));
      pack(Matrix<T>{value(head, j), p.v.token, 1}, keys, p.D, values_of(b));
    }
  }

  void run(int64_t unit) {
    const int64_t head = unit / s.queries.count;
    const Blocks tiles = Blocks::of(queries(unit), kScoreRows<T>);
    for (int64_t block = 0; block < s.key_blocks(); ++block) {
      pack_keys(head, block);
      PrefetchQueue upcoming = after(unit, block);
      for (int64_t t = 0; t < tiles.count; ++t)
        row_tile(unit, tiles.begin(t), tiles.end(t) - tiles.begin(t), block, upcoming);
    }
  }

  // Rows [i, i + rows) of a unit against one block of keys.
  VIT_INLINE void row_tile(int64_t unit, int64_t i, int64_t rows, int64_t block, PrefetchQueue& upcoming) const {
    const int64_t keys = s.key_end(block) - s.key_begin(block), key_width = s.key_panels.width();
    const A scale = static_cast<A>(p.scale * 1.44269504088896340736);
    const RowTile<A> scores{scratch.scores, key_width, rows};
    const RowTile<A> outputs{scratch.outputs + i * s.head_panels.width(), s.head_panels.width(), rows};
    const Lhs lhs = prepare_a(1, Matrix<T>{query(unit) + i * p.q.token, p.q.token, 1}, rows, p.D, scratch.queries);
    multiply<T>(lhs.data, lhs.stride, keys_of(block), s.steps, Panels<T>(keys), false, scores, upcoming);
    softmax<T, kNegative>(scores, keys, scale, scratch.probabilities, block == 0, scratch.largest + i,
                          scratch.totals + i, [&](int64_t r, A factor) {
                            A* row = outputs.data + r * outputs.stride;
                            for (int64_t d = 0; d < outputs.stride; d += kLanes<A>)
                              store<A>(row + d, factor * load<A>(row + d));
                          });
    multiply<T>(reinterpret_cast<const char*>(scratch.probabilities),
                key_width * static_cast<int64_t>(sizeof(Operand<T>)), values_of(block), steps_of<Operand<T>>(keys),
                s.head_panels, block > 0, outputs, upcoming);
    if (block + 1 == s.key_blocks()) store_rows(unit, i, outputs);
  }

  VIT_INLINE void store_rows(int64_t unit, int64_t i, const RowTile<A>& outputs) const {
    A* stats = p.stats ? static_cast<A*>(p.stats) + unit / s.queries.count * 2 * p.N +
                             s.queries.begin(unit % s.queries.count) + i
                       : nullptr;
    for (int64_t r = 0; r < outputs.rows; ++r) {
      const A inverse = A(1) / scratch.totals[i + r];
      store_row(outputs, r, inverse, p.D, output(unit) + (i + r) * p.H * p.D);
      if (!stats) continue;
      stats[r] = scratch.largest[i + r];
      stats[p.N + r] = inverse;
    }
  }
};

template <class T, bool kNegative>
void run_units(const AttentionFwd& p, char* memory, int64_t begin, int64_t end) {
  const TileRegisters<Operand<T>> registers;
  Worker<T, kNegative> worker(p, Arena{memory}, end);
  for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
}

template <class T>
int64_t scratch_bytes(const AttentionFwd& p) {
  Arena arena{nullptr};
  const Scratch<T> counted(Sizes<T>(p), arena);
  return arena.used;
}

}  // namespace

int64_t attention_fwd_units(const AttentionFwd& p) {
  int64_t units = 0;
  with_any_dtype(p.dtype, [&](auto t) { units = p.B * p.H * Sizes<decltype(t)>(p).queries.count; });
  return units;
}

int64_t attention_fwd_scratch(const AttentionFwd& p) {
  int64_t bytes = 0;
  with_any_dtype(p.dtype, [&](auto t) { bytes = scratch_bytes<decltype(t)>(p); });
  return bytes;
}

void attention_fwd_range(const AttentionFwd& p, char* scratch, int64_t begin, int64_t end) {
  with_any_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.scale < 0 ? run_units<T, true>(p, scratch, begin, end) : run_units<T, false>(p, scratch, begin, end);
  });
}

void attention_fwd(const AttentionFwd& p) {
  const int64_t scratch = attention_fwd_scratch(p);
  const int threads = threads_for(p.context.num_threads, 2 * p.B * p.H * p.N * p.L * p.D);
  parallel_for(threads, attention_fwd_units(p), [&](int64_t begin, int64_t end, int thread) {
    attention_fwd_range(p, static_cast<char*>(p.workspace) + thread * scratch, begin, end);
  });
}

std::size_t attention_fwd_workspace(const AttentionFwd& p) {
  return static_cast<std::size_t>(p.context.num_threads * attention_fwd_scratch(p));
}

}  // namespace vit::VIT_ISA
