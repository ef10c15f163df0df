// Weights into the layout that `tile` of gemm_tile.h reads, once per engine.
#include "cpu/engine/compressed.h"
#include "cpu/engine/int8.h"
#include "cpu/engine/kernels.h"

namespace vit::VIT_ISA {
namespace {

template <class F>
void with_precision(engine::Precision precision, const F& f) {
  if (precision == engine::Precision::float32) return f(float{});
  if (precision == engine::Precision::bfloat16) return f(bf16{});
  f(q8{});
}

}  // namespace

int64_t engine_packed_bytes(const engine::Linear& linear) {
  int64_t bytes = 0;
  if (stored(linear.precision)) {
    with_code(linear.precision, [&](auto code) { bytes = compressed_bytes<decltype(code)>(linear.K, linear.N); });
    return bytes;
  }
  with_precision(linear.precision, [&](auto t) { bytes = packed_b_bytes<decltype(t)>(linear.K, linear.N); });
  return bytes;
}

void engine_pack(const engine::Packing& p) {
  const engine::Linear& linear = *p.out;
  if (stored(linear.precision))
    return with_code(linear.precision, [&](auto code) {
      compress<decltype(code)>(p.threads, p.weight, linear.N, linear.K, linear.weight);
    });
  with_precision(linear.precision, [&](auto t) {
    using T = decltype(t);
    if constexpr (same<T, q8>)
      pack_quantized(p.threads, p.weight, p.scale, linear);
    else
      pack_b<T>(p.threads, Matrix<float>{p.weight, 1, linear.K}, linear.K, linear.N, linear.weight);
  });
}

}  // namespace vit::VIT_ISA
