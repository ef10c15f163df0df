// attention: out = softmax(scale q k^T) v for each batch and head.
//
//   s = scale q k^T,  m_i = max_j s_ij,  l_i = sum_j e^(s_ij - m_i),  p = e^(s - m) / l,  out = p v
//   delta_i = sum_d dout_id out_id
//   dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout
//
// Saved for the backward: m and 1 / l. Scores: lanes are a block of W = vectors * VIT_LANES rows of one side (queries
// in the forward, keys in the backward), rows of the other side are uniform scalars; they stay in the scratch memory of
// the sub-group, which the L2 cache holds. Products with p or ds: lanes are columns of the head, read and written as
// they lie, and the weights are uniform scalars, whose block may be read by rows or by columns.
//
// Forward 4 B H N L D FLOPs. Backward 10 where a sub-group has whole heads and keeps dq while it goes through the keys;
// on devices with more sub-groups than heads they are divided further, the scores of dq computed on their own: 14.
#pragma once

#include "functions.h"
#include "pack.h"

// A head's columns in whole vectors.
VIT_INLINE int padded(int D) { return (D + VIT_LANES - 1) / VIT_LANES * VIT_LANES; }

// to[d] = factor * from[d], zeros for d from D to padded(D).
template <class A, class T>
VIT_INLINE void copy_row(const T* from, int D, int lane, A factor, A* to) {
  int d = 0;
  for (; d + VIT_LANES <= D; d += VIT_LANES) to[d + lane] = load<A>(from + d + lane) * factor;
  if (d == D) return;
  A value = 0;
  if (d + lane < D) value = load<A>(from + d + lane) * factor;
  to[d + lane] = value;
}

// [B, N, H, D] of any strides -> [B, H, N, padded(D)] in the accumulator type, times `factor`.
template <class T>
VIT_KERNEL copy_heads(const T* x, Acc<T>* out, int H, int N, int D, int64 batch, int64 token, int64 head, double factor,
                      int64 rows) {
  using A = Acc<T>;
  const Place at = place();
  const int64 first = at.unit * vit::tiles::kCopiedRows;
  const int64 stop = first + vit::tiles::kCopiedRows < rows ? first + vit::tiles::kCopiedRows : rows;
  for (int64 row = first; row < stop; ++row) {
    const int64 h = row / N, n = row - h * N, b = h / H;
    copy_row(x + b * batch + n * token + (h - b * H) * head, D, at.lane, A(factor), out + row * padded(D));
  }
}

template <class A>
struct Rows {
  static constexpr int vectors = vit::tiles::AttentionTile<A>::vectors, width = vectors * VIT_LANES;
};

// to[d][W] = factor * x[first + w][d] for d up to padded(D); rows beyond the last one repeat it. `rows` [W][padded(D)]
// is needed on the way, and keeps the rows.
template <class A, class T>
VIT_INLINE void load_rows(const T* x, int64 token, int first, int N, int D, int lane, A factor, A* rows, A* to) {
  constexpr int W = Rows<A>::width;
  const int P = padded(D);
  for (int w = 0; w < W; ++w) {
    const T* row = x + (first + w < N ? first + w : N - 1) * token;
    copy_row(row, D, lane, factor, rows + w * P);
  }
  sub_group_barrier();
  for (int w = 0; w < W; w += VIT_LANES)
    for (int d = 0; d < P; d += VIT_LANES) transpose_full<A>(rows + w * P + d, P, to + d * W + w, W, lane);
  sub_group_barrier();
}

// Scores of `kRows` rows of `y` with this sub-group's rows: sum[i][u] = y[first + i] . mine, mine [D][W].
template <class A, int kRows>
VIT_INLINE void scores(const A* y, int64 token, int first, int count, const A* mine, int D, int lane,
                       A (&sum)[kRows][Rows<A>::vectors]) {
  constexpr int V = Rows<A>::vectors;
  const A* row[kRows];
  VIT_UNROLL for (int i = 0; i < kRows; ++i) row[i] = y + (first + i < count ? first + i : count - 1) * token;
  VIT_UNROLL for (int i = 0; i < kRows; ++i) VIT_UNROLL for (int u = 0; u < V; ++u) sum[i][u] = 0;
  for (int d = 0; d < D; ++d) {
    A vector[V];
    const A* column = mine + d * Rows<A>::width;
    VIT_UNROLL for (int u = 0; u < V; ++u) vector[u] = column[u * VIT_LANES + lane];
    VIT_UNROLL for (int i = 0; i < kRows; ++i) {
      const A value = row[i][d];
      VIT_UNROLL for (int u = 0; u < V; ++u) sum[i][u] = sycl::fma(value, vector[u], sum[i][u]);
    }
  }
}

// A product with scores: sums [rows][padded(D)] = sum over j < count of weights[r * row_step + j * step] y[j][d], added
// to what is there where `further`. y has zeros up to padded(D), weights room for a tile of rows beyond the last one.
//
// A kernel has one of these, in a loop over its products: of two instances the compiler merged the paths, no address
// was uniform any more, and the kernel took seven times as long.
template <class A>
struct Product {
  const A* weights;
  int row_step, step, rows;
  const A* y;
  int64 token;
  int count;
  A* sums;
  bool further;
};

template <int V, class A>
VIT_INLINE void weighted_columns(const Product<A>& x, int column, int P, int lane) {
  constexpr int R = vit::tiles::AttentionTile<A>::rows;
  for (int r = 0; r < x.rows; r += R) {
    A sum[R][V];
    VIT_UNROLL for (int i = 0; i < R; ++i) VIT_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = 0;
    const A* row[R];
    VIT_UNROLL for (int i = 0; i < R; ++i) row[i] = x.weights + int64(r + i) * x.row_step;
    const A* vectors = x.y + column;
    int64 at = 0;
    for (int j = 0; j < x.count; ++j, at += x.step, vectors += x.token) {
      A b[V];
      VIT_UNROLL for (int v = 0; v < V; ++v) b[v] = vectors[v * VIT_LANES + lane];
      VIT_UNROLL for (int i = 0; i < R; ++i) {
        const A value = row[i][at];
        VIT_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = sycl::fma(value, b[v], sum[i][v]);
      }
    }
    VIT_UNROLL for (int i = 0; i < R; ++i) {
      if (r + i >= x.rows) break;
      A* to = x.sums + int64(r + i) * P + column;
      VIT_UNROLL for (int v = 0; v < V; ++v) {
        A* vector = to + v * VIT_LANES;
        if (x.further) sum[i][v] += vector[lane];
        vector[lane] = sum[i][v];
      }
    }
  }
}

template <class A>
VIT_INLINE void weighted_sum(const Product<A>& x, int P, int lane) {
  constexpr int V = vit::tiles::AttentionTile<A>::columns;
  int d = 0;
  for (; d + V * VIT_LANES <= P; d += V * VIT_LANES) weighted_columns<V>(x, d, P, lane);
  for (; d < P; d += VIT_LANES) weighted_columns<1>(x, d, P, lane);
}

// out[r][d] = from[r][d] * factor for the D columns of a head; with `each`, times each[r] too.
template <class A, class T>
VIT_INLINE void write_rows(const A* from, T* out, int64 token, int rows, int D, int lane, A factor, const A* each) {
  const int P = padded(D);
  for (int r = 0; r < rows; ++r) {
    const A* row = from + int64(r) * P;
    T* to = out + r * token;
    const A times = each ? each[r] * factor : factor;
    for_columns(D, lane, [&](int d) VIT_ALWAYS { store(to + d + lane, row[d + lane] * times); });
  }
}

// scratch [units][2 padded(D) + L + 1][W], and small rows.
template <class T>
VIT_KERNEL attention_fwd(const T* q, const Acc<T>* k, const Acc<T>* v, T* out, Acc<T>* stats, Acc<T>* scratch, int B,
                         int H, int N, int L, int D, int64 q_batch, int64 q_token, int64 q_head, int64 k_batch,
                         int64 k_token, int64 k_head, int64 v_batch, int64 v_token, int64 v_head, double scale,
                         int64 stride, int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kKeys = vit::tiles::AttentionTile<A>::keys;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (N + W - 1) / W;
  A* inverse = scratch + at.unit * stride;
  A* rows = inverse + W;
  A* query = rows + padded(D) * W;
  A* p = query + padded(D) * W;
  const int64 tasks = int64(B) * H * blocks, token = int64(H) * D;
  // Tasks that follow each other: all blocks of a head with its keys in the L2 cache.
  for (int64 task = tasks * at.unit / units; task < tasks * (at.unit + 1) / units; ++task) {
    const int first = int(task % blocks) * W, count = N - first < W ? N - first : W;
    const int64 h = task / blocks % H, b = task / blocks / H;
    const A* keys = k + b * k_batch + h * k_head;
    const A* values = v + b * v_batch + h * v_head;
    load_rows<A>(q + b * q_batch + h * q_head, q_token, first, N, D, lane, A(scale), rows, query);

    A largest[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) largest[u] = -__builtin_inff();
    for (int j = 0; j < L; j += kKeys) {
      A s[kKeys][V];
      scores<A, kKeys>(keys, k_token, j, L, query, D, lane, s);
      VIT_UNROLL for (int i = 0; i < kKeys; ++i) {
        if (j + i < L) {
          A* row = p + int64(j + i) * W;
          VIT_UNROLL for (int u = 0; u < V; ++u) {
            row[u * VIT_LANES + lane] = s[i][u];
            largest[u] = largest[u] > s[i][u] ? largest[u] : s[i][u];
          }
        }
      }
    }
    A total[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) total[u] = 0;
    for (int j = 0; j < L; ++j) {
      A* row = p + int64(j) * W;
      VIT_UNROLL for (int u = 0; u < V; ++u) {
        const A e = exponential_of_negative(row[u * VIT_LANES + lane] - largest[u]);
        total[u] += e;
        row[u * VIT_LANES + lane] = e;
      }
    }
    A* to = stats + (b * H + h) * 2 * N + first;
    VIT_UNROLL for (int u = 0; u < V; ++u) {
      const int n = u * VIT_LANES + lane;
      inverse[n] = A(1) / total[u];
      if (stats && n < count) {
        to[n] = largest[u];
        to[N + n] = inverse[n];
      }
    }
    sub_group_barrier();
    weighted_sum<A>({p, 1, W, count, values, v_token, L, rows, false}, padded(D), lane);
    sub_group_barrier();
    write_rows(rows, out + (b * N * H + h) * D + first * token, token, count, D, lane, A(1), inverse);
    sub_group_barrier();
  }
}

// deltas[i] = sum over d of dout[i][d] out[i][d] for the queries of one head, rows `token` apart.
template <class A, class T>
VIT_INLINE void head_deltas(const A* dout, int64 dout_token, const T* out, int64 token, int N, int D, int lane,
                            A* deltas) {
  for (int i = 0; i < N; ++i) {
    const A* gradient = dout + i * dout_token;
    const T* row = out + i * token;
    A sum = 0;
    for_columns(D, lane, [&](int d) VIT_ALWAYS { sum = sycl::fma(gradient[d + lane], load<A>(row + d + lane), sum); });
    sum = sum_over_lanes(sum);
    if (lane == 0) deltas[i] = sum;
  }
  sub_group_barrier();
}

// dq alone, and delta [B, H, N]: where attention_bwd divides heads into blocks of keys. scratch [units]
// [4 padded(D) + L + 2][W], and small rows.
template <class T>
VIT_KERNEL attention_bwd_q(const Acc<T>* dout, const T* q, const Acc<T>* k, const Acc<T>* v, const T* out,
                           const Acc<T>* stats, T* dq, Acc<T>* delta, Acc<T>* scratch, int B, int H, int N, int L,
                           int D, int64 o_batch, int64 o_token, int64 o_head, int64 q_batch, int64 q_token,
                           int64 q_head, int64 k_batch, int64 k_token, int64 k_head, int64 v_batch, int64 v_token,
                           int64 v_head, int64 dq_batch, int64 dq_token, int64 dq_head, double scale, int64 stride,
                           int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kKeys = vit::tiles::AttentionTile<A>::pairs;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (N + W - 1) / W;
  A* rows = scratch + at.unit * stride;
  A* query = rows + padded(D) * W;
  A* gradient = query + padded(D) * W;
  A* ds = gradient + padded(D) * W;
  const int64 tasks = int64(B) * H * blocks, token = int64(H) * D;
  for (int64 task = at.unit; task < tasks; task += units) {
    const int first = int(task % blocks) * W, count = N - first < W ? N - first : W;
    const int64 h = task / blocks % H, b = task / blocks / H;
    const A* keys = k + b * k_batch + h * k_head;
    const A* values = v + b * v_batch + h * v_head;
    const A* gradients = dout + b * o_batch + h * o_head;
    A* deltas = delta + (b * H + h) * N + first;
    const A* largest = stats + (b * H + h) * 2 * N + first;
    head_deltas(gradients + first * o_token, o_token, out + (b * N * H + h) * D + first * token, token, count, D, lane,
                deltas);
    load_rows<A>(q + b * q_batch + h * q_head, q_token, first, N, D, lane, A(scale), rows, query);
    load_rows<A>(gradients, o_token, first, N, D, lane, A(1), rows, gradient);
    A sum[V], top[V], inverse[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) {
      const int row = u * VIT_LANES + lane, n = row < count ? row : count - 1;
      sum[u] = deltas[n];
      top[u] = largest[n];
      inverse[u] = largest[N + n];
    }
    for (int j = 0; j < L; j += kKeys) {
      A s[kKeys][V], dp[kKeys][V];
      scores<A, kKeys>(keys, k_token, j, L, query, D, lane, s);
      scores<A, kKeys>(values, v_token, j, L, gradient, D, lane, dp);
      VIT_UNROLL for (int i = 0; i < kKeys; ++i) {
        if (j + i < L) {
          A* row = ds + int64(j + i) * W;
          VIT_UNROLL for (int u = 0; u < V; ++u) row[u * VIT_LANES + lane] =
              exponential_of_negative(s[i][u] - top[u]) * inverse[u] * (dp[i][u] - sum[u]);
        }
      }
    }
    sub_group_barrier();
    weighted_sum<A>({ds, 1, W, count, keys, k_token, L, rows, false}, padded(D), lane);
    sub_group_barrier();
    write_rows<A>(rows, dq + b * dq_batch + h * dq_head + first * dq_token, dq_token, count, D, lane, A(scale),
                  nullptr);
    sub_group_barrier();
  }
}

// p and ds [N][W] of a block of keys with all queries of a head.
template <class A>
VIT_INLINE void block_gradients(const A* queries, int64 q_token, const A* gradients, int64 o_token, const A* key,
                                const A* value, const A* largest, const A* deltas, int N, int D, int lane, A* p,
                                A* ds) {
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kQueries = vit::tiles::AttentionTile<A>::pairs;
  for (int i = 0; i < N; i += kQueries) {
    A s[kQueries][V], dp[kQueries][V];
    scores<A, kQueries>(queries, q_token, i, N, key, D, lane, s);
    scores<A, kQueries>(gradients, o_token, i, N, value, D, lane, dp);
    VIT_UNROLL for (int r = 0; r < kQueries; ++r) {
      if (i + r < N) {
        const A top = largest[i + r], inverse = largest[N + i + r], correction = deltas[i + r];
        A *p_row = p + int64(i + r) * W, *ds_row = ds + int64(i + r) * W;
        VIT_UNROLL for (int u = 0; u < V; ++u) {
          const A weight = exponential_of_negative(s[r][u] - top) * inverse;
          p_row[u * VIT_LANES + lane] = weight;
          ds_row[u * VIT_LANES + lane] = weight * (dp[r][u] - correction);
        }
      }
    }
  }
}

// dk and dv; with kWhole, where a sub-group has whole heads, also delta and dq, which grows in scratch memory. q
// already scaled: the scores must have the bits of the forward, or those near the end of a dtype's range do not cancel
// with m. scratch [units][3 padded(D) + 2 N + 2][W], with kWhole also [N][padded(D)], and small rows.
template <class T, bool kWhole>
VIT_KERNEL attention_bwd(const Acc<T>* dout, const Acc<T>* q, const Acc<T>* k, const Acc<T>* v, const T* out,
                         const Acc<T>* stats, Acc<T>* delta, T* dq, T* dk, T* dv, Acc<T>* scratch, int B, int H, int N,
                         int L, int D, int64 o_batch, int64 o_token, int64 o_head, int64 q_batch, int64 q_token,
                         int64 q_head, int64 k_batch, int64 k_token, int64 k_head, int64 v_batch, int64 v_token,
                         int64 v_head, int64 dq_batch, int64 dq_token, int64 dq_head, int64 dk_batch, int64 dk_token,
                         int64 dk_head, int64 dv_batch, int64 dv_token, int64 dv_head, double scale, int64 stride,
                         int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kRoom = vit::tiles::AttentionTile<A>::rows * W;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (L + W - 1) / W, P = padded(D);
  A* rows = scratch + at.unit * stride;
  A* key = rows + P * W;
  A* value = key + P * W;
  A* p = value + P * W;
  A* ds = p + int64(N) * W + kRoom;
  A* dqueries = ds + int64(N) * W + kRoom;
  const int64 heads = int64(B) * H, tasks = kWhole ? heads : heads * blocks, token = int64(H) * D;
  for (int64 task = at.unit; task < tasks; task += units) {
    const int64 head = kWhole ? task : task / blocks, h = head % H, b = head / H;
    const int begin = kWhole ? 0 : int(task % blocks), end = kWhole ? blocks : begin + 1;
    const A* queries = q + b * q_batch + h * q_head;
    const A* gradients = dout + b * o_batch + h * o_head;
    const A* keys = k + b * k_batch + h * k_head;
    const A* largest = stats + head * 2 * N;
    A* deltas = delta + head * N;
    if constexpr (kWhole) head_deltas(gradients, o_token, out + (b * N * H + h) * D, token, N, D, lane, deltas);
    for (int block = begin; block < end; ++block) {
      const int first = block * W, count = L - first < W ? L - first : W;
      load_rows<A>(v + b * v_batch + h * v_head, v_token, first, L, D, lane, A(1), rows, value);
      load_rows<A>(keys, k_token, first, L, D, lane, A(1), rows, key);
      block_gradients<A>(queries, q_token, gradients, o_token, key, value, largest, deltas, N, D, lane, p, ds);
      sub_group_barrier();
      for (int i = 0; i < (kWhole ? 3 : 2); ++i) {
        const bool for_q = i == 2;
        const A* y = i == 0 ? gradients : i == 1 ? queries : keys + first * k_token;
        const int64 y_token = i == 0 ? o_token : i == 1 ? q_token : k_token;
        A* sums = for_q ? dqueries : rows;
        weighted_sum<A>({i == 0 ? p : ds, for_q ? W : 1, for_q ? 1 : W, for_q ? N : count, y, y_token,
                         for_q ? count : N, sums, for_q && block > 0},
                        P, lane);
        sub_group_barrier();
        if (for_q && block + 1 < blocks) break;
        T* out_i = i == 0   ? dv + b * dv_batch + h * dv_head + first * dv_token
                   : i == 1 ? dk + b * dk_batch + h * dk_head + first * dk_token
                            : dq + b * dq_batch + h * dq_head;
        const int64 out_token = i == 0 ? dv_token : i == 1 ? dk_token : dq_token;
        write_rows<A>(sums, out_i, out_token, for_q ? N : count, D, lane, for_q ? A(scale) : A(1), nullptr);
        sub_group_barrier();
      }
    }
  }
}
