// matmul on the device: sizes to launches (kernels: kernels/matmul.h).
#include <algorithm>

#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

enum Kernel { kPackB, kPackBMnMajor, kPackA, kPackAMnMajor, kProduct };

const Family kFamily = {5, "matmul.h", [](const std::vector<DType>& d) {
                          const DType acc = accumulator(d[0]);
                          return std::vector<std::string>{pack_b_name(d[0], acc, false), pack_b_name(d[0], acc, true),
                                                          pack_a_name(d[0], acc, false), pack_a_name(d[0], acc, true),
                                                          product_name(d[0], acc)};
                        }};

// One of the three products of the op.
struct Product {
  Operand a, b;
  Shape shape;
};

int64_t bytes(const Context& context, const Product& p) {
  Arena arena{nullptr};
  arena.take(packed_b_bytes(context, p.b, p.shape));
  arena.take(packed_a_bytes(p.a, p.shape));
  return arena.used;
}

void run(Call& call, const Context& context, const Product& p, void* c, void* workspace) {
  const Bundle& bundle = call.bundle(kFamily, {p.a.dtype});
  Arena arena{static_cast<char*>(workspace)};
  char* packed_b = arena.take(packed_b_bytes(context, p.b, p.shape));
  char* packed_a = arena.take(packed_a_bytes(p.a, p.shape));
  const Packed b = pack_b(call, bundle, p.b.col == 1 ? kPackBMnMajor : kPackB, p.b, p.shape, packed_b);
  const Packed a = pack_a(call, bundle, p.a.row == 1 ? kPackAMnMajor : kPackA, p.a, p.shape, packed_a);
  run_product(call, bundle, kProduct, a, b, c, p.shape);
}

Product forward(const MatmulFwd& p) {
  return {{p.a.data, p.a.batch, p.a.row, p.a.col, p.dtype},
          {p.b.data, p.b.batch, p.b.row, p.b.col, p.dtype},
          {p.batch, p.M, p.N, p.K, accumulator(p.dtype)}};
}

// da = dc b^T
Product gradient_of_a(const MatmulBwd& p) {
  return {{p.dc, p.M * p.N, p.N, 1, p.dtype},
          {p.b.data, p.b.batch, p.b.col, p.b.row, p.dtype},
          {p.batch, p.M, p.K, p.N, accumulator(p.dtype)}};
}

// db = a^T dc
Product gradient_of_b(const MatmulBwd& p) {
  return {{p.a.data, p.a.batch, p.a.col, p.a.row, p.dtype},
          {p.dc, p.M * p.N, p.N, 1, p.dtype},
          {p.batch, p.K, p.N, p.M, accumulator(p.dtype)}};
}

}  // namespace

void matmul_fwd(const MatmulFwd& p) {
  check(p);
  if (!p.batch || !p.M || !p.N) return;
  Call call("matmul_fwd", p.context);
  const std::size_t size = size_of(p.dtype);
  Product product = forward(p);
  product.a.data = call.in(p.a.data, extent(p.batch, p.a.batch, p.M, p.a.row, p.K, p.a.col), size);
  product.b.data = call.in(p.b.data, extent(p.batch, p.b.batch, p.K, p.b.row, p.N, p.b.col), size);
  void* c = call.out(p.c, p.batch * p.M * p.N, size);
  run(call, p.context, product, c, call.scratch(p.workspace, matmul_fwd_workspace(p)));
  call.finish();
}

void matmul_bwd(const MatmulBwd& p) {
  check(p);
  if (!p.batch) return;
  Call call("matmul_bwd", p.context);
  const std::size_t size = size_of(p.dtype);
  const void* dc = call.in(p.dc, p.batch * p.M * p.N, size);
  void* workspace = call.scratch(p.workspace, matmul_bwd_workspace(p));
  if (p.da && p.M && p.K) {
    Product product = gradient_of_a(p);
    product.a.data = dc;
    product.b.data = call.in(p.b.data, extent(p.batch, p.b.batch, p.K, p.b.row, p.N, p.b.col), size);
    run(call, p.context, product, call.out(p.da, p.batch * p.M * p.K, size), workspace);
  }
  if (p.db && p.K && p.N) {
    Product product = gradient_of_b(p);
    product.a.data = call.in(p.a.data, extent(p.batch, p.a.batch, p.M, p.a.row, p.K, p.a.col), size);
    product.b.data = dc;
    run(call, p.context, product, call.out(p.db, p.batch * p.K * p.N, size), workspace);
  }
  call.finish();
}

std::size_t matmul_fwd_workspace(const MatmulFwd& p) { return static_cast<std::size_t>(bytes(p.context, forward(p))); }

std::size_t matmul_bwd_workspace(const MatmulBwd& p) {
  return static_cast<std::size_t>(std::max(bytes(p.context, gradient_of_a(p)), bytes(p.context, gradient_of_b(p))));
}

}  // namespace vit
