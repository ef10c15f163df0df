// c = a b per batch; backward da = dc b^T and db = a^T dc. All three are one product (gemm.cuh) with other strides.
//
// 2 M N K FLOP each; at least (M K + K N + M N) elements moved.
#include "gemm.cuh"

namespace vit::cuda {
namespace {

Gemm product(DType dtype, int64_t batch, int64_t M, int64_t N, int64_t K, Operand a, Operand b, void* out) {
  Gemm g;
  g.a = a;
  g.b = b;
  g.batch = batch;
  g.M = M;
  g.N = N;
  g.K = K;
  g.out = out;
  g.dtype = g.out_dtype = g.bias_dtype = dtype;
  return g;
}

Gemm forward(const MatmulFwd& p) {
  return product(p.dtype, p.batch, p.M, p.N, p.K, {p.a.data, p.a.row, p.a.col, p.a.batch},
                 {p.b.data, p.b.col, p.b.row, p.b.batch}, p.c);
}

Gemm gradient_a(const MatmulBwd& p) {
  return product(p.dtype, p.batch, p.M, p.K, p.N, {p.dc, p.N, 1, p.M * p.N}, {p.b.data, p.b.row, p.b.col, p.b.batch},
                 p.da);
}

Gemm gradient_b(const MatmulBwd& p) {
  Gemm g = product(p.dtype, p.batch, p.K, p.N, p.M, {p.a.data, p.a.col, p.a.row, p.a.batch}, {p.dc, 1, p.N, p.M * p.N},
                   p.db);
  if (p.batch == 1) g.splits = gemm_splits(p.K, p.N, p.M);
  g.workspace = p.workspace;
  return g;
}

}  // namespace
}  // namespace vit::cuda

namespace vit {

std::size_t matmul_fwd_workspace(const MatmulFwd&) { return 0; }

std::size_t matmul_bwd_workspace(const MatmulBwd& p) { return cuda::gemm_workspace(cuda::gradient_b(p)); }

void matmul_fwd(const MatmulFwd& p) {
  using namespace cuda;
  const char* op = "matmul_fwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  gemm(op, forward(p), p.context);
}

void matmul_bwd(const MatmulBwd& p) {
  using namespace cuda;
  const char* op = "matmul_bwd";
  check(p);
  const DeviceGuard guard(op, p.context);
  if (p.da) gemm(op, gradient_a(p), p.context);
  if (!p.db) return;
  const Gemm g = gradient_b(p);
  require(g.splits == 1 || g.workspace, op, "workspace must not be null, see matmul_bwd_workspace");
  gemm(op, g, p.context);
}

}  // namespace vit
