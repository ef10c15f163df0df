// attention: out = softmax(scale q k^T) v for each batch and head.
//
//   s = scale q k^T,  lse = log sum_j e^s_ij,  p = e^(s - lse),  out = p v,  delta_i = sum_d dout_id out_id
//   dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout
//
// Saved for the backward: lse. Lanes are queries (forward, dq) or keys (dk, dv): each lane owns whole rows of scores in
// scratch memory that no other lane reads, so that nothing crosses lanes, and rows of the other side are uniform
// scalars. A sub-group works off its tasks, blocks of W = vectors * VIT_LANES rows of one head, in the same scratch,
// which thereby stays in the L2 cache. Forward 4 B H N L D FLOPs, backward 14: the scores are computed once per side.
#pragma once

#include "common.h"

// [B, N, H, D] of any strides -> [B, H, N, D] in the accumulator type, times `factor`; a sub-group copies one row.
template <class T>
VIT_KERNEL widen_heads(const T* x, Acc<T>* out, int H, int N, int D, int64 batch, int64 token, int64 head,
                       double factor, int64 units) {
  using A = Acc<T>;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane;
  const int64 n = at.unit % N, h = at.unit / N % H, b = at.unit / N / H;
  const T* in = x + b * batch + n * token + h * head;
  A* to = out + at.unit * D;
  for_columns(D, lane, [&](int d) VIT_ALWAYS { to[d + lane] = load<A>(in + d + lane) * A(factor); });
}

template <class A>
struct Rows {
  static constexpr int vectors = vit::tiles::AttentionTile<A>::vectors, width = vectors * VIT_LANES;
};

// to[d][W] = factor * x[row of each lane][d]; lanes beyond the last row repeat it.
template <class A, class T>
VIT_INLINE void load_rows(const T* x, int64 token, int first, int N, int D, int lane, A factor, A* to) {
  constexpr int V = Rows<A>::vectors;
  VIT_UNROLL for (int u = 0; u < V; ++u) {
    const int n = first + u * VIT_LANES + lane;
    const T* row = x + (n < N ? n : N - 1) * token;
    A* column = to + u * VIT_LANES;
    for (int d = 0; d < D; ++d, column += Rows<A>::width) column[lane] = load<A>(row + d) * factor;
  }
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

// out[row of each lane][d] = factor * sum over j of weights[j][W] y[j][d].
template <class A, class T>
VIT_INLINE void weighted_sum(const A* weights, const A* y, int64 token, int count, T* out, int64 out_token, int first,
                             int N, int D, int lane, const A (&factor)[Rows<A>::vectors]) {
  constexpr int V = Rows<A>::vectors, kDims = vit::tiles::AttentionTile<A>::dims;
  for (int d0 = 0; d0 < D; d0 += kDims) {
    A sum[kDims][V];
    VIT_UNROLL for (int i = 0; i < kDims; ++i) VIT_UNROLL for (int u = 0; u < V; ++u) sum[i][u] = 0;
    // The last block of a head that is no multiple of kDims reads again what the one before it read.
    const int begin = d0 + kDims <= D ? d0 : D >= kDims ? D - kDims : 0;
    for (int j = 0; j < count; ++j) {
      A weight[V];
      const A* at = weights + int64(j) * Rows<A>::width;
      VIT_UNROLL for (int u = 0; u < V; ++u) weight[u] = at[u * VIT_LANES + lane];
      const A* row = y + j * token + begin;
      VIT_UNROLL for (int i = 0; i < kDims; ++i) {
        const A value = row[D >= kDims || i < D ? i : 0];
        VIT_UNROLL for (int u = 0; u < V; ++u) sum[i][u] = sycl::fma(value, weight[u], sum[i][u]);
      }
    }
    VIT_UNROLL for (int u = 0; u < V; ++u) {
      const int n = first + u * VIT_LANES + lane;
      T* to = out + n * out_token + begin;
      if (n < N)
        VIT_UNROLL for (int i = 0; i < kDims; ++i) if (D >= kDims || i < D) store(to + i, sum[i][u] * factor[u]);
    }
  }
}

// scratch [units][D + L][W].
template <class T>
VIT_KERNEL attention_fwd(const T* q, const Acc<T>* k, const Acc<T>* v, T* out, Acc<T>* lse, Acc<T>* scratch, int B,
                         int H, int N, int L, int D, int64 q_batch, int64 q_token, int64 q_head, int64 k_batch,
                         int64 k_token, int64 k_head, int64 v_batch, int64 v_token, int64 v_head, double scale,
                         int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kKeys = vit::tiles::AttentionTile<A>::keys;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (N + W - 1) / W;
  A* query = scratch + at.unit * (D + L) * W;
  A* p = query + D * W;
  const int64 tasks = int64(B) * H * blocks;
  for (int64 task = at.unit; task < tasks; task += units) {
    const int first = int(task % blocks) * W;
    const int64 h = task / blocks % H, b = task / blocks / H;
    const A* keys = k + b * k_batch + h * k_head;
    const A* values = v + b * v_batch + h * v_head;
    load_rows<A>(q + b * q_batch + h * q_head, q_token, first, N, D, lane, A(scale), query);

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
    A total[V], inverse[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) total[u] = 0;
    for (int j = 0; j < L; ++j) {
      A* row = p + int64(j) * W;
      VIT_UNROLL for (int u = 0; u < V; ++u) {
        const A e = sycl::exp(row[u * VIT_LANES + lane] - largest[u]);
        total[u] += e;
        row[u * VIT_LANES + lane] = e;
      }
    }
    VIT_UNROLL for (int u = 0; u < V; ++u) inverse[u] = A(1) / total[u];
    T* result = out + (b * N * H + h) * D;
    weighted_sum<A>(p, values, v_token, L, result, int64(H) * D, first, N, D, lane, inverse);
    if (lse) VIT_UNROLL for (int u = 0; u < V; ++u) {
        const int n = first + u * VIT_LANES + lane;
        A* to = lse + (b * H + h) * N;
        if (n < N) to[n] = largest[u] + sycl::log(total[u]);
      }
  }
}

// dq and delta [B, H, N]. scratch [units][2 D + L][W].
template <class T>
VIT_KERNEL attention_bwd_q(const T* dout, const T* q, const Acc<T>* k, const Acc<T>* v, const T* out, const Acc<T>* lse,
                           T* dq, Acc<T>* delta, Acc<T>* scratch, int B, int H, int N, int L, int D, int64 q_batch,
                           int64 q_token, int64 q_head, int64 k_batch, int64 k_token, int64 k_head, int64 v_batch,
                           int64 v_token, int64 v_head, int64 dq_batch, int64 dq_token, int64 dq_head, double scale,
                           int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kKeys = vit::tiles::AttentionTile<A>::pairs;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (N + W - 1) / W;
  A* query = scratch + at.unit * (2 * D + L) * W;
  A* grad = query + D * W;
  A* ds = grad + D * W;
  const int64 tasks = int64(B) * H * blocks, token = int64(H) * D;
  for (int64 task = at.unit; task < tasks; task += units) {
    const int first = int(task % blocks) * W;
    const int64 h = task / blocks % H, b = task / blocks / H;
    const A* keys = k + b * k_batch + h * k_head;
    const A* values = v + b * v_batch + h * v_head;
    const T* output = out + (b * N * H + h) * D;
    load_rows<A>(q + b * q_batch + h * q_head, q_token, first, N, D, lane, A(scale), query);
    load_rows<A>(dout + (b * N * H + h) * D, token, first, N, D, lane, A(1), grad);

    A sum[V], log_sum[V], factor[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) {
      int n = first + u * VIT_LANES + lane;
      const bool valid = n < N;
      n = valid ? n : N - 1;
      const T* row = output + n * token;
      const A* gradient = grad + u * VIT_LANES;
      A products = 0;
      for (int d = 0; d < D; ++d, gradient += W) products = sycl::fma(load<A>(row + d), gradient[lane], products);
      sum[u] = products;
      log_sum[u] = lse[(b * H + h) * N + n];
      factor[u] = A(scale);
      if (valid) delta[(b * H + h) * N + n] = products;
    }
    for (int j = 0; j < L; j += kKeys) {
      A s[kKeys][V], dp[kKeys][V];
      scores<A, kKeys>(keys, k_token, j, L, query, D, lane, s);
      scores<A, kKeys>(values, v_token, j, L, grad, D, lane, dp);
      VIT_UNROLL for (int i = 0; i < kKeys; ++i) {
        if (j + i < L) {
          A* row = ds + int64(j + i) * W;
          VIT_UNROLL for (int u = 0; u < V; ++u) row[u * VIT_LANES + lane] =
              sycl::exp(s[i][u] - log_sum[u]) * (dp[i][u] - sum[u]);
        }
      }
    }
    T* result = dq + b * dq_batch + h * dq_head;
    weighted_sum<A>(ds, keys, k_token, L, result, dq_token, first, N, D, lane, factor);
  }
}

// dk and dv, after attention_bwd_q has left delta; q already scaled: the scores must have the bits of the forward, or
// those near the end of a dtype's range do not cancel with lse. scratch [units][2 D + 2 N][W].
template <class T>
VIT_KERNEL attention_bwd_kv(const Acc<T>* dout, const Acc<T>* q, const T* k, const T* v, const Acc<T>* lse,
                            const Acc<T>* delta, T* dk, T* dv, Acc<T>* scratch, int B, int H, int N, int L, int D,
                            int64 o_batch, int64 o_token, int64 o_head, int64 q_batch, int64 q_token, int64 q_head,
                            int64 k_batch, int64 k_token, int64 k_head, int64 v_batch, int64 v_token, int64 v_head,
                            int64 dk_batch, int64 dk_token, int64 dk_head, int64 dv_batch, int64 dv_token,
                            int64 dv_head, int64 units) {
  using A = Acc<T>;
  constexpr int V = Rows<A>::vectors, W = Rows<A>::width, kQueries = vit::tiles::AttentionTile<A>::pairs;
  const Place at = place();
  if (at.unit >= units) return;
  const int lane = at.lane, blocks = (L + W - 1) / W;
  A* key = scratch + at.unit * (2 * D + 2 * N) * W;
  A* value = key + D * W;
  A* p = value + D * W;
  A* ds = p + int64(N) * W;
  const int64 tasks = int64(B) * H * blocks;
  for (int64 task = at.unit; task < tasks; task += units) {
    const int first = int(task % blocks) * W;
    const int64 h = task / blocks % H, b = task / blocks / H;
    const A* queries = q + b * q_batch + h * q_head;
    const A* gradients = dout + b * o_batch + h * o_head;
    const A* log_sums = lse + (b * H + h) * N;
    const A* deltas = delta + (b * H + h) * N;
    load_rows<A>(k + b * k_batch + h * k_head, k_token, first, L, D, lane, A(1), key);
    load_rows<A>(v + b * v_batch + h * v_head, v_token, first, L, D, lane, A(1), value);
    for (int i = 0; i < N; i += kQueries) {
      A s[kQueries][V], dp[kQueries][V];
      scores<A, kQueries>(queries, q_token, i, N, key, D, lane, s);
      scores<A, kQueries>(gradients, o_token, i, N, value, D, lane, dp);
      VIT_UNROLL for (int r = 0; r < kQueries; ++r) {
        if (i + r < N) {
          const A log_sum = log_sums[i + r], correction = deltas[i + r];
          A *p_row = p + int64(i + r) * W, *ds_row = ds + int64(i + r) * W;
          VIT_UNROLL for (int u = 0; u < V; ++u) {
            const A weight = sycl::exp(s[r][u] - log_sum);
            p_row[u * VIT_LANES + lane] = weight;
            ds_row[u * VIT_LANES + lane] = weight * (dp[r][u] - correction);
          }
        }
      }
    }
    A one[V];
    VIT_UNROLL for (int u = 0; u < V; ++u) one[u] = A(1);
    weighted_sum<A>(p, gradients, o_token, N, dv + b * dv_batch + h * dv_head, dv_token, first, L, D, lane, one);
    weighted_sum<A>(ds, queries, q_token, N, dk + b * dk_batch + h * dk_head, dk_token, first, L, D, lane, one);
  }
}
