// matmul: c = a b, da = dc b^T, db = a^T dc for each of `batch` pairs.
//
// Nothing is saved beyond the operands. Threads take whole pairs where there are enough of them, else they share each
// pair (gemm.h). 2 M N K FLOPs per product; the right-hand side is packed at every call, which is K N elements read and
// written: a share of about 1 / M of the time of the product itself.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

// One product of a batch: [M, K] x [K, N] -> [M, N].
struct Sizes {
  int64_t M, N, K;
};

template <class T>
Matrix<T> matrix(const void* data, int64_t offset, int64_t row, int64_t col) {
  return {static_cast<const T*>(data) + offset, row, col};
}

// What one product needs beside its operands and its result.
template <class T>
struct Buffers {
  char *packed_b, *lhs, *partial;
  int64_t bytes;

  Buffers(const Matrix<T>& a, const Sizes& s, char* base) {
    Arena arena{base};
    packed_b = arena.take(packed_b_bytes<Operand<T>>(s.K, s.N));
    lhs = arena.take(prepared_a_bytes(a, s.M, s.K));
    partial = arena.take(a.col == 1 ? 0 : partial_bytes<Acc<T>, T>(s.M, s.N));
    bytes = arena.used;
  }
};

template <class T>
void multiply(int threads, const Matrix<T>& a, const Matrix<T>& b, const Sizes& s, T* c, char* workspace) {
  if (s.M == 0 || s.N == 0) return;
  const Buffers<T> buffers(a, s, workspace);
  const Lhs lhs = prepare_a(threads, a, s.M, s.K, buffers.lhs);
  const Rhs<Operand<T>, T> rhs{b, buffers.packed_b, s.K, s.N};
  gemm(threads, lhs, rhs, s.M, store_to<Acc<T>>(c, buffers.partial, s.N));
}

bool split_batch(int64_t batch, const Context& context) {
  return context.num_threads > 1 && batch >= context.num_threads;
}

// Calls f(i, threads, workspace) for each pair, `bytes` of workspace each.
template <class F>
void for_batch(int64_t batch, const Context& context, void* workspace, int64_t bytes, const F& f) {
  char* base = static_cast<char*>(workspace);
  if (!split_batch(batch, context)) {
    for (int64_t i = 0; i < batch; ++i) f(i, context.num_threads, base);
    return;
  }
  parallel_for(context.num_threads, batch, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) f(i, 1, base + thread * bytes);
  });
}

std::size_t batch_bytes(int64_t batch, const Context& context, int64_t bytes) {
  return static_cast<std::size_t>(split_batch(batch, context) ? bytes * context.num_threads : bytes);
}

template <class T>
Matrix<T> left_of(const MatmulFwd& p, int64_t i) {
  return matrix<T>(p.a.data, i * p.a.batch, p.a.row, p.a.col);
}

template <class T>
int64_t bytes_of(const MatmulFwd& p) {
  return Buffers<T>(left_of<T>(p, 0), {p.M, p.N, p.K}, nullptr).bytes;
}

template <class T>
void forward(const MatmulFwd& p) {
  for_batch(p.batch, p.context, p.workspace, bytes_of<T>(p), [&](int64_t i, int threads, char* workspace) {
    multiply(threads, left_of<T>(p, i), matrix<T>(p.b.data, i * p.b.batch, p.b.row, p.b.col), {p.M, p.N, p.K},
             static_cast<T*>(p.c) + i * p.M * p.N, workspace);
  });
}

template <class T>
Matrix<T> gradient_of(const MatmulBwd& p, int64_t i) {
  return matrix<T>(p.dc, i * p.M * p.N, p.N, 1);
}

template <class T>
Matrix<T> transposed_left_of(const MatmulBwd& p, int64_t i) {
  return matrix<T>(p.a.data, i * p.a.batch, p.a.col, p.a.row);
}

template <class T>
int64_t bytes_of(const MatmulBwd& p) {
  return max(Buffers<T>(gradient_of<T>(p, 0), {p.M, p.K, p.N}, nullptr).bytes,
             Buffers<T>(transposed_left_of<T>(p, 0), {p.K, p.N, p.M}, nullptr).bytes);
}

template <class T>
void backward(const MatmulBwd& p) {
  for_batch(p.batch, p.context, p.workspace, bytes_of<T>(p), [&](int64_t i, int threads, char* workspace) {
    const Matrix<T> dc = gradient_of<T>(p, i);
    if (p.da)
      multiply(threads, dc, matrix<T>(p.b.data, i * p.b.batch, p.b.col, p.b.row), {p.M, p.K, p.N},
               static_cast<T*>(p.da) + i * p.M * p.K, workspace);
    if (p.db)
      multiply(threads, transposed_left_of<T>(p, i), dc, {p.K, p.N, p.M}, static_cast<T*>(p.db) + i * p.K * p.N,
               workspace);
  });
}

}  // namespace

void matmul_fwd(const MatmulFwd& p) {
  with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void matmul_bwd(const MatmulBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

std::size_t matmul_fwd_workspace(const MatmulFwd& p) {
  std::size_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) { bytes = batch_bytes(p.batch, p.context, bytes_of<decltype(t)>(p)); });
  return bytes;
}

std::size_t matmul_bwd_workspace(const MatmulBwd& p) {
  std::size_t bytes = 0;
  with_dtype(p.dtype, [&](auto t) { bytes = batch_bytes(p.batch, p.context, bytes_of<decltype(t)>(p)); });
  return bytes;
}

}  // namespace vit::VIT_ISA
