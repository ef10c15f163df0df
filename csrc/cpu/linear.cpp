// linear: y = activation(x weight^T + bias) + residual.
//
//   dz = dy activation'(preact),  dx = dz weight,  dweight = dz^T x,  dbias = sum over rows of dz
//
// Saved for the backward: preact = x weight^T + bias, where there is an activation. 2 M N K FLOPs forward, twice that
// backward. Products run as in gemm.h; bias, activation and residual are applied to a tile while it is in L1. The
// backward first makes dz and the bias gradient in one pass over dy; each block of rows leaves its own partial sum of
// dbias, and the blocks are added in order.
#include "cpu/linear.h"

#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class T>
VIT_INLINE Vec<Acc<T>> activation_derivative(Activation activation, Vec<Acc<T>> x) {
  switch (activation) {
    case Activation::none:
      return broadcast(Acc<T>(1));
    case Activation::gelu:
      return gelu_grad<T, false>(x);
    case Activation::gelu_tanh:
      return gelu_grad<T, true>(x);
  }
  return x;
}

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
    weight = arena.take(packed_b_bytes<T>(p.K, p.N));
    x = arena.take(prepared_a_bytes(rows_of<T>(p.x, p.x_stride), p.M, p.K));
    bias = arena.take(p.N * acc_size(p.dtype));
    bytes = arena.used;
  }
};

template <class T, class P, class O>
void forward(const LinearFwd& p) {
  using A = Acc<T>;
  const int threads = p.context.num_threads;
  const ForwardBuffers<T> buffers(p, static_cast<char*>(p.workspace));
  A* bias = p.bias ? reinterpret_cast<A*>(buffers.bias) : nullptr;
  for (int64_t j = 0; bias && j < p.N; j += kLanes<A>)
    store<A>(bias + j, load<A>(static_cast<const P*>(p.bias) + j, p.N - j), p.N - j);
  const Right<T, P> right{{static_cast<const P*>(p.weight), 1, p.weight_stride}, buffers.weight, p.K, p.N};
  const Left left = prepare_a(threads, rows_of<T>(p.x, p.x_stride), p.M, p.K, buffers.x);
  with_activation(p.activation, [&](auto activation) {
    const Epilogue<T, O, decltype(activation)::value> epilogue{bias, static_cast<const O*>(p.residual),
                                                               static_cast<O*>(p.y), static_cast<T*>(p.preact), p.N};
    gemm(threads, left, right, p.M, epilogue);
  });
}

// Rows of one partial sum of dbias: at most 64 blocks, so that adding the blocks stays cheap.
int64_t block_rows(int64_t M) { return max<int64_t>(32, ceil_div(M, 64)); }

template <class T, class P>
struct BackwardBuffers {
  char *dz, *partial_bias, *packed, *left, *partial;
  int64_t bytes;

  explicit BackwardBuffers(const LinearBwd& p, char* base) {
    const Matrix<T> dz_rows{nullptr, p.N, 1}, dz_columns{nullptr, 1, p.N};
    Arena arena{base};
    dz = arena.take(p.M * p.N * size_of(p.dtype));
    partial_bias = arena.take(ceil_div(p.M, block_rows(p.M)) * p.N * acc_size(p.dtype));
    packed = arena.take(max(packed_b_bytes<T>(p.N, p.K), packed_b_bytes<T>(p.M, p.K)));
    left = arena.take(max(prepared_a_bytes(dz_rows, p.M, p.N), prepared_a_bytes(dz_columns, p.N, p.M)));
    partial = arena.take(partial_bytes<Acc<T>, P>(p.N, p.K));
    bytes = arena.used;
  }
};

// dz = dy activation'(preact) into `dz` (null: dz is dy itself) and the sum of each block of rows into `partial_bias`
// [blocks, N] (may be null).
template <class T, class O, Activation kActivation>
void make_dz(const LinearBwd& p, T* dz, Acc<T>* partial_bias) {
  using A = Acc<T>;
  const O* dy = static_cast<const O*>(p.dy);
  const T* preact = static_cast<const T*>(p.preact);
  const int64_t rows = block_rows(p.M);
  parallel_for(p.context.num_threads, ceil_div(p.M, rows), [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      A* total = partial_bias ? partial_bias + block * p.N : nullptr;
      if (total) memset(total, 0, static_cast<size_t>(p.N) * sizeof(A));
      for (int64_t i = block * rows; i < min((block + 1) * rows, p.M); ++i)
        for (int64_t j = 0; j < p.N; j += kLanes<A>) {
          const int64_t n = p.N - j, at = i * p.N + j;
          Vec<A> v = load<A>(dy + at, n);
          if constexpr (kActivation != Activation::none)
            v *= activation_derivative<T>(kActivation, load<A>(preact + at, n));
          if (dz) store<A>(dz + at, v, n);
          if (total) store<A>(total + j, load<A>(total + j, n) + v, n);
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
  const int threads = p.context.num_threads;
  const BackwardBuffers<T, P> buffers(p, static_cast<char*>(p.workspace));
  const bool dy_is_dz = p.activation == Activation::none && same<T, O>;
  T* made = dy_is_dz ? nullptr : reinterpret_cast<T*>(buffers.dz);
  A* partial_bias = p.dbias ? reinterpret_cast<A*>(buffers.partial_bias) : nullptr;
  if (made || partial_bias)
    with_activation(p.activation,
                    [&](auto activation) { make_dz<T, O, decltype(activation)::value>(p, made, partial_bias); });
  if (partial_bias) add_blocks(partial_bias, ceil_div(p.M, block_rows(p.M)), p.N, static_cast<P*>(p.dbias));

  const T* dz = dy_is_dz ? static_cast<const T*>(p.dy) : made;
  if (p.dx && p.M && p.K) {
    const Right<T, P> right{rows_of<P>(p.weight, p.weight_stride), buffers.packed, p.N, p.K};
    const Left left = prepare_a(threads, Matrix<T>{dz, p.N, 1}, p.M, p.N, buffers.left);
    gemm(threads, left, right, p.M, store_to<A>(static_cast<T*>(p.dx), nullptr, p.K));
  }
  if (p.dweight && p.N && p.K) {
    const Right<T, T> right{rows_of<T>(p.x, p.x_stride), buffers.packed, p.M, p.K};
    const Left left = prepare_a(threads, Matrix<T>{dz, 1, p.N}, p.N, p.M, buffers.left);
    gemm(threads, left, right, p.N, store_to<A>(static_cast<P*>(p.dweight), buffers.partial, p.K));
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
