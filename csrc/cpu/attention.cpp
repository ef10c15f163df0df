// attention: out = P v, P = softmax(scale q k^T) for each batch and head.
//
//   lse_i = log sum_j exp(scale q_i k_j),  P_ij = exp(scale q_i k_j - lse_i),  delta_i = dout_i out_i
//   dS_ij = scale P_ij (dout_i v_j - delta_i),  dq = dS k,  dk = dS^T q,  dv = P^T dout
//
// Saved for the backward: out and lse. Forward: threads take (batch, head, query) triples. Backward: threads take
// (batch, head) pairs and add dk and dv over the queries in order. FLOPs: 4 N L D forward, 10 N L D backward per head.
// Source of the backward by lse and delta: Dao et al., "FlashAttention", arXiv:2205.14135.
#include "cpu/functions.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

template <class A, class TX, class TY>
VIT_INLINE A dot(const TX* x, const TY* y, int64_t n) {
  Vec<A> total{};
  for (int64_t i = 0; i < n; i += kLanes<A>) total = fma(load<A>(x + i, n - i), load<A>(y + i, n - i), total);
  return sum(total);
}

// y += s x over n elements.
template <class A, class T>
VIT_INLINE void add_scaled(A* y, A s, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store<A>(y + i, fma(broadcast(s), load<A>(x + i, n - i), load<A>(y + i, n - i)), n - i);
}

template <class A, class T>
VIT_INLINE void store_row(T* out, const A* x, A scale, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store<A>(out + i, scale * load<A>(x + i, n - i), n - i);
}

template <class T>
void forward(const AttentionFwd& p) {
  using A = Acc<T>;
  const int64_t scratch = round_up(p.L, kAlign) + round_up(p.D, kAlign);  // of one thread: scores, then the output row
  parallel_for(p.context.num_threads, p.B * p.H * p.N, [&](int64_t begin, int64_t end, int thread) {
    A* scores = static_cast<A*>(p.workspace) + thread * scratch;
    A* row = scores + round_up(p.L, kAlign);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit % p.N, h = unit / p.N % p.H, b = unit / p.N / p.H;
      const T* q = static_cast<const T*>(p.q) + b * p.q_batch + i * p.q_token + h * p.q_head;
      const T* k = static_cast<const T*>(p.k) + b * p.k_batch + h * p.k_head;
      const T* v = static_cast<const T*>(p.v) + b * p.v_batch + h * p.v_head;
      A largest = -static_cast<A>(INFINITY);
      for (int64_t j = 0; j < p.L; ++j) {
        scores[j] = static_cast<A>(p.scale) * dot<A>(q, k + j * p.k_token, p.D);
        largest = max(largest, scores[j]);
      }
      Vec<A> totals{};
      for (int64_t j = 0; j < p.L; j += kLanes<A>) {
        const int64_t n = p.L - j;
        const Vec<A> e = keep(exp2<A>(Exp<A>::log2_e * (load<A>(scores + j, n) - broadcast(largest))), n, A(0));
        store<A>(scores + j, e, n);
        totals += e;
      }
      const A total = sum(totals);
      memset(row, 0, static_cast<size_t>(p.D) * sizeof(A));
      for (int64_t j = 0; j < p.L; ++j) add_scaled(row, scores[j], v + j * p.v_token, p.D);
      store_row(static_cast<T*>(p.out) + ((b * p.N + i) * p.H + h) * p.D, row, p.L ? 1 / total : A(0), p.D);
      if (p.lse) static_cast<A*>(p.lse)[(b * p.H + h) * p.N + i] = largest + static_cast<A>(::log(total));
    }
  });
}

template <class T>
void backward(const AttentionBwd& p) {
  using A = Acc<T>;
  const int64_t row = round_up(p.D, kAlign), scratch = row + 2 * p.L * row;  // of one thread: dq row, dk, dv
  parallel_for(p.context.num_threads, p.B * p.H, [&](int64_t begin, int64_t end, int thread) {
    A* dq = static_cast<A*>(p.workspace) + thread * scratch;
    A* dk = dq + row;
    A* dv = dk + p.L * row;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t h = unit % p.H, b = unit / p.H;
      const T* q = static_cast<const T*>(p.q) + b * p.q_batch + h * p.q_head;
      const T* k = static_cast<const T*>(p.k) + b * p.k_batch + h * p.k_head;
      const T* v = static_cast<const T*>(p.v) + b * p.v_batch + h * p.v_head;
      const A* lse = static_cast<const A*>(p.lse) + unit * p.N;
      memset(dk, 0, static_cast<size_t>(2 * p.L * row) * sizeof(A));
      for (int64_t i = 0; i < p.N; ++i) {
        const T* qi = q + i * p.q_token;
        const int64_t at = ((b * p.N + i) * p.H + h) * p.D;
        const T* dout = static_cast<const T*>(p.dout) + at;
        const A delta = dot<A>(dout, static_cast<const T*>(p.out) + at, p.D);
        memset(dq, 0, static_cast<size_t>(p.D) * sizeof(A));
        for (int64_t j = 0; j < p.L; ++j) {
          const T* kj = k + j * p.k_token;
          const A score = static_cast<A>(p.scale) * dot<A>(qi, kj, p.D);
          const A above = score - lse[i];  // > 0 only by rounding, which at huge scores would overflow exp
          const A probability = exp2<A>(broadcast(above > 0 ? A(0) : Exp<A>::log2_e * above))[0];
          const A ds = static_cast<A>(p.scale) * probability * (dot<A>(dout, v + j * p.v_token, p.D) - delta);
          add_scaled(dq, ds, kj, p.D);
          add_scaled(dk + j * row, ds, qi, p.D);
          add_scaled(dv + j * row, probability, dout, p.D);
        }
        store_row(static_cast<T*>(p.dq) + b * p.dq_batch + i * p.dq_token + h * p.dq_head, dq, A(1), p.D);
      }
      for (int64_t j = 0; j < p.L; ++j) {
        store_row(static_cast<T*>(p.dk) + b * p.dk_batch + j * p.dk_token + h * p.dk_head, dk + j * row, A(1), p.D);
        store_row(static_cast<T*>(p.dv) + b * p.dv_batch + j * p.dv_token + h * p.dv_head, dv + j * row, A(1), p.D);
      }
    }
  });
}

}  // namespace

void attention_fwd(const AttentionFwd& p) {
  with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void attention_bwd(const AttentionBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

std::size_t attention_fwd_workspace(const AttentionFwd& p) {
  const int64_t scratch = round_up(p.L, kAlign) + round_up(p.D, kAlign);
  return static_cast<std::size_t>(p.context.num_threads * scratch * acc_size(p.dtype));
}

std::size_t attention_bwd_workspace(const AttentionBwd& p) {
  const int64_t row = round_up(p.D, kAlign);
  return static_cast<std::size_t>(p.context.num_threads * (row + 2 * p.L * row) * acc_size(p.dtype));
}

}  // namespace vit::VIT_ISA
