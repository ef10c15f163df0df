// The one product behind matmul and linear, in every direction: for each batch
//   z = sum over k of a[m, k] b[n, k],   preact = z + bias[n],   out = activation(preact) + residual.
// An operand is any strided matrix; which of its two strides is 1 tells how it is loaded.
#pragma once

#include "gelu_math.cuh"
#include "runtime.cuh"
#include "types.cuh"

namespace vit::cuda {

struct Operand {
  const void* data;
  int64_t row;    // elements between rows (m of a, n of b)
  int64_t k;      // elements between neighbours along k
  int64_t batch;  // elements between batches
};

struct Gemm {
  Operand a, b;
  int64_t batch = 1, M, N, K;
  const void* bias = nullptr;  // [N] bias_dtype, may be null
  DType bias_dtype;
  Activation activation = Activation::none;
  const void* residual = nullptr;  // [M, N] out_dtype, may be null; batch must be 1
  void* preact = nullptr;          // [M, N] dtype, may be null; batch must be 1
  void* out;                       // [batch, M, N] out_dtype
  DType out_dtype;
  DType dtype;                // of a and b
  int splits = 1;             // K is cut into so many parts, see gemm_splits
  void* workspace = nullptr;  // gemm_workspace bytes, null without splits
};

// How many parts K is cut into so that a product with few output tiles and a long K (a weight gradient) fills a GPU: from
// M, N and K alone. 1 for anything else. Only gradients of weights ask: a forward result may not depend on its rows.
int gemm_splits(int64_t M, int64_t N, int64_t K);

// Partial sums of the splits: [splits, batch, M, N] accumulators.
std::size_t gemm_workspace(const Gemm&);

// Chooses the kernel (portable or Hopper, tile size) and launches it.
void gemm(const char* op, const Gemm&, const Context&);

// The kernels it chooses from. Each is a translation unit of its own, to be compiled in parallel.
void gemm_bf16(const char* op, const Gemm&, const Context&);
void gemm_f16(const char* op, const Gemm&, const Context&);
void gemm_scalar(const char* op, const Gemm&, const Context&);
void gemm_hopper_bf16(const char* op, const Gemm&, const Context&);
void gemm_hopper_f16(const char* op, const Gemm&, const Context&);

// An operand can be copied in 16-byte pieces when it is aligned and one stride is 1.
struct Access {
  bool k_adjacent;  // rows of k, else columns of m or n
  bool vectors;     // 16-byte copies, else element by element
};
Access access(const Operand&, DType);

// What happens to an accumulator. Elements (m, n) and (m, n + 1) at a time: a thread of every kernel holds such pairs.
template <class T>
struct Epilogue {
  using A = Acc<T>;
  Mixed<T> bias, residual, out;
  T* preact;
  A* partial;  // [splits, batch, M, N] when K is split, else null
  int64_t M, N;
  Activation activation;
  bool pairs;  // N is even and everything is aligned to a pair

  explicit Epilogue(const Gemm& g)
      : bias(mixed<T>(g.bias, g.bias_dtype)),
        residual(mixed<T>(g.residual, g.out_dtype)),
        out(mixed<T>(g.out, g.out_dtype)),
        preact(static_cast<T*>(g.preact)),
        partial(g.splits > 1 ? static_cast<A*>(g.workspace) : nullptr),
        M(g.M),
        N(g.N),
        activation(g.activation),
        pairs(g.N % 2 == 0 && is_aligned(g.bias, 2 * bytes(g.bias_dtype)) &&
              is_aligned(g.residual, 2 * bytes(g.out_dtype)) && is_aligned(g.out, 2 * bytes(g.out_dtype)) &&
              is_aligned(g.preact, 2 * sizeof(T))) {}

  template <int n>
  __device__ void apply(int64_t plane, int64_t row, int64_t column, A (&z)[n]) const {
    const int64_t i = (plane * M + row) * N + column;
    if (bias && !partial) {
      A extra[n];
      bias.load(column, extra);
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] += extra[j];
    }
    finish(i, z);
  }

  // The part after the bias, for element i of out.
  template <int n>
  __device__ void finish(int64_t i, A (&z)[n]) const {
    if (partial) {
#pragma unroll
      for (int j = 0; j < n; ++j) partial[i + j] = z[j];
      return;
    }
    if (preact) store_vector(preact + i, z);
    if (activation != Activation::none) {
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] = activate<T>(activation, z[j]);
    }
    if (residual) {
      A extra[n];
      residual.load(i, extra);
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] += extra[j];
    }
    out.store(i, z);
  }

  // plane: batch, or split * batches + batch when K is split.
  __device__ void operator()(int64_t plane, int64_t row, int64_t column, A z0, A z1) const {
    if (row >= M || column >= N) return;
    if (pairs) {
      A z[2] = {z0, z1};
      return apply(plane, row, column, z);
    }
    A z[1] = {z0};
    apply(plane, row, column, z);
    if (column + 1 >= N) return;
    z[0] = z1;
    apply(plane, row, column + 1, z);
  }
};

}  // namespace vit::cuda
