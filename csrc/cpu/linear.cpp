// linear: y = scale activation(x weight^T + bias) + residual.
//
//   dz = scale dy activation'(preact),  dx = dz weight,  dweight = dz^T x,
//   dbias = sum over rows of dz,  dscale = sum over rows of dy activation(preact)
//
// Saved for the backward: preact = x weight^T + bias, where there is an activation or the scale has a gradient. 2 M N K
// FLOPs forward, twice that backward. Products run as in gemm.h; bias, activation, scale and residual are applied to a
// tile while it is in L1. The backward first makes dz and the gradients of bias and scale in one pass over dy; each
// block of rows leaves its own partial sums, and the blocks are added in order.
#include "cpu/linear.h"

#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class T>
Matrix<T> rows_of(const void* data, int64_t stride) {
  return {static_cast<const T*>(data), stride, 1};
}

template <class T>
struct ForwardBuffers {
  char *weight, *x, *bias;
  int64_t bytes;

  explicit ForwardBuffers(const LinearFwd& p, char* base) {
    Arena arena{base};
    weight = arena.take(packed_b_bytes<Operand<T>>(p.K, p.N));
    x = arena.take(prepared_a_bytes(rows_of<T>(p.x, p.x_stride), p.M, p.K));
    bias = arena.take(p.N * acc_size(p.dtype));
    bytes = arena.used;
  }
};

template <class T, class P, class O>
void forward(const LinearFwd& p) {
  using A = Acc<T>;
  const int threads = threads_for(p.context.num_threads, p.M * p.N * p.K);
  const ForwardBuffers<T> buffers(p, static_cast<char*>(p.workspace));
  A* bias = p.bias ? reinterpret_cast<A*>(buffers.bias) : nullptr;
  for (int64_t j = 0; bias && j < p.N; j += kLanes<A>)
    store<A>(bias + j, load<A>(static_cast<const P*>(p.bias) + j, p.N - j), p.N - j);
  using W = Source<T, P>;
  const Rhs<Operand<T>, W> rhs{{static_cast<const W*>(p.weight), 1, p.weight_stride}, buffers.weight, p.K, p.N};
  const Lhs lhs = prepare_a(threads, rows_of<T>(p.x, p.x_stride), p.M, p.K, buffers.x);
  with_activation(p.activation, [&](auto activation) {
    const Epilogue<T, O, decltype(activation)::value> epilogue{
        bias, static_cast<const O*>(p.residual), static_cast<O*>(p.y), static_cast<T*>(p.preact),
        p.N,  static_cast<const A*>(p.scale)};
    gemm(threads, lhs, rhs, p.M, epilogue);
  });
}

// Rows of one partial sum of dbias and dscale: at most 64 blocks, so that adding the blocks stays cheap.
int64_t block_rows(int64_t M) { return max<int64_t>(32, ceil_div(M, 64)); }

// Elements from row to row of dz: of dy, where dz is dy itself.
template <class T>
int64_t dz_stride(const LinearBwd& p) {
  if (p.activation == Activation::none && !p.scale && p.dtype == p.out_dtype) return p.N;
  return spread_bytes(p.N * size_of(p.dtype)) / size_of(p.dtype);
}

template <class T, class P>
struct BackwardBuffers {
  char *dz, *sums, *packed, *lhs, *partial;
  int64_t bytes;

  explicit BackwardBuffers(const LinearBwd& p, char* base) {
    const int64_t stride = dz_stride<T>(p);
    const Matrix<T> dz_rows{nullptr, stride, 1}, dz_columns{nullptr, 1, stride};
    Arena arena{base};
    dz = arena.take(p.M * stride * size_of(p.dtype));
    sums = arena.take(2 * ceil_div(p.M, block_rows(p.M)) * p.N * acc_size(p.dtype));
    packed = arena.take(max(packed_b_bytes<Operand<T>>(p.N, p.K), packed_b_bytes<Operand<T>>(p.M, p.K)));
    lhs = arena.take(max(prepared_a_bytes(dz_rows, p.M, p.N), prepared_a_bytes(dz_columns, p.N, p.M)));
    partial = arena.take(partial_bytes<Acc<T>, P>(p.N, p.K));
    bytes = arena.used;
  }
};

// Where make_dz leaves its results; null: not wanted.
template <class T>
struct Made {
  T* dz;           // [M, N] rows dz_stride apart; null: dz is dy itself
  Acc<T>* dbias;   // [blocks, N], the sum of each block of rows
  Acc<T>* dscale;  // likewise
};

// dz = scale dy activation'(preact), and the sums over dz and over dy activation(preact).
template <class T, class O, Activation kActivation>
void make_dz(int threads, const LinearBwd& p, const Made<T>& made) {
  using A = Acc<T>;
  const O* dy = static_cast<const O*>(p.dy);
  const T* preact = static_cast<const T*>(p.preact);
  const A* scale = static_cast<const A*>(p.scale);
  const int64_t rows = block_rows(p.M), stride = dz_stride<T>(p);
  parallel_for(threads, ceil_div(p.M, rows), [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      A* dbias = made.dbias ? made.dbias + block * p.N : nullptr;
      A* dscale = made.dscale ? made.dscale + block * p.N : nullptr;
      if (dbias) memset(dbias, 0, static_cast<size_t>(p.N) * sizeof(A));
      if (dscale) memset(dscale, 0, static_cast<size_t>(p.N) * sizeof(A));
      for (int64_t i = block * rows; i < min((block + 1) * rows, p.M); ++i)
        for (int64_t j = 0; j < p.N; j += kLanes<A>) {
          const int64_t n = p.N - j, at = i * p.N + j;
          Vec<A> v = load<A>(dy + at, n);
          if (dscale)
            store<A>(dscale + j, fma(v, activate<T, kActivation>(load<A>(preact + at, n)), load<A>(dscale + j, n)), n);
          if (scale) v *= load<A>(scale + j, n);
          if constexpr (kActivation != Activation::none)
            v *= activation_derivative<T, kActivation>(load<A>(preact + at, n));
          if (made.dz) store<A>(made.dz + i * stride + j, v, n);
          if (dbias) store<A>(dbias + j, load<A>(dbias + j, n) + v, n);
        }
    }
  });
}

template <class A, class P>
void add_blocks(const A* partial, int64_t blocks, int64_t N, P* out) {
  for (int64_t j = 0; j < N; j += kLanes<A>) {
    Vec<A> total{};
    for (int64_t block = 0; block < blocks; ++block) total += load<A>(partial + block * N + j, N - j);
    store<A>(out + j, total, N - j);
  }
}

template <class T, class P, class O>
void backward(const LinearBwd& p) {
  using A = Acc<T>;
  const int threads = threads_for(p.context.num_threads, p.M * p.N * p.K);
  const BackwardBuffers<T, P> buffers(p, static_cast<char*>(p.workspace));
  const bool dy_is_dz = p.activation == Activation::none && !p.scale && same<T, O>;
  const int64_t blocks = ceil_div(p.M, block_rows(p.M)), stride = dz_stride<T>(p);
  A* sums = reinterpret_cast<A*>(buffers.sums);
  const Made<T> made{dy_is_dz ? nullptr : reinterpret_cast<T*>(buffers.dz), p.dbias ? sums : nullptr,
                     p.dscale ? sums + blocks * p.N : nullptr};
  if (made.dz || made.dbias || made.dscale)
    with_activation(p.activation,
                    [&](auto activation) { make_dz<T, O, decltype(activation)::value>(threads, p, made); });
  if (p.dbias) add_blocks(made.dbias, blocks, p.N, static_cast<P*>(p.dbias));
  if (p.dscale) add_blocks(made.dscale, blocks, p.N, static_cast<A*>(p.dscale));

  const T* dz = dy_is_dz ? static_cast<const T*>(p.dy) : made.dz;
  if (p.dx && p.M && p.K) {
    using W = Source<T, P>;
    const Rhs<Operand<T>, W> rhs{rows_of<W>(p.weight, p.weight_stride), buffers.packed, p.N, p.K};
    const Lhs lhs = prepare_a(threads, Matrix<T>{dz, stride, 1}, p.M, p.N, buffers.lhs);
    gemm(threads, lhs, rhs, p.M, store_to<A>(static_cast<T*>(p.dx), nullptr, p.K));
  }
  if (p.dweight && p.N && p.K) {
    const Rhs<Operand<T>, T> rhs{rows_of<T>(p.x, p.x_stride), buffers.packed, p.M, p.K};
    const Lhs lhs = prepare_a(threads, Matrix<T>{dz, 1, stride}, p.N, p.M, buffers.lhs);
    gemm(threads, lhs, rhs, p.N, store_to<A>(static_cast<P*>(p.dweight), buffers.partial, p.K));
  }
}

}  // namespace

void linear_fwd(const LinearFwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_param<T>(p.param_dtype, [&](auto w) {
      with_param<T>(p.out_dtype, [&](auto o) { forward<T, decltype(w), decltype(o)>(p); });
    });
  });
}

void linear_bwd(const LinearBwd& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_param<T>(p.param_dtype, [&](auto w) {
      with_param<T>(p.out_dtype, [&](auto o) { backward<T, decltype(w), decltype(o)>(p); });
    });
  });
}

std::size_t linear_fwd_workspace(const LinearFwd& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) { bytes = ForwardBuffers<decltype(t)>(p, nullptr).bytes; });
  return static_cast<std::size_t>(bytes);
}

std::size_t linear_bwd_workspace(const LinearBwd& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_param<T>(p.param_dtype, [&](auto w) { bytes = BackwardBuffers<T, decltype(w)>(p, nullptr).bytes; });
  });
  return static_cast<std::size_t>(bytes);
}

}  // namespace vit::VIT_ISA
