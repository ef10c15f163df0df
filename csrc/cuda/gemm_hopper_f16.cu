// The Hopper product in float16, see gemm_hopper.cuh.
#include "gemm_hopper.cuh"

void vit::cuda::gemm_hopper_f16(const char* op, const Gemm& g, const Context& context) {
  gemm_hopper<f16>(op, g, context);
}
