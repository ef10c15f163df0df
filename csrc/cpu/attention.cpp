// attention: out = P v, P = softmax(scale q k^T) for each batch and head.
//
//   lse_i = log sum_j exp(scale q_i k_j),  P_ij = exp(scale q_i k_j - lse_i),  delta_i = dout_i out_i
//   dS_ij = P_ij (dout_i v_j - delta_i),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout
//
// Saved for the backward: out and lse. FLOPs per head: 4 N L D forward, 10 N L D backward.
//
// Forward: threads take blocks of queries of a head. Keys come in blocks, packed once per head (or block) into the
// panels that `tile` of gemm.h reads; each row tile of queries makes its scores, their exponentials and the product
// with v while they are in L1. With more than one block of keys the softmax is online: sums and outputs so far are
// rescaled when a larger score appears.
//
// Backward, key-major: a row tile of keys computes S^T = k q^T and dP^T = v dout^T for a block of queries, so that lse
// and delta are vectors along the columns and dv = P^T dout, dk = dS^T q read the row-major tiles. Only dq = dS k needs
// dS^T by columns. Threads take heads, or groups of keys of a head where there are few heads; dq is the sum over the
// groups in order, whoever computed them.
//
// Sources: Dao et al., "FlashAttention", arXiv:2205.14135; Milakov and Gimelshein, "Online normalizer calculation for
// softmax", arXiv:1805.02867.
#include "cpu/attention.h"

#include "cpu/functions.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

// --- sizes ----------------------------------------------------------------------------------------------------------
// All of them follow from N, L, D and the dtype, never from the batch or the threads: they decide the order of sums.

constexpr int64_t kForwardKeys = 640;         // per block: K and V packed take 320 KB of L2 (D 64, float32)
constexpr int64_t kForwardQueries = 64;       // per unit of work: B 1, H 3 still gives 12 units
constexpr int64_t kLongForwardQueries = 256;  // with several key blocks: packing them is 2 % of the work
constexpr int64_t kBackwardKeys = 128;        // per block: dS^T [128, 256] is 128 KB of L2
constexpr int64_t kKeyGroups = 8;             // at most: into as many parts a head can be split

// Four packed copies of a block of queries are 256 KB of L2.
int64_t backward_queries(int64_t D) { return min<int64_t>(max<int64_t>(16384 / max<int64_t>(D, 1), 64), 256); }

// The range [0, size) in `count` blocks of nearly equal size.
struct Blocks {
  int64_t size, count;

  static Blocks of(int64_t size, int64_t limit) { return {size, ceil_div(size, limit)}; }
  int64_t begin(int64_t i) const { return size * i / count; }
  int64_t end(int64_t i) const { return size * (i + 1) / count; }
  int64_t largest() const { return count ? ceil_div(size, count) : 0; }
};

// --- products -------------------------------------------------------------------------------------------------------

// The columns of an operand B in panels of at most kTileVectors vectors: 3, 2 rather than 3, 3, ..., 1.
template <class T>
struct Panels {
  static constexpr int64_t lanes = kWordLanes<T>;
  int64_t vectors, count;

  explicit Panels(int64_t columns) : vectors(ceil_div(columns, lanes)), count(ceil_div(vectors, kTileVectors)) {}
  int64_t begin(int64_t panel) const { return vectors * panel / count; }
  int64_t width() const { return vectors * lanes; }
};

template <class T>
int64_t packed_bytes(int64_t K, int64_t N) {
  return steps_of<T>(K) * Panels<T>(N).vectors * kVectorBytes;
}

template <class T>
void pack(const Matrix<T>& b, int64_t K, int64_t N, char* packed) {
  const Panels<T> panels(N);
  const int64_t steps = steps_of<T>(K);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t v = panels.begin(panel);
    pack_panel<T>(b, v * panels.lanes, panels.begin(panel + 1) - v, 0, steps, K, N, packed + v * steps * kVectorBytes);
  }
}

// A row tile as `multiply` leaves it: panel after panel, each [rows, vectors of the panel].
template <class T, class A>
struct RowTile {
  A* data;
  int64_t rows;
  Panels<T> panels;

  // Calls f(vector, n) for the vectors of row r; n is where vector number `vector` lies.
  template <class F>
  VIT_INLINE void row(int64_t r, const F& f) const {
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t v0 = panels.begin(panel), v1 = panels.begin(panel + 1);
      A* at = data + (v0 * rows + r * (v1 - v0)) * panels.lanes;
      for (int64_t v = v0; v < v1; ++v, at += panels.lanes) f(v, at);
    }
  }
};

// out = A B for the rows of one tile, or with `add` out += A B. a and stride as `tile` takes them.
template <class T, bool kColumns = false>
VIT_INLINE void multiply(const char* a, int64_t stride, const char* b, int64_t steps, bool add,
                         const RowTile<T, Acc<T>>& out) {
  for (int64_t panel = 0; panel < out.panels.count; ++panel) {
    const int64_t v0 = out.panels.begin(panel), v1 = out.panels.begin(panel + 1);
    const char* panel_b = b + v0 * steps * kVectorBytes;
    tile_for<T, kColumns>(out.rows, v1 - v0)(a, stride, panel_b, steps, {panel_b, 64}, add,
                                             out.data + v0 * out.rows * out.panels.lanes);
  }
}

// scale times row r, D elements, to out.
template <class T>
VIT_INLINE void store_row(const RowTile<T, Acc<T>>& tile, int64_t r, Acc<T> scale, int64_t D, T* out) {
  using A = Acc<T>;
  tile.row(r, [&](int64_t v, const A* at) {
    store<A>(out + v * tile.panels.lanes, scale * load<A>(at), D - v * tile.panels.lanes);
  });
}

// --- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardSizes {
  Blocks keys, queries;
  Panels<T> key_panels, head_panels;
  int64_t steps;  // of a product over the head

  explicit ForwardSizes(const AttentionFwd& p)
      : keys(Blocks::of(p.L, kForwardKeys)),
        queries(Blocks::of(p.N, keys.count == 1 ? kForwardQueries : kLongForwardQueries)),
        key_panels(keys.largest()),
        head_panels(p.D),
        steps(steps_of<T>(p.D)) {}
};

// Scratch memory of one thread.
template <class T>
struct ForwardScratch {
  using A = Acc<T>;
  char *keys, *values;  // packed
  char* queries;        // a row tile, where its words cannot be read in place
  A* scores;            // a row tile
  T* probabilities;     // [kTileRows, key_panels.width()]
  A* outputs;           // row tiles of a block of queries, not yet divided by their totals
  A *largest, *totals;  // of each query of the block

  ForwardScratch(const ForwardSizes<T>& s, int64_t D, Arena& arena) {
    const auto take = [&](int64_t count, int64_t size) { return arena.take(count * size); };
    keys = take(packed_bytes<T>(D, s.keys.largest()), 1);
    values = take(packed_bytes<T>(s.keys.largest(), D), 1);
    queries = take(kTileRows * s.steps, sizeof(Word<T>));
    scores = reinterpret_cast<A*>(take(kTileRows * s.key_panels.width(), sizeof(A)));
    probabilities = reinterpret_cast<T*>(take(kTileRows * s.key_panels.width(), sizeof(T)));
    outputs = reinterpret_cast<A*>(take(s.queries.largest() * s.head_panels.width(), sizeof(A)));
    largest = reinterpret_cast<A*>(take(s.queries.largest(), sizeof(A)));
    totals = reinterpret_cast<A*>(take(s.queries.largest(), sizeof(A)));
  }
};

// The larger of two scores, or the smaller one where scale is negative.
template <bool kNegative>
struct Larger {
  template <class V>
  VIT_INLINE V operator()(V a, V b) const {
    if constexpr (sizeof(V) == kVectorBytes)
      return kNegative ? vmin(a, b) : vmax(a, b);
    else
      return (kNegative ? a < b : a > b) ? a : b;
  }
};

// Row r of the scores (`keys` of them) to exponentials relative to the largest one so far, which is updated together
// with the total. Returns the factor by which older sums must be multiplied. scale includes log2(e).
template <class T, bool kNegative>
VIT_INLINE Acc<T> softmax_row(const RowTile<T, Acc<T>>& scores, int64_t r, int64_t keys, Acc<T> scale, T* out,
                              Acc<T>& largest, Acc<T>& total) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const Larger<kNegative> larger;
  const A least = kNegative ? A(INFINITY) : -A(INFINITY);
  const int64_t last = scores.panels.vectors - 1;
  V row_largest = broadcast(least);
  scores.row(r, [&](int64_t v, const A* at) {
    V s = load<A>(at);
    if (v == last) s = keep(s, keys - last * lanes, least);
    row_largest = larger(s, row_largest);
  });
  A now = fold<A, lanes>(row_largest, larger);
  now = (kNegative ? now < largest : now > largest) ? now : largest;
  // A row of -infinity only has the total 0 and, divided by it, NaN everywhere, like the reference.
  const V origin = broadcast(now == least ? A(0) : now);
  V sums{};
  scores.row(r, [&](int64_t v, const A* at) {
    V e = exp2<T>(scale * (load<A>(at) - origin));
    if (v == last) e = keep(e, keys - last * lanes, A(0));
    sums += e;
    store<A>(out + v * lanes, e);
  });
  const A factor = largest == least ? A(0) : exp2<A>(scale * (broadcast(largest) - origin))[0];
  total = total * factor + sum(sums);
  largest = now;
  return factor;
}

template <class T>
int64_t forward_scratch_bytes(const AttentionFwd& p) {
  Arena arena{nullptr};
  const ForwardScratch<T> counted(ForwardSizes<T>(p), p.D, arena);
  return arena.used;
}

// Units of work [begin, end), blocks of queries of a head, on the calling thread.
template <class T, bool kNegative>
void forward_units(const AttentionFwd& p, char* memory, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const ForwardSizes<T> s(p);
  const A least = kNegative ? A(INFINITY) : -A(INFINITY);
  const A scale = static_cast<A>(p.scale * 1.44269504088896340736);
  Arena arena{memory};
  const ForwardScratch<T> scratch(s, p.D, arena);
  int64_t packed = -1;  // the block of keys that scratch holds
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / s.queries.count, block = unit % s.queries.count;
    const int64_t b = head / p.H, h = head % p.H;
    const T* q = static_cast<const T*>(p.q) + b * p.q_batch + h * p.q_head;
    const T* k = static_cast<const T*>(p.k) + b * p.k_batch + h * p.k_head;
    const T* v = static_cast<const T*>(p.v) + b * p.v_batch + h * p.v_head;
    const int64_t first = s.queries.begin(block);
    const Blocks tiles = Blocks::of(s.queries.end(block) - first, kTileRows);
    for (int64_t key_block = 0; key_block < s.keys.count; ++key_block) {
      const int64_t j = s.keys.begin(key_block), keys = s.keys.end(key_block) - j;
      if (packed != head * s.keys.count + key_block) {
        pack(Matrix<T>{k + j * p.k_token, 1, p.k_token}, p.D, keys, scratch.keys);
        pack(Matrix<T>{v + j * p.v_token, p.v_token, 1}, keys, p.D, scratch.values);
        packed = head * s.keys.count + key_block;
      }
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t i = tiles.begin(t), rows = tiles.end(t) - i;
        const RowTile<T, A> scores{scratch.scores, rows, Panels<T>(keys)};
        const RowTile<T, A> outputs{scratch.outputs + i * s.head_panels.width(), rows, s.head_panels};
        const Left left =
            prepare_a(1, Matrix<T>{q + (first + i) * p.q_token, p.q_token, 1}, rows, p.D, scratch.queries);
        multiply(left.data, left.stride, scratch.keys, s.steps, false, scores);
        for (int64_t r = 0; r < rows; ++r) {
          A &largest = scratch.largest[i + r], &total = scratch.totals[i + r];
          if (key_block == 0) largest = least, total = A(0);
          const A factor = softmax_row<T, kNegative>(scores, r, keys, scale,
                                                     scratch.probabilities + r * s.key_panels.width(), largest, total);
          if (key_block > 0 && factor != A(1))
            outputs.row(r, [&](int64_t, A* at) { store<A>(at, factor * load<A>(at)); });
        }
        multiply(reinterpret_cast<const char*>(scratch.probabilities),
                 s.key_panels.width() * static_cast<int64_t>(sizeof(T)), scratch.values, steps_of<T>(keys),
                 key_block > 0, outputs);
        if (key_block + 1 < s.keys.count) continue;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t query = first + i + r;
          const A total = scratch.totals[i + r];
          store_row(outputs, r, A(1) / total, p.D, static_cast<T*>(p.out) + ((b * p.N + query) * p.H + h) * p.D);
          if (p.lse)
            static_cast<A*>(p.lse)[head * p.N + query] =
                static_cast<A>(p.scale) * scratch.largest[i + r] + static_cast<A>(::log(static_cast<double>(total)));
        }
      }
    }
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardSizes {
  Blocks queries, groups;
  int64_t keys;       // the largest block of keys
  int64_t parts = 1;  // of a head, one to a thread; whole groups of keys
  Panels<T> query_panels, head_panels;
  int64_t steps;  // of a product over the head

  explicit BackwardSizes(const AttentionBwd& p)
      : queries{p.N, max<int64_t>(ceil_div(p.N, backward_queries(p.D)), 1)},  // without queries dk and dv are 0
        groups{p.L, min(Blocks::of(p.L, kBackwardKeys).count, kKeyGroups)},
        keys(Blocks::of(groups.largest(), kBackwardKeys).largest()),
        query_panels(queries.largest()),
        head_panels(p.D),
        steps(steps_of<T>(p.D)) {
    // As few parts as keep the threads busy; each packs the queries again, about 3 % of its work.
    int64_t best = INT64_MAX;
    for (int64_t n = 1; n <= groups.count; ++n) {
      const int64_t cost = ceil_div(p.B * p.H * n, p.context.num_threads) * 1000 / n * (100 + 3 * n);
      if (cost < best) best = cost, parts = n;
    }
  }
};

// Scratch memory of one thread.
template <class T>
struct BackwardScratch {
  using A = Acc<T>;
  char *queries_t, *douts_t;    // packed [D, queries]
  char *queries, *douts;        // packed [queries, D]
  char* keys;                   // packed [keys, D]
  char *key_rows, *value_rows;  // row tiles, where their words cannot be read in place
  A *lse, *delta;               // of each query, lse times log2(e)
  A *scores, *dscores;          // row tiles
  T *probabilities, *ds;        // [kTileRows, query_panels.width()]
  Word<T>* ds_words;            // [steps of keys, query_panels.width()]
  A *dkeys, *dvalues;           // row tiles of a part, or a single one where there is one block of queries
  A* dqueries;                  // [groups] row tiles of a block of queries, where a head is one part

  BackwardScratch(const BackwardSizes<T>& s, int64_t D, Arena& arena) {
    const auto take = [&](int64_t count, int64_t size) { return arena.take(count * size); };
    const int64_t width = s.query_panels.width(), rows = s.queries.largest();
    queries_t = take(packed_bytes<T>(D, rows), 1);
    douts_t = take(packed_bytes<T>(D, rows), 1);
    queries = take(packed_bytes<T>(rows, D), 1);
    douts = take(packed_bytes<T>(rows, D), 1);
    keys = take(packed_bytes<T>(s.keys, D), 1);
    key_rows = take(kTileRows * s.steps, sizeof(Word<T>));
    value_rows = take(kTileRows * s.steps, sizeof(Word<T>));
    lse = reinterpret_cast<A*>(take(width, sizeof(A)));
    delta = reinterpret_cast<A*>(take(width, sizeof(A)));
    scores = reinterpret_cast<A*>(take(kTileRows * width, sizeof(A)));
    dscores = reinterpret_cast<A*>(take(kTileRows * width, sizeof(A)));
    probabilities = reinterpret_cast<T*>(take(kTileRows * width, sizeof(T)));
    ds = reinterpret_cast<T*>(take(kTileRows * width, sizeof(T)));
    ds_words = reinterpret_cast<Word<T>*>(take(steps_of<T>(s.keys) * width, sizeof(Word<T>)));
    const int64_t kept = (s.queries.count == 1 ? kTileRows : s.groups.size) * s.head_panels.width();
    dkeys = reinterpret_cast<A*>(take(kept, sizeof(A)));
    dvalues = reinterpret_cast<A*>(take(kept, sizeof(A)));
    dqueries = reinterpret_cast<A*>(take(s.parts > 1 ? 0 : s.groups.count * rows * s.head_panels.width(), sizeof(A)));
  }
};

// Where the parts of a head meet: [head, group, N, width] after the scratch memory of the threads.
template <class T>
int64_t shared_bytes(const AttentionBwd& p, const BackwardSizes<T>& s) {
  const int64_t size = s.groups.count * p.N * s.head_panels.width() * static_cast<int64_t>(sizeof(Acc<T>));
  return s.parts > 1 ? p.B * p.H * size : 0;
}

// One head: its tensors and sizes.
template <class T>
struct Head {
  using A = Acc<T>;
  const AttentionBwd& p;
  const BackwardSizes<T>& s;
  const BackwardScratch<T>& scratch;
  const T *q, *k, *v, *dout, *out;
  const A* lse;
  T *dq, *dk, *dv;

  Head(const AttentionBwd& p, const BackwardSizes<T>& s, const BackwardScratch<T>& scratch, int64_t head)
      : p(p), s(s), scratch(scratch) {
    const int64_t b = head / p.H, h = head % p.H, row = (b * p.N * p.H + h) * p.D;
    q = static_cast<const T*>(p.q) + b * p.q_batch + h * p.q_head;
    k = static_cast<const T*>(p.k) + b * p.k_batch + h * p.k_head;
    v = static_cast<const T*>(p.v) + b * p.v_batch + h * p.v_head;
    dout = static_cast<const T*>(p.dout) + row;
    out = static_cast<const T*>(p.out) + row;
    lse = static_cast<const A*>(p.lse) + head * p.N;
    dq = static_cast<T*>(p.dq) + b * p.dq_batch + h * p.dq_head;
    dk = static_cast<T*>(p.dk) + b * p.dk_batch + h * p.dk_head;
    dv = static_cast<T*>(p.dv) + b * p.dv_batch + h * p.dv_head;
  }

  // Packs queries [i, i + n) and computes their lse and delta.
  void take_queries(int64_t i, int64_t n) const {
    const int64_t token = p.H * p.D;
    pack(Matrix<T>{q + i * p.q_token, 1, p.q_token}, p.D, n, scratch.queries_t);
    pack(Matrix<T>{dout + i * token, 1, token}, p.D, n, scratch.douts_t);
    pack(Matrix<T>{q + i * p.q_token, p.q_token, 1}, n, p.D, scratch.queries);
    pack(Matrix<T>{dout + i * token, token, 1}, n, p.D, scratch.douts);
    for (int64_t r = 0; r < n; ++r) {
      Vec<A> products{};
      for (int64_t d = 0; d < p.D; d += kLanes<A>)
        products =
            fma(load<A>(dout + (i + r) * token + d, p.D - d), load<A>(out + (i + r) * token + d, p.D - d), products);
      scratch.delta[r] = sum(products);
      scratch.lse[r] = Exp<A>::log2_e * lse[i + r];
    }
    for (int64_t r = n; r < s.query_panels.width(); ++r) {  // padding: a probability of 0
      scratch.delta[r] = A(0);
      scratch.lse[r] = A(INFINITY);
    }
  }

  // P and dS of a row tile of keys from S^T and dP^T; dS also as words, from step `step` on.
  VIT_INLINE void differentiate(const RowTile<T, A>& scores, const RowTile<T, A>& dscores, int64_t step) const {
    using V = Vec<A>;
    constexpr int64_t depth = Step<T>::kDepth, lanes = kLanes<A>;
    const A scale = static_cast<A>(p.scale * 1.44269504088896340736);
    const int64_t width = s.query_panels.width();
    for (int64_t r = 0; r < scores.rows; r += depth) {
      const int64_t pair = min(depth, scores.rows - r);
      for (int64_t panel = 0; panel < scores.panels.count; ++panel) {
        const int64_t v0 = scores.panels.begin(panel), v1 = scores.panels.begin(panel + 1);
        for (int64_t v = v0; v < v1; ++v) {
          const V lse_v = load<A>(scratch.lse + v * lanes), delta_v = load<A>(scratch.delta + v * lanes);
          V d[depth] = {};
          for (int64_t half = 0; half < pair; ++half) {
            const int64_t at = (v0 * scores.rows + (r + half) * (v1 - v0) + v - v0) * lanes;
            // Above 0 only by rounding, which at huge scores would overflow.
            const V e = exp2<T>(at_most(fma(broadcast(scale), load<A>(scores.data + at), -lse_v), A(0)));
            d[half] = e * (load<A>(dscores.data + at) - delta_v);
            store<A>(scratch.probabilities + (r + half) * width + v * lanes, e);
            store<A>(scratch.ds + (r + half) * width + v * lanes, d[half]);
          }
          Word<T>* words = scratch.ds_words + (step + r / depth) * width + v * lanes;
          if constexpr (same<T, bf16>) {
            const u32v pairs =
                __builtin_convertvector(to_bf16(d[0]), u32v) | __builtin_convertvector(to_bf16(d[1]), u32v) << 16;
            memcpy(words, &pairs, sizeof pairs);
          } else {
            store<A>(words, d[0]);
          }
        }
      }
    }
  }

  // A block of queries with the groups of keys [begin, end): dk and dv, and each group's sum of dq to dqueries,
  // `stride` elements apart.
  void run(int64_t block, int64_t begin, int64_t end, A* dqueries, int64_t stride) const {
    const int64_t i = s.queries.begin(block), n = s.queries.end(block) - i;
    take_queries(i, n);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = s.groups.begin(group);
      const Blocks blocks = Blocks::of(s.groups.end(group) - first, kBackwardKeys);
      for (int64_t c = 0; c < blocks.count; ++c)
        key_block(block, n, first + blocks.begin(c), blocks.end(c) - blocks.begin(c), c > 0, dqueries + group * stride);
    }
  }

  void key_block(int64_t block, int64_t n, int64_t j, int64_t keys, bool add, A* dqueries) const {
    constexpr int64_t depth = Step<T>::kDepth, size = sizeof(T);
    const int64_t width = s.query_panels.width(), head_width = s.head_panels.width();
    const Panels<T> panels(n);
    pack(Matrix<T>{k + j * p.k_token, p.k_token, 1}, keys, p.D, scratch.keys);
    const Blocks tiles{steps_of<T>(keys), ceil_div(keys, kTileRows)};  // whole steps: pairs of keys share a word
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tiles.begin(t) * depth, rows = min(tiles.end(t) * depth, keys) - row;
      const RowTile<T, A> scores{scratch.scores, rows, panels}, dscores{scratch.dscores, rows, panels};
      const Left key_rows =
          prepare_a(1, Matrix<T>{k + (j + row) * p.k_token, p.k_token, 1}, rows, p.D, scratch.key_rows);
      const Left value_rows =
          prepare_a(1, Matrix<T>{v + (j + row) * p.v_token, p.v_token, 1}, rows, p.D, scratch.value_rows);
      multiply(key_rows.data, key_rows.stride, scratch.queries_t, s.steps, false, scores);
      multiply(value_rows.data, value_rows.stride, scratch.douts_t, s.steps, false, dscores);
      differentiate(scores, dscores, tiles.begin(t));
      const int64_t kept = s.queries.count == 1 ? 0 : (j + row) * head_width;
      const RowTile<T, A> dkeys{scratch.dkeys + kept, rows, s.head_panels};
      const RowTile<T, A> dvalues{scratch.dvalues + kept, rows, s.head_panels};
      multiply(reinterpret_cast<const char*>(scratch.probabilities), width * size, scratch.douts, steps_of<T>(n),
               block > 0, dvalues);
      multiply(reinterpret_cast<const char*>(scratch.ds), width * size, scratch.queries, steps_of<T>(n), block > 0,
               dkeys);
      if (block + 1 < s.queries.count) continue;
      for (int64_t r = 0; r < rows; ++r) {
        store_row(dvalues, r, A(1), p.D, dv + (j + row + r) * p.dv_token);
        store_row(dkeys, r, static_cast<A>(p.scale), p.D, dk + (j + row + r) * p.dk_token);
      }
    }
    const Blocks query_tiles = Blocks::of(n, kTileRows);
    for (int64_t t = 0; t < query_tiles.count; ++t) {
      const int64_t row = query_tiles.begin(t);
      multiply<T, true>(reinterpret_cast<const char*>(scratch.ds_words + row),
                        width * static_cast<int64_t>(sizeof(Word<T>)), scratch.keys, steps_of<T>(keys), add,
                        RowTile<T, A>{dqueries + row * head_width, query_tiles.end(t) - row, s.head_panels});
    }
  }

  // dq of one block of queries: the sum of its groups, `stride` elements apart, in order.
  void store_queries(int64_t block, A* dqueries, int64_t stride) const {
    const int64_t i = s.queries.begin(block), n = s.queries.end(block) - i, head_width = s.head_panels.width();
    for (int64_t group = 1; group < s.groups.count; ++group)
      for (int64_t at = 0; at < n * head_width; at += kLanes<A>)
        store<A>(dqueries + at, load<A>(dqueries + at) + load<A>(dqueries + group * stride + at));
    const Blocks tiles = Blocks::of(n, kTileRows);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tiles.begin(t), rows = tiles.end(t) - row;
      for (int64_t r = 0; r < rows; ++r)
        store_row(RowTile<T, A>{dqueries + row * head_width, rows, s.head_panels}, r, static_cast<A>(p.scale), p.D,
                  dq + (i + row + r) * p.dq_token);
    }
  }
};

template <class T>
void backward(const AttentionBwd& p) {
  using A = Acc<T>;
  const BackwardSizes<T> s(p);
  const int64_t heads = p.B * p.H, width = s.head_panels.width();
  Arena count{nullptr};
  const BackwardScratch<T> counted(s, p.D, count);
  char* workspace = static_cast<char*>(p.workspace);
  A* shared = reinterpret_cast<A*>(workspace + p.context.num_threads * count.used);
  const int64_t shared_group = p.N * width, local_group = s.queries.largest() * width;

  parallel_for(p.context.num_threads, heads * s.parts, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{workspace + thread * count.used};
    const BackwardScratch<T> scratch(s, p.D, arena);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Head<T> head(p, s, scratch, unit / s.parts);
      if (s.parts > 1) {
        A* of_head = shared + unit / s.parts * s.groups.count * shared_group;
        const Blocks parts{s.groups.count, s.parts};
        for (int64_t block = 0; block < s.queries.count; ++block)
          head.run(block, parts.begin(unit % s.parts), parts.end(unit % s.parts),
                   of_head + s.queries.begin(block) * width, shared_group);
      } else {
        for (int64_t block = 0; block < s.queries.count; ++block) {
          head.run(block, 0, s.groups.count, scratch.dqueries, local_group);
          head.store_queries(block, scratch.dqueries, local_group);
        }
      }
    }
  });
  if (s.parts == 1) return;
  parallel_for(p.context.num_threads, heads * s.queries.count, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{workspace + thread * count.used};
    const BackwardScratch<T> scratch(s, p.D, arena);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / s.queries.count, block = unit % s.queries.count;
      A* of_head = shared + head * s.groups.count * shared_group;
      Head<T>(p, s, scratch, head).store_queries(block, of_head + s.queries.begin(block) * width, shared_group);
    }
  });
}

}  // namespace

int64_t attention_fwd_units(const AttentionFwd& p) {
  int64_t units = 0;
  with_dtype(p.dtype, [&](auto t) { units = p.B * p.H * ForwardSizes<decltype(t)>(p).queries.count; });
  return units;
}

int64_t attention_fwd_scratch(const AttentionFwd& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) { bytes = forward_scratch_bytes<decltype(t)>(p); });
  return bytes;
}

void attention_fwd_range(const AttentionFwd& p, char* scratch, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.scale < 0 ? forward_units<T, true>(p, scratch, begin, end) : forward_units<T, false>(p, scratch, begin, end);
  });
}

void attention_fwd(const AttentionFwd& p) {
  const int64_t scratch = attention_fwd_scratch(p);
  parallel_for(p.context.num_threads, attention_fwd_units(p), [&](int64_t begin, int64_t end, int thread) {
    attention_fwd_range(p, static_cast<char*>(p.workspace) + thread * scratch, begin, end);
  });
}

void attention_bwd(const AttentionBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

std::size_t attention_fwd_workspace(const AttentionFwd& p) {
  return static_cast<std::size_t>(p.context.num_threads * attention_fwd_scratch(p));
}

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  Arena arena{nullptr};
  int64_t shared = 0;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const BackwardSizes<T> s(p);
    const BackwardScratch<T> counted(s, p.D, arena);
    shared = shared_bytes<T>(p, s);
  });
  return static_cast<std::size_t>(p.context.num_threads * arena.used + shared);
}

}  // namespace vit::VIT_ISA
