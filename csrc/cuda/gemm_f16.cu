// The portable product in float16, see gemm_mma.cuh.
#include "gemm_mma.cuh"

void vit::cuda::gemm_f16(const char* op, const Gemm& g, const Context& context) { gemm_mma<f16>(op, g, context); }
