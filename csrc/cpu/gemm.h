// Matrix products with any strides: one row of the result at a time, columns in blocks that stay in registers and L1.
#pragma once

#include "cpu/simd.h"
#include "cpu/threads.h"

namespace vit::VIT_ISA {

// A matrix in place: element (i, j) is data[i * row + j * col].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

inline constexpr int64_t kColumns = 64;

// sums[j] = sum over k of a(i, k) b(k, j0 + j) for the n <= kColumns columns from j0, added in the order of k.
template <class A, class TA, class TB>
void dot_columns(const Matrix<TA>& a, const Matrix<TB>& b, int64_t i, int64_t j0, int64_t n, int64_t K, A* sums) {
  for (int64_t j = 0; j < n; ++j) sums[j] = A(0);
  for (int64_t k = 0; k < K; ++k) {
    const A x = static_cast<A>(to_acc(a.data[i * a.row + k * a.col]));
    const TB* bk = b.data + k * b.row + j0 * b.col;
    for (int64_t j = 0; j < n; ++j) sums[j] += x * static_cast<A>(to_acc(bk[j * b.col]));
  }
}

// Calls f(i, j0, n, sums) for every row i < M and block of n columns from j0 of a b.
template <class A, class TA, class TB, class F>
void product(int threads, const Matrix<TA>& a, const Matrix<TB>& b, int64_t M, int64_t N, int64_t K, const F& f) {
  parallel_for(threads, M, [&](int64_t begin, int64_t end, int) {
    A sums[kColumns];
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j0 = 0; j0 < N; j0 += kColumns) {
        const int64_t n = min(kColumns, N - j0);
        dot_columns<A>(a, b, i, j0, n, K, sums);
        f(i, j0, n, sums);
      }
  });
}

}  // namespace vit::VIT_ISA
