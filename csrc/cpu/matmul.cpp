// matmul: c = a b, da = dc b^T, db = a^T dc for each of `batch` pairs. Threads take rows of the result.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class T>
Matrix<T> matrix(const void* data, int64_t offset, int64_t row, int64_t col) {
  return {static_cast<const T*>(data) + offset, row, col};
}

// out[M, N] = a b, contiguous.
template <class T>
void multiply(int threads, const Matrix<T>& a, const Matrix<T>& b, T* out, int64_t M, int64_t N, int64_t K) {
  product<Acc<T>>(threads, a, b, M, N, K, [&](int64_t i, int64_t j0, int64_t n, const Acc<T>* sums) {
    for (int64_t j = 0; j < n; ++j) out[i * N + j0 + j] = from_acc<T>(sums[j]);
  });
}

template <class T>
void forward(const MatmulFwd& p) {
  for (int64_t i = 0; i < p.batch; ++i)
    multiply(p.context.num_threads, matrix<T>(p.a, i * p.a_batch, p.a_row, p.a_col),
             matrix<T>(p.b, i * p.b_batch, p.b_row, p.b_col), static_cast<T*>(p.c) + i * p.M * p.N, p.M, p.N, p.K);
}

template <class T>
void backward(const MatmulBwd& p) {
  const int threads = p.context.num_threads;
  for (int64_t i = 0; i < p.batch; ++i) {
    const T* dc = static_cast<const T*>(p.dc) + i * p.M * p.N;
    if (p.da)
      multiply(threads, Matrix<T>{dc, p.N, 1}, matrix<T>(p.b, i * p.b_batch, p.b_col, p.b_row),
               static_cast<T*>(p.da) + i * p.M * p.K, p.M, p.K, p.N);
    if (p.db)
      multiply(threads, matrix<T>(p.a, i * p.a_batch, p.a_col, p.a_row), Matrix<T>{dc, p.N, 1},
               static_cast<T*>(p.db) + i * p.K * p.N, p.K, p.N, p.M);
  }
}

}  // namespace

void matmul_fwd(const MatmulFwd& p) {
  with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); });
}

void matmul_bwd(const MatmulBwd& p) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); });
}

std::size_t matmul_fwd_workspace(const MatmulFwd&) { return 0; }
std::size_t matmul_bwd_workspace(const MatmulBwd&) { return 0; }

}  // namespace vit::VIT_ISA
