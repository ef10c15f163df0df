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
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {
namespace {

// Calls f(j, n) for each vector of a row: n of its lanes are elements j, j + 1, ...
template <class A, class F>
VIT_INLINE void for_row(int64_t C, const F& f) {
  for (int64_t j = 0; j < C; j += kLanes<A>) f(j, min<int64_t>(C - j, kLanes<A>));
}

template <class A, class P>
VIT_INLINE Vec<A> load_or(const P* p, int64_t j, int64_t n, A other) {
  return p ? load<A>(p + j, n) : broadcast(other);
}

template <class T, class P>
void forward(const LayerNormFwd& p) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* x = static_cast<const T*>(p.x);
  const P* weight = static_cast<const P*>(p.weight);
  const P* bias = static_cast<const P*>(p.bias);
  T* y = static_cast<T*>(p.y);
  A* mean_out = static_cast<A*>(p.mean);
  A* rstd_out = static_cast<A*>(p.rstd);
  parallel_for(p.context.num_threads, p.M, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * p.x_stride;
      V total{};
      for_row<A>(p.C, [&](int64_t j, int64_t n) { total += load<A>(xr + j, n); });
      const A mean = sum(total) / static_cast<A>(p.C);
      const V mean_v = broadcast(mean);
      V squares{};
      for_row<A>(p.C, [&](int64_t j, int64_t n) {
        const V d = keep(load<A>(xr + j, n) - mean_v, n, A(0));
        squares = fma(d, d, squares);
      });
      const A rstd = A(1) / static_cast<A>(::sqrt(sum(squares) / static_cast<A>(p.C) + static_cast<A>(p.eps)));
      const V rstd_v = broadcast(rstd);
      T* yr = y + row * p.C;
      for_row<A>(p.C, [&](int64_t j, int64_t n) {
        const V xhat = (load<A>(xr + j, n) - mean_v) * rstd_v;
        store<A>(yr + j, fma(xhat, load_or(weight, j, n, A(1)), load_or(bias, j, n, A(0))), n);
      });
      if (mean_out) {
        mean_out[row] = mean;
        rstd_out[row] = rstd;
      }
    }
  });
}

// Rows of one partial sum of dweight and dbias: at most 64 blocks, so that adding the blocks stays cheap.
int64_t block_rows(int64_t M) { return max<int64_t>(32, ceil_div(M, 64)); }

template <class T, class P>
void backward(const LayerNormBwd& p) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const P* weight = static_cast<const P*>(p.weight);
  const A* mean_in = static_cast<const A*>(p.mean);
  const A* rstd_in = static_cast<const A*>(p.rstd);
  T* dx = static_cast<T*>(p.dx);
  A* partial = static_cast<A*>(p.workspace);  // [blocks, 2, C]: dweight, dbias
  const bool parameters = p.dweight || p.dbias;
  const int64_t rows = block_rows(p.M), blocks = ceil_div(p.M, rows);

  parallel_for(p.context.num_threads, blocks, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      A* dw = partial + block * 2 * p.C;
      A* db = dw + p.C;
      if (parameters) memset(dw, 0, static_cast<size_t>(2 * p.C) * sizeof(A));
      for (int64_t row = block * rows; row < min((block + 1) * rows, p.M); ++row) {
        const T* xr = x + row * p.x_stride;
        const T* dyr = dy + row * p.C;
        const V mean = broadcast(mean_in[row]), rstd = broadcast(rstd_in[row]);
        V sum_g{}, sum_gx{};
        for_row<A>(p.C, [&](int64_t j, int64_t n) {
          const V xhat = keep((load<A>(xr + j, n) - mean) * rstd, n, A(0));
          const V d = load<A>(dyr + j, n);
          const V g = d * load_or(weight, j, n, A(1));
          sum_g += g;
          sum_gx = fma(g, xhat, sum_gx);
          if (parameters) {
            store<A>(dw + j, fma(d, xhat, load<A>(dw + j, n)), n);
            store<A>(db + j, load<A>(db + j, n) + d, n);
          }
        });
        if (!dx) continue;
        const V mean_g = broadcast(sum(sum_g) / static_cast<A>(p.C));
        const V mean_gx = broadcast(sum(sum_gx) / static_cast<A>(p.C));
        for_row<A>(p.C, [&](int64_t j, int64_t n) {
          const V xhat = (load<A>(xr + j, n) - mean) * rstd;
          const V g = load<A>(dyr + j, n) * load_or(weight, j, n, A(1));
          store<A>(dx + row * p.C + j, rstd * (g - mean_g - xhat * mean_gx), n);
        });
      }
    }
  });
  if (!parameters) return;

  const auto add_blocks = [&](P* out, int64_t which) {
    if (!out) return;
    for_row<A>(p.C, [&](int64_t j, int64_t n) {
      V total{};
      for (int64_t block = 0; block < blocks; ++block) total += load<A>(partial + (block * 2 + which) * p.C + j, n);
      store<A>(out + j, total, n);
    });
  };
  add_blocks(static_cast<P*>(p.dweight), 0);
  add_blocks(static_cast<P*>(p.dbias), 1);
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
