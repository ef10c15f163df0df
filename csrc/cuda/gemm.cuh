// The one product behind matmul and linear, in every direction: for each batch
//   z = sum over k of a[m, k] b[n, k],   preact = z + bias[n],   out = scale[n] activation(preact) + residual.
// An operand is any strided matrix; which of its two strides is 1 tells how it is loaded.
#pragma once

#include "activation.cuh"
#include "layout.cuh"
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
  const void* scale = nullptr;     // [N] acc, may be null
  const void* residual = nullptr;  // [M, N] out_dtype, may be null; batch must be 1
  void* preact = nullptr;          // [M, N] dtype, may be null; batch must be 1
  void* out;                       // [batch, M, N] out_dtype
  DType out_dtype;
  DType dtype;                // of a and b
  int splits = 1;             // K is cut into so many parts, see gemm_splits
  void* workspace = nullptr;  // gemm_workspace bytes, null without splits
  // The sum of each row of a over k, added by the tiles of the first columns beside their products: what the bias
  // gradient is where this is a weight gradient. Both null where it is not wanted; can_sum_rows(a, b); batch must be 1.
  void* row_sums = nullptr;      // [M] bias_dtype
  void* row_partials = nullptr;  // [splits, M] acc, null without splits
};

// Whether the products of such operands are compiled with sums of rows: those of a weight gradient are.
inline bool can_sum_rows(const Operand& a, const Operand& b) {
  return a.row == 1 && a.k != 1 && b.row == 1 && b.k != 1;
}

// How many parts K is cut into so that a product with few output tiles and a long K (a weight gradient) fills a GPU:
// from M, N and K alone. 1 for anything else. Only gradients of weights ask: a forward result may not depend on its
// rows.
int gemm_splits(int64_t M, int64_t N, int64_t K);

// Partial sums of the splits: [splits, batch, M, N] accumulators.
std::size_t gemm_workspace(const Gemm&);

// Chooses the kernel (portable or Hopper, tile size) and launches it.
void gemm(const char* op, const Gemm&, const Context&);

// The kernels it chooses from, a translation unit each: exact in float32 and float64; tensor cores of any GPU, 16 bits
// and TF32; wgmma, 16 bits.
void gemm_scalar(const char* op, const Gemm&, const Context&);
void gemm_mma(const char* op, const Gemm&, const Context&);
void gemm_hopper(const char* op, const Gemm&, const Context&);

// An operand can be copied in 16-byte pieces when it is aligned and one stride is 1.
struct Access {
  bool k_major;  // rows of k, else columns of m or n
  bool vectors;  // 16-byte copies, else element by element
};
Access access(const Operand&, DType);

// The part of a product that a block works on: a tile of kTile x kTile at (m, n) and k of [k_begin, k_end) of a plane,
// numbered split * batches + batch.
template <class T, int kTile>
struct BlockPart {
  int64_t plane, m, n, k_begin, k_end;
  const T *a, *b;  // of the batch

  __device__ BlockPart(int64_t block, const Operand& operand_a, const Operand& operand_b, int64_t M, int64_t N,
                       int64_t K, int64_t K_split, int64_t batches) {
    const int64_t rows = (M + kTile - 1) / kTile, columns = (N + kTile - 1) / kTile;
    const TileIndex<int64_t> tile = tile_at(block % (rows * columns), rows, columns, 8);
    plane = block / (rows * columns);
    m = tile.row * kTile;
    n = tile.column * kTile;
    k_begin = plane / batches * K_split;
    k_end = K < k_begin + K_split ? K : k_begin + K_split;
    a = static_cast<const T*>(operand_a.data) + plane % batches * operand_a.batch;
    b = static_cast<const T*>(operand_b.data) + plane % batches * operand_b.batch;
  }
};

// What happens to an accumulator z[m, n].
template <class T>
struct Epilogue {
  using A = Acc<T>;
  Mixed<T> bias, residual, out;
  const A* scale;
  T* preact;
  A* partial;  // [splits, batch, M, N] when K is split, else null
  Mixed<T> row_sums;
  A* row_partials;
  int64_t M, N;
  Activation activation;
  int width;  // elements along n that may be read and written in one access: 4, 2 or 1

  explicit Epilogue(const Gemm& g)
      : bias(mixed<T>(g.bias, g.bias_dtype)),
        residual(mixed<T>(g.residual, g.out_dtype)),
        out(mixed<T>(g.out, g.out_dtype)),
        scale(static_cast<const A*>(g.scale)),
        preact(static_cast<T*>(g.preact)),
        partial(g.splits > 1 ? static_cast<A*>(g.workspace) : nullptr),
        row_sums(mixed<T>(g.row_sums, g.bias_dtype)),
        row_partials(g.splits > 1 ? static_cast<A*>(g.row_partials) : nullptr),
        M(g.M),
        N(g.N),
        activation(g.activation),
        width(allows(g, 4)   ? 4
              : allows(g, 2) ? 2
                             : 1) {}

  static bool allows(const Gemm& g, int n) {
    return g.N % n == 0 && is_aligned(g.bias, n * bytes(g.bias_dtype)) &&
           is_aligned(g.residual, n * bytes(g.out_dtype)) && is_aligned(g.out, n * bytes(g.out_dtype)) &&
           is_aligned(g.preact, n * sizeof(T)) && is_aligned(g.scale, n * sizeof(A));
  }

  // Whether the tile whose first column this is sums the rows of a.
  __device__ bool sums_rows(int64_t column) const { return row_sums && column == 0; }

  // The sum of a row of a over the k of a split, which one thread has.
  __device__ void apply_row(int64_t split, int64_t row, A sum) const {
    if (row >= M) return;
    if (row_partials)
      row_partials[split * M + row] = sum;
    else
      row_sums.store(row, sum);
  }

  // Elements (row, column .. column + n - 1) of a plane: the batch, or split * batches + batch when K is split.
  template <int n>
  __device__ void apply(int64_t plane, int64_t row, int64_t column, A (&z)[n]) const {
    if (bias && !partial) {
      A extra[n];
      bias.load(column, extra);
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] += extra[j];
    }
    finish((plane * M + row) * N + column, column, z);
  }

  // The part after the bias, for elements i .. of out, of `column` and its neighbours.
  template <int n>
  __device__ void finish(int64_t i, int64_t column, A (&z)[n]) const {
    if (partial) return store_vector(partial + i, z);
    if (preact) store_vector(preact + i, z);
    if (activation != Activation::none) {
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] = activate<T>(activation, z[j]);
    }
    if (scale) {
      A factor[n];
      load_vector(scale + column, factor);
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] *= factor[j];
    }
    if (residual) {
      A extra[n];
      residual.load(i, extra);
#pragma unroll
      for (int j = 0; j < n; ++j) z[j] += extra[j];
    }
    out.store(i, z);
  }
};

// What happens to a tile of sums in shared memory, `pitch` elements per row: the threads of a block take 4 columns
// each, row after row, so that memory is written in whole lines. Called by the whole block after a barrier. A function
// of its own, once per tile size: inlined into every kernel it was a third of the time to compile them.
template <int tile, int threads, int pitch, class E, class S>
__device__ __noinline__ void apply_tile(const E& epilogue, const S* sums, int64_t plane, int64_t m0, int64_t n0) {
  static_assert(pitch % 4 == 0 && tile % 4 == 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile * tile / 4; i += threads) {
    const int row = i / (tile / 4), column = i % (tile / 4) * 4;
    if (m0 + row >= epilogue.M || n0 + column >= epilogue.N) continue;
    Acc<S> z[4];
    load_vector(sums + row * pitch + column, z);
    if (epilogue.width == 4) {
      epilogue.apply(plane, m0 + row, n0 + column, z);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Acc<S> one[1] = {z[j]};
      if (n0 + column + j < epilogue.N) epilogue.apply(plane, m0 + row, n0 + column + j, one);
    }
  }
}

}  // namespace vit::cuda
