// attention backward: dq, dk, dv of out = P v, from the out, m and 1 / l of the forward.
//
//   P_ij = exp(scale (q_i k_j - m_i)) / l_i
//   delta_i = dout_i out_i,  dS_ij = P_ij (dout_i v_j - delta_i),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout
//
// Per head 10 N L D FLOPs and N L exponentials on (4 N + 4 L) D elements.
//
// Key-major: a row tile of keys computes S^T = k q^T and dP^T = v dout^T for a block of queries, so that m, 1 / l and
// delta are vectors along the columns and dv = P^T dout, dk = dS^T q read the row-major tiles. Only dq = dS k needs
// dS^T by columns. Threads take heads, or groups of keys of a head where there are few heads; dq is the sum over the
// groups in order, whoever computed them.
//
// Source: Dao et al., "FlashAttention", arXiv:2205.14135.
#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

// --- sizes ----------------------------------------------------------------------------------------------------------
// All of them follow from N, L, D and the dtype, never from the batch or the threads: they decide the order of sums.
// (`parts` does not: it only says who computes what.)

constexpr int64_t kBackwardKeys = 128;  // per block: dS^T [128, 256] is 128 KB of L2
constexpr int64_t kKeyGroups = 8;       // at most: into as many parts a head can be split

// Four packed copies of a block of queries are 256 KB of L2.
int64_t backward_queries(int64_t D) { return min<int64_t>(max<int64_t>(16384 / max<int64_t>(D, 1), 64), 256); }

template <class T>
struct Sizes {
  Blocks queries, groups;
  int64_t keys;       // the largest block of keys
  int64_t parts = 1;  // of a head, one to a thread; whole groups of keys
  Panels<T> query_panels, head_panels;
  int64_t steps;  // of a product over the head

  explicit Sizes(const AttentionBwd& p)
      : queries{p.N, max<int64_t>(ceil_div(p.N, backward_queries(p.D)), 1)},  // without queries dk and dv are 0
        groups{p.L, min(Blocks::of(p.L, kBackwardKeys).count, kKeyGroups)},
        keys(Blocks::of(groups.largest(), kBackwardKeys).largest()),
        query_panels(queries.largest()),
        head_panels(p.D),
        steps(steps_of<Operand<T>>(p.D)) {
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
struct Scratch {
  using A = Acc<T>;
  char *queries_t, *douts_t;      // packed [D, queries]
  char *queries, *douts;          // packed [queries, D]
  char* keys;                     // packed [keys, D]
  char *key_rows, *value_rows;    // row tiles, where their words cannot be read in place
  A *largest, *inverse, *delta;   // of each query: m, 1 / l and delta
  A *scores, *dscores;            // row tiles
  Operand<T>*probabilities, *ds;  // [kScoreRows<T>, query_panels.width()]
  Word<Operand<T>>* ds_words;     // [steps of keys, query_panels.width()]
  A *dkeys, *dvalues;             // row tiles of a part, or a single one where there is one block of queries
  A* dqueries;                    // [groups] row tiles of a block of queries, where a head is one part

  Scratch(const Sizes<T>& s, int64_t D, Arena& arena) {
    using S = Operand<T>;
    const auto take = [&](int64_t count, int64_t size) { return arena.take(count * size); };
    const int64_t width = s.query_panels.width(), rows = s.queries.largest();
    queries_t = take(packed_bytes<T>(D, rows), 1);
    douts_t = take(packed_bytes<T>(D, rows), 1);
    queries = take(packed_bytes<T>(rows, D), 1);
    douts = take(packed_bytes<T>(rows, D), 1);
    keys = take(packed_bytes<T>(s.keys, D), 1);
    key_rows = take(kScoreRows<T> * s.steps, sizeof(Word<S>));
    value_rows = take(kScoreRows<T> * s.steps, sizeof(Word<S>));
    largest = reinterpret_cast<A*>(take(width, sizeof(A)));
    inverse = reinterpret_cast<A*>(take(width, sizeof(A)));
    delta = reinterpret_cast<A*>(take(width, sizeof(A)));
    scores = reinterpret_cast<A*>(take(kScoreRows<T> * width, sizeof(A)));
    dscores = reinterpret_cast<A*>(take(kScoreRows<T> * width, sizeof(A)));
    probabilities = reinterpret_cast<S*>(take(kScoreRows<T> * width, sizeof(S)));
    ds = reinterpret_cast<S*>(take(kScoreRows<T> * width, sizeof(S)));
    ds_words = reinterpret_cast<Word<S>*>(take(steps_of<S>(s.keys) * width, sizeof(Word<S>)));
    const int64_t kept = (s.queries.count == 1 ? kScoreRows<T> : s.groups.size) * s.head_panels.width();
    dkeys = reinterpret_cast<A*>(take(kept, sizeof(A)));
    dvalues = reinterpret_cast<A*>(take(kept, sizeof(A)));
    dqueries = reinterpret_cast<A*>(take(s.parts > 1 ? 0 : s.groups.count * rows * s.head_panels.width(), sizeof(A)));
  }
};

// Where the parts of a head meet: [head, group, N, width] after the scratch memory of the threads.
template <class T>
int64_t shared_bytes(const AttentionBwd& p, const Sizes<T>& s) {
  const int64_t size = s.groups.count * p.N * s.head_panels.width() * static_cast<int64_t>(sizeof(Acc<T>));
  return s.parts > 1 ? p.B * p.H * size : 0;
}

// One head: its tensors and sizes.
template <class T>
struct Head {
  using A = Acc<T>;
  const AttentionBwd& p;
  const Sizes<T>& s;
  const Scratch<T>& scratch;
  const T *q, *k, *v, *dout, *out;
  const A* stats;
  T *dq, *dk, *dv;

  Head(const AttentionBwd& p, const Sizes<T>& s, const Scratch<T>& scratch, int64_t head)
      : p(p), s(s), scratch(scratch) {
    const int64_t b = head / p.H, h = head % p.H, row = (b * p.N * p.H + h) * p.D;
    q = static_cast<const T*>(p.q.data) + b * p.q.batch + h * p.q.head;
    k = static_cast<const T*>(p.k.data) + b * p.k.batch + h * p.k.head;
    v = static_cast<const T*>(p.v.data) + b * p.v.batch + h * p.v.head;
    dout = static_cast<const T*>(p.dout) + row;
    out = static_cast<const T*>(p.out) + row;
    stats = static_cast<const A*>(p.stats) + head * 2 * p.N;
    dq = static_cast<T*>(p.dq.data) + b * p.dq.batch + h * p.dq.head;
    dk = static_cast<T*>(p.dk.data) + b * p.dk.batch + h * p.dk.head;
    dv = static_cast<T*>(p.dv.data) + b * p.dv.batch + h * p.dv.head;
  }

  // Packs queries [i, i + n) and computes their delta.
  void take_queries(int64_t i, int64_t n) const {
    const int64_t token = p.H * p.D;
    pack(Matrix<T>{q + i * p.q.token, 1, p.q.token}, p.D, n, scratch.queries_t);
    pack(Matrix<T>{dout + i * token, 1, token}, p.D, n, scratch.douts_t);
    pack(Matrix<T>{q + i * p.q.token, p.q.token, 1}, n, p.D, scratch.queries);
    pack(Matrix<T>{dout + i * token, token, 1}, n, p.D, scratch.douts);
    for (int64_t r = 0; r < n; ++r) {
      Vec<A> products{};
      for (int64_t d = 0; d < p.D; d += kLanes<A>)
        products =
            fma(load<A>(dout + (i + r) * token + d, p.D - d), load<A>(out + (i + r) * token + d, p.D - d), products);
      scratch.delta[r] = sum(products);
      scratch.largest[r] = stats[i + r];
      scratch.inverse[r] = stats[p.N + i + r];
    }
    for (int64_t r = n; r < s.query_panels.width(); ++r) {  // padding: a probability of 0
      scratch.delta[r] = A(0);
      scratch.largest[r] = A(0);
      scratch.inverse[r] = A(0);
    }
  }

  // P and dS of a row tile of keys from S^T and dP^T; dS also as words, from step `step` on.
  VIT_INLINE void differentiate(const RowTile<A>& scores, const RowTile<A>& dscores, int64_t columns,
                                int64_t step) const {
    using V = Vec<A>;
    using S = Operand<T>;
    constexpr int64_t depth = Step<S>::kDepth, lanes = kLanes<A>;
    const A scale = static_cast<A>(p.scale * 1.44269504088896340736);
    const int64_t width = scores.stride;
    for (int64_t r = 0; r < scores.rows; r += depth) {
      const int64_t pair = min(depth, scores.rows - r);
      for (int64_t i = 0; i < columns; i += lanes) {
        const V largest = load<A>(scratch.largest + i), inverse = load<A>(scratch.inverse + i);
        const V delta_i = load<A>(scratch.delta + i);
        V d[depth] = {};
        for (int64_t half = 0; half < pair; ++half) {
          const int64_t at = (r + half) * width + i;
          // The difference first, as in the forward: not rounded at the size of the scores. Above 0 it can only be by
          // rounding, which at huge scores would overflow.
          const V x = at_most(scale * (load<A>(scores.data + at) - largest), A(0));
          const V e = exp2<T>(x) * inverse;
          d[half] = e * (load<A>(dscores.data + at) - delta_i);
          store<A>(scratch.probabilities + at, e);
          store<A>(scratch.ds + at, d[half]);
        }
        Word<S>* words = scratch.ds_words + (step + r / depth) * width + i;
        if constexpr (same<S, bf16>) {
          const u32v pairs = __builtin_convertvector(to_bf16(d[0]), u32v) | __builtin_convertvector(to_bf16(d[1]), u32v)
                                                                                << 16;
          memcpy(words, &pairs, sizeof pairs);
        } else {
          store<A>(words, d[0]);
        }
      }
    }
  }

  // The rows that are read first of a block of queries, and of a block of keys.
  void prefetch_queries(int64_t block, PrefetchQueue& upcoming) const {
    const int64_t i = s.queries.begin(block), n = s.queries.end(block) - i, token = p.H * p.D;
    upcoming.add(q + i * p.q.token, p.q.token, n, p.D);
    upcoming.add(dout + i * token, token, n, p.D);
    upcoming.add(out + i * token, token, n, p.D);
  }
  void prefetch_keys(int64_t j, int64_t n, PrefetchQueue& upcoming) const {
    upcoming.add(k + j * p.k.token, p.k.token, n, p.D);
    upcoming.add(v + j * p.v.token, p.v.token, n, p.D);
    upcoming.add(dk + j * p.dk.token, p.dk.token, n, p.D);
    upcoming.add(dv + j * p.dv.token, p.dv.token, n, p.D);
  }

  // A block of queries with the groups of keys [begin, end): dk and dv, and each group's sum of dq to dqueries,
  // `stride` elements apart. `next` asks for what follows.
  template <class F>
  void run(int64_t block, int64_t begin, int64_t end, A* dqueries, int64_t stride, const F& next) const {
    const int64_t i = s.queries.begin(block), n = s.queries.end(block) - i;
    take_queries(i, n);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = s.groups.begin(group);
      const Blocks blocks = Blocks::of(s.groups.end(group) - first, kBackwardKeys);
      for (int64_t c = 0; c < blocks.count; ++c) {
        const int64_t j = first + blocks.begin(c), keys = blocks.end(c) - blocks.begin(c);
        PrefetchQueue upcoming;
        if (group + 1 < end || c + 1 < blocks.count)
          prefetch_keys(j + keys, min(s.keys, p.L - j - keys), upcoming);
        else
          next(upcoming);
        key_block(block, n, j, keys, c > 0, dqueries + group * stride, upcoming);
      }
    }
  }

  void key_block(int64_t block, int64_t n, int64_t j, int64_t keys, bool add, A* dqueries,
                 PrefetchQueue& upcoming) const {
    using S = Operand<T>;
    constexpr int64_t depth = Step<S>::kDepth, size = sizeof(S);
    const int64_t width = s.query_panels.width(), head_width = s.head_panels.width();
    const Panels<T> panels(n);
    pack(Matrix<T>{k + j * p.k.token, p.k.token, 1}, keys, p.D, scratch.keys);
    const Blocks tiles{steps_of<S>(keys), ceil_div(keys, kScoreRows<T>)};  // whole steps: pairs of keys share a word
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tiles.begin(t) * depth, rows = min(tiles.end(t) * depth, keys) - row;
      const RowTile<A> scores{scratch.scores, width, rows}, dscores{scratch.dscores, width, rows};
      const Lhs key_rows =
          prepare_a(1, Matrix<T>{k + (j + row) * p.k.token, p.k.token, 1}, rows, p.D, scratch.key_rows);
      const Lhs value_rows =
          prepare_a(1, Matrix<T>{v + (j + row) * p.v.token, p.v.token, 1}, rows, p.D, scratch.value_rows);
      multiply(key_rows.data, key_rows.stride, scratch.queries_t, s.steps, panels, false, scores, upcoming);
      multiply(value_rows.data, value_rows.stride, scratch.douts_t, s.steps, panels, false, dscores, upcoming);
      differentiate(scores, dscores, panels.width(), tiles.begin(t));
      const int64_t kept = s.queries.count == 1 ? 0 : (j + row) * head_width;
      const RowTile<A> dkeys{scratch.dkeys + kept, head_width, rows};
      const RowTile<A> dvalues{scratch.dvalues + kept, head_width, rows};
      multiply(reinterpret_cast<const char*>(scratch.probabilities), width * size, scratch.douts, steps_of<S>(n),
               s.head_panels, block > 0, dvalues, upcoming);
      multiply(reinterpret_cast<const char*>(scratch.ds), width * size, scratch.queries, steps_of<S>(n), s.head_panels,
               block > 0, dkeys, upcoming);
      if (block + 1 < s.queries.count) continue;
      for (int64_t r = 0; r < rows; ++r) {
        store_row(dvalues, r, A(1), p.D, dv + (j + row + r) * p.dv.token);
        store_row(dkeys, r, static_cast<A>(p.scale), p.D, dk + (j + row + r) * p.dk.token);
      }
    }
    const Blocks query_tiles = Blocks::of(n, kScoreRows<T>);
    for (int64_t t = 0; t < query_tiles.count; ++t) {
      const int64_t row = query_tiles.begin(t);
      const RowTile<A> dqueries_tile{dqueries + row * head_width, head_width, query_tiles.end(t) - row};
      multiply<T, true>(reinterpret_cast<const char*>(scratch.ds_words + row),
                        width * static_cast<int64_t>(sizeof(Word<S>)), scratch.keys, steps_of<S>(keys), s.head_panels,
                        add, dqueries_tile, upcoming);
    }
  }

  // dq of one block of queries: the sum of its groups, `stride` elements apart, in order.
  void store_queries(int64_t block, A* dqueries, int64_t stride) const {
    const int64_t i = s.queries.begin(block), n = s.queries.end(block) - i, head_width = s.head_panels.width();
    for (int64_t group = 1; group < s.groups.count; ++group)
      for (int64_t at = 0; at < n * head_width; at += kLanes<A>)
        store<A>(dqueries + at, load<A>(dqueries + at) + load<A>(dqueries + group * stride + at));
    const RowTile<A> rows{dqueries, head_width, n};
    for (int64_t r = 0; r < n; ++r) store_row(rows, r, static_cast<A>(p.scale), p.D, dq + (i + r) * p.dq.token);
  }
};

template <class T>
void backward(const AttentionBwd& p) {
  using A = Acc<T>;
  const Sizes<T> s(p);
  const int64_t heads = p.B * p.H, width = s.head_panels.width();
  Arena count{nullptr};
  const Scratch<T> counted(s, p.D, count);
  char* workspace = static_cast<char*>(p.workspace);
  A* shared = reinterpret_cast<A*>(workspace + p.context.num_threads * count.used);
  const int64_t shared_group = p.N * width, local_group = s.queries.largest() * width;

  parallel_for(p.context.num_threads, heads * s.parts, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{workspace + thread * count.used};
    const Scratch<T> scratch(s, p.D, arena);
    const TileRegisters<Operand<T>> registers;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Head<T> head(p, s, scratch, unit / s.parts);
      const Blocks parts{s.groups.count, s.parts};
      const auto first_key = [&](int64_t unit) { return s.groups.begin(parts.begin(unit % s.parts)); };
      A* of_head = s.parts > 1 ? shared + unit / s.parts * s.groups.count * shared_group : nullptr;
      for (int64_t block = 0; block < s.queries.count; ++block) {
        const auto next = [&](PrefetchQueue& upcoming) {  // the next block of queries, of this head or the next unit
          const bool last = block + 1 == s.queries.count;
          if (last && unit + 1 == end) return;
          const Head<T> after(p, s, scratch, (unit + last) / s.parts);
          after.prefetch_queries(last ? 0 : block + 1, upcoming);
          if (last) upcoming.add(after.k + first_key(unit + 1) * p.k.token, p.k.token, s.keys, p.D);
        };
        A* dqueries = of_head ? of_head + s.queries.begin(block) * width : scratch.dqueries;
        const int64_t group_stride = of_head ? shared_group : local_group;
        head.run(block, parts.begin(unit % s.parts), parts.end(unit % s.parts), dqueries, group_stride, next);
        if (!of_head) head.store_queries(block, dqueries, group_stride);
      }
    }
  });
  if (s.parts == 1) return;
  parallel_for(p.context.num_threads, heads * s.queries.count, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{workspace + thread * count.used};
    const Scratch<T> scratch(s, p.D, arena);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / s.queries.count, block = unit % s.queries.count;
      A* of_head = shared + head * s.groups.count * shared_group;
      Head<T>(p, s, scratch, head).store_queries(block, of_head + s.queries.begin(block) * width, shared_group);
    }
  });
}

}  // namespace

void attention_bwd(const AttentionBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  Arena arena{nullptr};
  int64_t shared = 0;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Sizes<T> s(p);
    const Scratch<T> counted(s, p.D, arena);
    shared = shared_bytes<T>(p, s);
  });
  return static_cast<std::size_t>(p.context.num_threads * arena.used + shared);
}

}  // namespace vit::VIT_ISA
