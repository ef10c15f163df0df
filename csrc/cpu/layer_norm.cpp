// layer_norm: y = (x - mean) rstd weight + bias over C, rstd = 1 / sqrt(var + eps), var = mean of (x - mean)^2.
//
//   xhat = (x - mean) rstd,  g = dy weight
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum over rows of dy xhat,  dbias = sum over rows of dy
//
// Saved for the backward: mean and rstd. Forward: threads take rows; the variance is computed in a second pass over the
// row (it is in L1), because E[x^2] - E[x]^2 cancels where |mean| is large. Backward: threads take blocks of rows; each
// block leaves its own partial dweight and dbias, which are then added in block order.
// Moved per element: 2 elements forward, 3 backward. Source: Ba, Kiros, Hinton, "Layer Normalization",
// arXiv:1607.06450.
#include "cpu/layer_norm.h"

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int64_t kRowProducts = 16;  // multiply-adds that take as long as an element: it is read three times
constexpr int kGroup = 4;  // rows that share one load of weight and bias, or of the partial sums of their gradients

template <class T, class P, int rows>
VIT_INLINE void forward_rows(const LayerNormFwd& p, int64_t row) {
  using A = Acc<T>;
  Moments<A> moments[rows];
  norm_rows<rows>(static_cast<const T*>(p.x) + row * p.x_stride, p.x_stride, static_cast<T*>(p.y) + row * p.C, p.C,
                  static_cast<const P*>(p.weight), static_cast<const P*>(p.bias), p.C, p.eps, moments);
  for (int r = 0; p.mean && r < rows; ++r) {
    static_cast<A*>(p.mean)[row + r] = moments[r].mean;
    static_cast<A*>(p.rstd)[row + r] = moments[r].rstd;
  }
}

template <class T, class P>
void forward(const LayerNormFwd& p) {
  const int threads = threads_for(p.context.num_threads, p.M * p.C * kRowProducts);
  parallel_for(threads, p.M, [&](int64_t begin, int64_t end, int) {
    int64_t row = begin;
    for (; row + kGroup <= end; row += kGroup) forward_rows<T, P, kGroup>(p, row);
    for (; row < end; ++row) forward_rows<T, P, 1>(p, row);
  });
}

// Rows of one partial sum: at most 128 blocks, enough for as many threads and few enough that adding them stays below
// 5 % of the time (M 1576, C 768, Zen 4).
int64_t block_rows(int64_t M) { return max<int64_t>(16, round_up(ceil_div(M, 128), kGroup)); }

// Backward of `rows` rows from `row`, their parameter gradients added to dw and db (null: not wanted).
template <class T, class P, int rows>
VIT_INLINE void backward_rows(const LayerNormBwd& p, int64_t row, Acc<T>* dw, Acc<T>* db) {
  using A = Acc<T>;
  using V = Vec<A>;
  const P* weight = static_cast<const P*>(p.weight);
  const T *dy[rows], *x[rows];
  T* dx[rows];
  A mean[rows], rstd[rows], mean_g[rows] = {}, mean_gx[rows] = {};
  for (int r = 0; r < rows; ++r) {
    dy[r] = static_cast<const T*>(p.dy) + (row + r) * p.C;
    x[r] = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
    dx[r] = p.dx ? static_cast<T*>(p.dx) + (row + r) * p.C : nullptr;
    mean[r] = static_cast<const A*>(p.mean)[row + r];
    rstd[r] = static_cast<const A*>(p.rstd)[row + r];
    if (!p.dx) continue;
    RowSum<A> sum_g, sum_gx;
    for_row<A>(p.C, [&](int64_t j, int64_t n, int chain) {
      const V g = load<A>(dy[r] + j, n) * load_or(weight, j, n, A(1));  // 0 beyond n
      const V xhat = (load<A>(x[r] + j, n) - mean[r]) * rstd[r];
      sum_g.chains[chain] += g;
      sum_gx.chains[chain] = fma(g, xhat, sum_gx.chains[chain]);
    });
    mean_g[r] = sum_g.total() / static_cast<A>(p.C);
    mean_gx[r] = sum_gx.total() / static_cast<A>(p.C);
  }
  for_row<A>(p.C, [&](int64_t j, int64_t n, int) {
    V dw_j = dw ? load<A>(dw + j, n) : V{};
    V db_j = dw ? load<A>(db + j, n) : V{};
    const V w = load_or(weight, j, n, A(1));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const V d = load<A>(dy[r] + j, n);
      const V xhat = (load<A>(x[r] + j, n) - mean[r]) * rstd[r];
      dw_j = fma(d, xhat, dw_j);
      db_j += d;
      if (p.dx) store<A>(dx[r] + j, rstd[r] * (fma(d, w, broadcast(-mean_g[r])) - xhat * mean_gx[r]), n);
    }
    if (dw) {
      store<A>(dw + j, dw_j, n);
      store<A>(db + j, db_j, n);
    }
  });
}

template <class T, class P>
void backward(const LayerNormBwd& p) {
  using A = Acc<T>;
  const bool parameters = p.dweight || p.dbias;
  A* partial = static_cast<A*>(p.workspace);  // [blocks, 2, C]: dweight, dbias; null without rows
  const int64_t rows = block_rows(p.M), blocks = ceil_div(p.M, rows);

  parallel_for(p.context.num_threads, blocks, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      A* dw = parameters ? partial + block * 2 * p.C : nullptr;
      A* db = parameters ? dw + p.C : nullptr;
      if (dw) memset(dw, 0, static_cast<size_t>(2 * p.C) * sizeof(A));
      int64_t row = block * rows;
      const int64_t stop = min(row + rows, p.M);
      for (; row + kGroup <= stop; row += kGroup) backward_rows<T, P, kGroup>(p, row, dw, db);
      for (; row < stop; ++row) backward_rows<T, P, 1>(p, row, dw, db);
    }
  });
  if (!parameters) return;

  const auto add_blocks = [&](P* out, const A* first, int64_t j) {
    if (!out) return;
    const int64_t n = p.C - j;
    Vec<A> total{};
    for (int64_t block = 0; block < blocks; ++block) total += load<A>(first + block * 2 * p.C + j, n);
    store<A>(out + j, total, n);
  };
  parallel_for(p.context.num_threads, ceil_div(p.C, kLanes<A>), [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin * kLanes<A>; j < min(end * kLanes<A>, p.C); j += kLanes<A>) {
      add_blocks(static_cast<P*>(p.dweight), partial, j);
      add_blocks(static_cast<P*>(p.dbias), partial + p.C, j);
    }
  });
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_param<decltype(t)>(p.param_dtype, [&](auto w) { forward<decltype(t), decltype(w)>(p); });
  });
}

void layer_norm_bwd(const LayerNormBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_param<decltype(t)>(p.param_dtype, [&](auto w) { backward<decltype(t), decltype(w)>(p); });
  });
}

std::size_t layer_norm_bwd_workspace(const LayerNormBwd& p) {
  return static_cast<std::size_t>(ceil_div(p.M, block_rows(p.M)) * 2 * p.C * acc_size(p.dtype));
}

}  // namespace vit::VIT_ISA
