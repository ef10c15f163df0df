// linear_fp8 (linear_8bit.cuh): products of e4m3 on tensor cores of compute capability 8.9 and up, in steps of 32 k
// that are added in float32 (mma_16x8<e4m3>).
#include "linear_8bit.cuh"

namespace vit::cuda {

inline constexpr int kLeastE4m3 = 89;  // the compute capability with which its products begin

struct Fp8 {
  using Element = e4m3;
  static constexpr float kLargest = 448.0f;

  __device__ static e4m3 nearest(float x) { return float_to_e4m3(x); }
};

}  // namespace vit::cuda

namespace vit {

std::size_t linear_fp8_workspace(const LinearFp8& p) { return cuda::QuantizedRows(p, nullptr).used; }

void linear_fp8(const LinearFp8& p) {
  const char* op = "linear_fp8";
  check(p);
  if (p.M == 0 || p.N == 0) return;
  const cuda::DeviceGuard guard(op, p.context);
  const int found = cuda::capability(p.context.device);
  if (found < cuda::kLeastE4m3)
    cuda::fail(op, "products of e4m3 begin with compute capability 8.9, this GPU has " + std::to_string(found / 10) +
                       "." + std::to_string(found % 10) + ": use linear_int8, or the reference backend");
  cuda::linear_8bit<cuda::Fp8>(op, p);
}

}  // namespace vit
