// Weights into the layout that `tile` of gemm.h reads, once per engine.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class F>
void with_precision(engine::Precision precision, const F& f) {
  if (precision == engine::Precision::float32) return f(float{});
  f(bf16{});
}

}  // namespace

int64_t engine_packed_bytes(const engine::Linear& linear) {
  int64_t bytes = 0;
  with_precision(linear.precision, [&](auto t) { bytes = packed_b_bytes<decltype(t)>(linear.K, linear.N); });
  return bytes;
}

void engine_pack(const engine::Packing& p) {
  const engine::Linear& linear = *p.out;
  with_precision(linear.precision, [&](auto t) {
    pack_b<decltype(t)>(p.threads, Matrix<float>{p.weight, 1, linear.K}, linear.K, linear.N, linear.weight);
  });
}

}  // namespace vit::VIT_ISA
