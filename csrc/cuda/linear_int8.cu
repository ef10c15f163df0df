// linear_int8 (linear_8bit.cuh): products of signed bytes, whose sums are exact in 32-bit integers.
#include "linear_8bit.cuh"

namespace vit::cuda {
namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits of the float

}  // namespace

struct Int8 {
  using Element = int8_t;
  static constexpr float kLargest = 127.0f;

  __device__ static int8_t nearest(float x) {
    return static_cast<int8_t>(__float_as_int(x + kRounder) - __float_as_int(kRounder));
  }
};

}  // namespace vit::cuda

namespace vit {

std::size_t linear_int8_workspace(const LinearInt8& p) { return cuda::QuantizedRows(p, nullptr).used; }

void linear_int8(const LinearInt8& p) {
  check(p);
  if (p.M == 0 || p.N == 0) return;
  const cuda::DeviceGuard guard("linear_int8", p.context);
  cuda::linear_8bit<cuda::Int8>("linear_int8", p);
}

}  // namespace vit
