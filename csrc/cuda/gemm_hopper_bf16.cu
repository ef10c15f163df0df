// The Hopper product in bfloat16, see gemm_hopper.cuh.
#include "gemm_hopper.cuh"

void vit::cuda::gemm_hopper_bf16(const char* op, const Gemm& g, const Context& context) {
  gemm_hopper<bf16>(op, g, context);
}
