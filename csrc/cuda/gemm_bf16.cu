// The portable product in bfloat16, see gemm_mma.cuh.
#include "gemm_mma.cuh"

void vit::cuda::gemm_bf16(const char* op, const Gemm& g, const Context& context) { gemm_mma<bf16>(op, g, context); }
