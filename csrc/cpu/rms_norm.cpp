// rms_norm: y = x rstd weight over C, rstd = 1 / sqrt(mean(x^2) + eps).
//
//   xhat = x rstd,  g = dy weight,  dx = rstd (g - xhat mean(g xhat)),  dweight = sum over rows of dy xhat
//
// Saved for the backward: rstd. Threads take rows, backward blocks of rows; each block leaves its own partial dweight,
// which are then added in block order. Moved per element: 2 elements forward, 3 backward.
// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
#include "cpu/rms_norm.h"

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

constexpr int kGroup = 4;            // rows that share one load of the weight, or of the partial sums of its gradient
constexpr int64_t kElements = 4096;  // of one unit of work: a row of queries or keys alone has 64

int64_t unit_rows(int64_t C) { return max(int64_t{kGroup}, kElements / max(C, int64_t{1})); }

template <class T, class P, int rows>
VIT_INLINE void forward_rows(const RmsNormFwd& p, int64_t row) {
  using A = Acc<T>;
  A rstd[rows];
  rms_norm_rows<rows>(static_cast<const T*>(p.x) + row * p.x_stride, p.x_stride, static_cast<T*>(p.y) + row * p.C, p.C,
                      static_cast<const P*>(p.weight), p.C, p.eps, rstd);
  for (int r = 0; p.rstd && r < rows; ++r) static_cast<A*>(p.rstd)[row + r] = rstd[r];
}

template <class T, class P>
void forward(const RmsNormFwd& p) {
  const int64_t rows = unit_rows(p.C);
  parallel_for(p.context.num_threads, ceil_div(p.M, rows), [&](int64_t begin, int64_t end, int) {
    int64_t row = begin * rows;
    const int64_t stop = min(end * rows, p.M);
    for (; row + kGroup <= stop; row += kGroup) forward_rows<T, P, kGroup>(p, row);
    for (; row < stop; ++row) forward_rows<T, P, 1>(p, row);
  });
}

// Rows of one partial sum: at most 128 blocks, enough for as many threads and few enough to add quickly.
int64_t block_rows(int64_t M) { return max<int64_t>(16, round_up(ceil_div(M, 128), kGroup)); }

// Backward of `rows` rows from `row`, their gradient of the weight added to dw (null: not wanted).
template <class T, class P, int rows>
VIT_INLINE void backward_rows(const RmsNormBwd& p, int64_t row, Acc<T>* dw) {
  using A = Acc<T>;
  using V = Vec<A>;
  const P* weight = static_cast<const P*>(p.weight);
  const T *dy[rows], *x[rows];
  A rstd[rows], mean_gx[rows] = {};
  for (int r = 0; r < rows; ++r) {
    dy[r] = static_cast<const T*>(p.dy) + (row + r) * p.C;
    x[r] = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
    rstd[r] = static_cast<const A*>(p.rstd)[row + r];
    if (!p.dx) continue;
    RowSum<A> sum_gx;
    for_row<A>(p.C, [&](int64_t j, int64_t n, int chain) {
      const V g = load<A>(dy[r] + j, n) * load_or(weight, j, n, A(1));  // 0 beyond n
      sum_gx.chains[chain] = fma(g, load<A>(x[r] + j, n) * rstd[r], sum_gx.chains[chain]);
    });
    mean_gx[r] = sum_gx.total() / static_cast<A>(p.C);
  }
  T* dx = p.dx ? static_cast<T*>(p.dx) + row * p.C : nullptr;
  for_row<A>(p.C, [&](int64_t j, int64_t n, int) {
    V dw_j = dw ? load<A>(dw + j, n) : V{};
    const V w = load_or(weight, j, n, A(1));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const V d = load<A>(dy[r] + j, n), xhat = load<A>(x[r] + j, n) * rstd[r];
      dw_j = fma(d, xhat, dw_j);
      // Of two products GCC would round one or the other, and without a weight not the same one in every loop: a row's
      // gradient followed from the number of rows.
      if (dx) store<A>(dx + r * p.C + j, rstd[r] * fma(d, w, -opaque(xhat * mean_gx[r])), n);
    }
    if (dw) store<A>(dw + j, dw_j, n);
  });
}

template <class T, class P>
void backward(const RmsNormBwd& p) {
  using A = Acc<T>;
  A* partial = static_cast<A*>(p.workspace);  // [blocks, C]; null without rows
  const int64_t rows = block_rows(p.M), blocks = ceil_div(p.M, rows);
  parallel_for(p.context.num_threads, blocks, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      A* dw = p.dweight ? partial + block * p.C : nullptr;
      if (dw) memset(dw, 0, static_cast<size_t>(p.C) * sizeof(A));
      int64_t row = block * rows;
      const int64_t stop = min(row + rows, p.M);
      for (; row + kGroup <= stop; row += kGroup) backward_rows<T, P, kGroup>(p, row, dw);
      for (; row < stop; ++row) backward_rows<T, P, 1>(p, row, dw);
    }
  });
  if (!p.dweight) return;
  parallel_for(p.context.num_threads, ceil_div(p.C, kLanes<A>), [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin * kLanes<A>; j < min(end * kLanes<A>, p.C); j += kLanes<A>) {
      Vec<A> total{};
      for (int64_t block = 0; block < blocks; ++block) total += load<A>(partial + block * p.C + j, p.C - j);
      store<A>(static_cast<P*>(p.dweight) + j, total, p.C - j);
    }
  });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_param<decltype(t)>(p.param_dtype, [&](auto w) { forward<decltype(t), decltype(w)>(p); });
  });
}

void rms_norm_bwd(const RmsNormBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    with_param<decltype(t)>(p.param_dtype, [&](auto w) { backward<decltype(t), decltype(w)>(p); });
  });
}

std::size_t rms_norm_bwd_workspace(const RmsNormBwd& p) {
  return static_cast<std::size_t>(ceil_div(p.M, block_rows(p.M)) * p.C * acc_size(p.dtype));
}

}  // namespace vit::VIT_ISA
