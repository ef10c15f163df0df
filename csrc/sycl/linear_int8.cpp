// linear_int8 on the device: sizes to launches (kernels: kernels/linear_int8.h).
#include "check.h"
#include "gemm.h"

namespace vit {
namespace {

using namespace device;

enum Kernel { kQuantizeRows, kPackWeight, kProduct };

// dtypes: of activations, output.
const Family kLinearInt8 = {22, "linear_int8.h", [](const std::vector<DType>& d) {
                              return std::vector<std::string>{
                                  std::string("quantize_rows<") + type_name(d[0]) + ">",
                                  "pack_b<signed char, float, false>",
                                  std::string("linear_int8<") + type_name(d[1]) + ">",
                              };
                            }};

constexpr int kRows = 4;  // that a sub-group quantizes

struct Buffers {
  Operand weight;
  Shape shape;
  char *q, *x_scale, *packed;
  int64_t bytes;

  Buffers(const LinearInt8& p, char* base)
      : weight{p.weight, 0, 1, p.weight_stride, DType::float32}, shape{1, p.M, p.N, p.K, DType::float32} {
    Arena arena{base};
    q = arena.take(p.M * p.K * static_cast<int64_t>(sizeof(float)));
    x_scale = arena.take(p.M * static_cast<int64_t>(sizeof(float)));
    packed = arena.take(packed_b_bytes(p.context, weight, shape));
    bytes = arena.used;
  }
};

}  // namespace

void linear_int8(const LinearInt8& p) {
  check(p);
  if (!p.M || !p.N) return;
  Call call("linear_int8", p.context);
  const std::size_t size = size_of(p.dtype), result = size_of(p.out_dtype);
  const Bundle& bundle = call.bundle(kLinearInt8, {p.dtype, p.out_dtype});
  Buffers b(p, static_cast<char*>(call.scratch(p.workspace, linear_int8_workspace(p))));
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  call.launch(bundle, kQuantizeRows, ceil_div(p.M, kRows), call.in(p.x, extent(p.M, p.x_stride, p.K, 1), size),
              static_cast<void*>(b.q), static_cast<void*>(b.x_scale), M, K, p.x_stride, kRows);
  b.weight.data = call.in(p.weight, extent(p.N, p.weight_stride, p.K, 1), 1);
  const Packed weight = pack_b(call, bundle, kPackWeight, b.weight, b.shape, b.packed);
  const int64_t units = product_units(call, b.shape);
  call.launch(bundle, kProduct, units, static_cast<const void*>(b.q), weight.data, static_cast<const void*>(b.x_scale),
              call.in(p.weight_scale, p.N, sizeof(float)), call.in(p.bias, p.N, sizeof(float)),
              call.in(p.scale, p.N, sizeof(float)), call.in(p.residual, p.M * p.N, result),
              call.out(p.y, p.M * p.N, result), M, N, K, p.activation, units);
  call.finish();
}

std::size_t linear_int8_workspace(const LinearInt8& p) { return static_cast<std::size_t>(Buffers(p, nullptr).bytes); }

}  // namespace vit
